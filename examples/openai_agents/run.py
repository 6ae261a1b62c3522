"""Runs the help desk at a server, or measures it at two: `python examples/openai_agents/run.py`."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "measuring"))

import two_servers
from agents import RunConfig, Runner
from small_model import RoutedModel
from team import OTHERS, SPECIALISTS, build_team, instructions

from tenure.serving.integrations.openai_agents import AgentWorkflows

QUESTIONS = [
    "How do I set the budget to evict and compress a prompt?",
    "How do I train gates, and which loss is used?",
    "How do I measure a task and make a table?",
    "How do I serve an agent with a long prompt?",
    "Which budget does it take to compress and evict well?",
    "How long do I train the gates until the loss is small?",
]


def main(arguments: list[str] | None = None) -> None:
    options = two_servers.parser("A help desk of six agents, with the OpenAI Agents SDK.").parse_args(arguments)

    def prepare(base_url: str) -> two_servers.Ask:
        workflows = AgentWorkflows(base_url, api_key="none")
        client = workflows.client()
        team = build_team(lambda route: RoutedModel(options.model, client, route), options.characters, options.tokens)
        workflows.declare(team, "help desk")
        quiet = RunConfig(tracing_disabled=True)  # traces would be sent to OpenAI

        def ask(question: str) -> str:
            with workflows.session(uuid.uuid4().hex):
                return str(Runner.run_sync(team, question, run_config=quiet).final_output)

        return ask

    prompts = [instructions(agent, options.characters) for agent in (*SPECIALISTS, *OTHERS)]
    two_servers.run(prepare, QUESTIONS, prompts, options)


if __name__ == "__main__":
    main()
