"""Agents of the OpenAI Agents SDK are declared with their handoffs, and their calls are named."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("agents")

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, RunConfig, Runner, function_tool, handoff
from openai import APIStatusError

from tenure.serving.integrations.openai_agents import AgentWorkflows
from tenure.serving.integrations.workflow_client import AGENT_HEADER, SESSION_HEADER, WORKFLOW_HEADER
from tenure.serving.workflow.loaders import workflow_from_dict


@function_tool
def look_up(word: str) -> str:
    """Explains a word."""
    return f"{word} is a word"


def team(model: Any) -> Agent[Any]:
    """Triage hands over to a writer, who asks a checker as a tool, and to an editor, who may send it back."""
    options: dict[str, Any] = {"model": model}
    editor: Agent[Any] = Agent("editor", **options)
    checker: Agent[Any] = Agent("checker", tools=[look_up], **options)
    tools: list[Any] = [checker.as_tool("check", "Checks a claim.")]
    writer: Agent[Any] = Agent("writer", tools=tools, handoffs=[handoff(editor)], **options)
    editor.handoffs = [writer]
    return Agent("triage", handoffs=[writer], **options)


# The tool that each agent calls in turn; None: it answers.
SCRIPT: dict[str, list[str | None]] = {
    "triage": ["transfer_to_writer"],
    "writer": ["check", "transfer_to_editor", "transfer_to_editor"],
    "checker": ["look_up", None],
    "editor": ["transfer_to_writer", None],
}
EDGES = {
    ("triage", "writer", 1 / 2), ("writer", "editor", 1 / 3), ("writer", "checker", 1 / 3),
    ("checker", "checker", 1 / 2), ("checker", "writer", 1 / 2), ("editor", "writer", 1 / 2),
}  # fmt: skip
ARGUMENTS = {"check": {"input": "x"}, "look_up": {"word": "x"}}


class ScriptedServer(BaseHTTPRequestHandler):
    """An OpenAI server that plays `SCRIPT`, and remembers the names of its calls."""

    server: Any

    def do_PUT(self) -> None:
        self.server.documents.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send({}, 201)

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        agent = self.headers[AGENT_HEADER]
        self.server.calls.append((agent, self.headers[WORKFLOW_HEADER], self.headers[SESSION_HEADER]))
        tool = self.server.script[agent].pop(0)
        message: dict[str, Any] = {"role": "assistant", "content": "yes"}
        if tool is not None:
            function = {"name": tool, "arguments": json.dumps(ARGUMENTS.get(tool, {}))}
            message["tool_calls"] = [{"id": f"call-{len(self.server.calls)}", "type": "function", "function": function}]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "tool_calls" if tool else "stop"}
        answer: dict[str, Any] = {"id": "1", "created": 0, "model": "tiny"}
        if document.get("stream"):
            for i, call in enumerate(message.get("tool_calls", ())):
                call["index"] = i
            chunk = answer | {"object": "chat.completion.chunk", "choices": [choice | {"delta": message}]}
            self._send(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", kind="text/event-stream")
        else:
            self._send(answer | {"object": "chat.completion", "choices": [choice | {"message": message}]})

    def _send(self, body: Any, status: int = 200, kind: str = "application/json") -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), ScriptedServer)
    server.calls, server.documents = [], []
    server.script = {agent: list(tools) for agent, tools in SCRIPT.items()}
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


ONE_RUN = ["triage", "writer", "checker", "checker", "writer", "editor", "writer", "editor"]
QUIET = RunConfig(tracing_disabled=True)


@pytest.mark.parametrize(("how", "repeats"), [("sync", False), ("async", True), ("streamed", False)])
def test_all_calls_of_a_run_have_their_names(scripted, how, repeats):
    workflows = AgentWorkflows(scripted.url, "none")
    first = team(OpenAIChatCompletionsModel("tiny", workflows.client()))
    workflows.declare(first, "support", repeats=repeats)
    (document,) = scripted.documents
    spec = workflow_from_dict(document)
    ends = {("triage", "triage", 1 / 2), ("writer", "triage", 1 / 3), ("editor", "triage", 1 / 2)}
    found = {(edge.source, edge.target): edge.probability for edge in spec.edges}
    assert found == pytest.approx({(source, target): p for source, target, p in (EDGES | ends if repeats else EDGES)})
    assert spec.name == "support" and list(spec.start) == ["triage"]

    async def run() -> Any:
        if how == "async":
            return await Runner.run(first, "Go.", run_config=QUIET)
        streamed = Runner.run_streamed(first, "Go.", run_config=QUIET)
        _ = [event async for event in streamed.stream_events()]
        return streamed

    with workflows.session("ticket 17"):
        result = Runner.run_sync(first, "Go.", run_config=QUIET) if how == "sync" else asyncio.run(run())
    assert result.final_output == "yes" and result.last_agent.name == "editor"
    assert scripted.calls == [(agent, "support", "ticket 17") for agent in ONE_RUN]


def test_declared_agents_keep_their_settings_and_their_workflow(scripted):
    workflows = AgentWorkflows(scripted.url, "none")
    settings = ModelSettings(temperature=0.5, extra_headers={"X-Team": "a"})
    agent: Agent[Any] = Agent("solo", model_settings=settings)
    for _ in range(2):
        assert workflows.declare(agent, "first", repeats=False).edges == []
    assert agent.model_settings.temperature == 0.5 and settings.extra_headers == {"X-Team": "a"}
    assert agent.model_settings.extra_headers == {"X-Team": "a", WORKFLOW_HEADER: "first", AGENT_HEADER: "solo"}
    with pytest.raises(ValueError, match="'solo', which belongs to the workflow 'first'; accepted: agents of no other"):
        workflows.declare(agent, "second")
    assert workflows.declare(agent.clone(model_settings=settings), "second").name == "second"


def test_a_handoff_that_does_not_keep_its_agent_is_warned_of(scripted, caplog):
    editor: Agent[Any] = Agent("editor", tools=[look_up])
    bare = handoff(editor)
    bare._agent_ref = None
    with caplog.at_level(logging.WARNING):
        spec = AgentWorkflows(scripted.url, "none").declare(Agent("triage", handoffs=[bare]), "w", repeats=False)
    assert "the handoffs of the agent 'editor' are unknown" in caplog.text
    assert [(edge.source, edge.target, edge.probability) for edge in spec.edges] == [("triage", "editor", 0.5)]


def test_a_real_server_counts_the_calls(served):
    workflows = AgentWorkflows(served.url, "none")
    model = OpenAIChatCompletionsModel("tiny", workflows.client())
    settings = ModelSettings(max_tokens=2)
    editor: Agent[Any] = Agent("editor", instructions="You edit. " * 8, model=model, model_settings=settings)
    workflows.declare(editor, "support")
    Runner.run_sync(editor, "Go.", run_config=QUIET)
    served.until(lambda: served.unfinished() == 0)
    assert {str(agent) for agent in served.system.tiers.agents()} == {"editor"}
    assert [*served.system.graph["support"].ids] == ["editor"]
    workflows.close()
    assert "support" not in served.system.graph
    with pytest.raises(APIStatusError):
        Runner.run_sync(editor.clone(model_settings=ModelSettings(max_tokens=-1)), "Go.", run_config=QUIET)
