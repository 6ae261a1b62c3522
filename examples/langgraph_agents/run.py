"""Runs the graph at a server, or measures it at two: `python examples/langgraph_agents/run.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "measuring"))

import two_servers
from graph import EXPERTS, OTHERS, build_graph, instructions
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tenure.serving.integrations.langgraph import LangGraphWorkflows

QUESTIONS = [
    "How is the budget of a layer chosen?",
    "When is a prompt written to disk?",
    "How does the step graph learn durations?",
    "What does the simulator count as idle time?",
    "Which prompts are prefetched, and when?",
    "How many entries are protected from eviction?",
]


def main(arguments: list[str] | None = None) -> None:
    options = two_servers.parser("A LangGraph team of seven agents.").parse_args(arguments)

    def prepare(base_url: str) -> two_servers.Ask:
        workflows = LangGraphWorkflows(base_url, api_key="none")
        model = ChatOpenAI(
            model=options.model, base_url=base_url, api_key=SecretStr("none"), temperature=0,
            max_completion_tokens=options.tokens, http_client=workflows.http_client(),
            http_async_client=workflows.http_async_client(),
        )  # fmt: skip
        graph = workflows.declare(build_graph(model, options.characters), "answers", without=["search"])
        return lambda question: graph.invoke({"question": question})["draft"]

    prompts = [instructions(agent, options.characters) for agent in (*EXPERTS, *OTHERS)]
    two_servers.run(prepare, QUESTIONS, prompts, options)


if __name__ == "__main__":
    main()
