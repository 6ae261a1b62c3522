"""Calls of LangGraph graphs reach the server with their names, and its step graph is theirs."""

from __future__ import annotations

import asyncio
import logging
import operator
import threading
import time
import warnings
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any, Literal, TypedDict

import pytest

pytest.importorskip("langgraph")
pytest.importorskip("langchain_openai")

from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, RetryPolicy, Send
from openai import OpenAI
from pydantic import SecretStr

from tenure.serving.integrations import workflow_client
from tenure.serving.integrations.langgraph import LangGraphWorkflows
from tenure.serving.integrations.workflow_client import WorkflowClientConfig, name_on_the_wire
from tenure.serving.request import MAX_WORKFLOW_NAME
from tenure.serving.server.call_context import HEADERS

INSTRUCTIONS = "You are the {node} of a team, and you work all day long, step by step, with great care. " * 2


class State(TypedDict):
    said: Annotated[list[str], operator.add]


def team(model: ChatOpenAI, fail: Callable[[str], None] = lambda node: None) -> Any:
    """Planner, researchers in parallel (Send), a node without a call, writer, and a critic with a loop of one turn."""

    def agent(node: str) -> Any:
        def call(state: State) -> Any:
            fail(node)
            messages = [("system", INSTRUCTIONS.format(node=node)), ("user", f"Turn {len(state['said'])}.")]
            model.invoke(messages)
            return {"said": [node]}

        return call

    def fan_out(state: State) -> list[Send]:
        return [Send("researcher", {"said": []}) for _ in range(3)]

    def critic(state: State) -> Command[Literal["writer", "__end__"]]:
        agent("critic")(state)
        goto: Literal["writer", "__end__"] = "__end__" if "critic" in state["said"] else "writer"
        return Command(update={"said": ["critic"]}, goto=goto)

    builder = StateGraph(State)
    builder.add_node("planner", agent("planner"), retry_policy=RetryPolicy(initial_interval=0.01, max_attempts=2))
    builder.add_node("researcher", agent("researcher"))
    builder.add_node("merge", lambda state: {"said": []})
    builder.add_node("writer", agent("writer"))
    builder.add_node("critic", critic)
    builder.add_edge(START, "planner")
    builder.add_conditional_edges("planner", fan_out, ["researcher"])
    builder.add_edge("researcher", "merge")
    builder.add_edge("merge", "writer")
    builder.add_edge("writer", "critic")
    return builder.compile()


def chat_model(workflows: LangGraphWorkflows, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="tiny", base_url=workflows.base_url, api_key=SecretStr("none"), max_completion_tokens=2,
        http_client=workflows.http_client(), http_async_client=workflows.http_async_client(), **options,
    )  # fmt: skip


@pytest.fixture
def recorded(served, monkeypatch) -> list[tuple[Any, Any, Any]]:
    """Agent, workflow and session of each request that the engine is given."""
    calls: list[tuple[Any, Any, Any]] = []
    submit = served.client.submit

    def record(request: Any, *rest: Any) -> Any:
        calls.append((request.agent, request.workflow, request.session))
        return submit(request, *rest)

    monkeypatch.setattr(served.client, "submit", record)
    return calls


def names(calls: list[tuple[Any, Any, Any]]) -> list[str]:
    return [agent for agent, _, _ in calls]


ONE_RUN = ["planner", *["researcher"] * 3, "writer", "critic", "writer", "critic"]


def test_a_graph_is_declared_and_all_its_calls_are_counted_in_it(served, recorded):
    with LangGraphWorkflows(served.url) as workflows:
        graph = workflows.declare(team(chat_model(workflows)), "report", without=["merge"])
        workflow = served.system.graph["report"]
        assert {(e.source, e.target, e.probability) for e in workflow.edges()} == {
            ("planner", "researcher", 1.0), ("researcher", "writer", 1.0), ("writer", "critic", 1.0),
            ("critic", "writer", 0.5), ("critic", "planner", 0.5),
        }  # fmt: skip
        assert graph.invoke({"said": []})["said"] == ONE_RUN
        served.until(lambda: served.unfinished() == 0)
        assert recorded == [(node, "report", None) for node in ONE_RUN]
        assert workflow.accuracy == 1.0 and served.system.graph["report"] is workflow
        assert {str(agent) for agent in served.system.tiers.agents()} == {*ONE_RUN}
    assert "report" not in served.system.graph


def test_async_runs_are_named_by_their_threads(served, recorded):
    workflows = LangGraphWorkflows(served.url)

    async def answer(model: ChatOpenAI, node: str) -> None:
        await model.ainvoke([("system", INSTRUCTIONS.format(node=node)), ("user", "Go.")])

    def compiled() -> Any:
        model = chat_model(workflows)
        chain = ChatPromptTemplate.from_messages([("system", INSTRUCTIONS), ("user", "Go.")]) | model

        async def first(state: State) -> dict[str, Any]:
            await asyncio.gather(answer(model, "first"), answer(model, "first"))
            return {"said": ["first"]}

        async def second(state: State) -> dict[str, Any]:
            await chain.ainvoke({"node": "second"})
            return {"said": ["second"]}

        builder = StateGraph(State).add_node("first", first).add_node("second", second)
        return builder.add_edge(START, "first").add_edge("first", "second").compile()

    graph = workflows.declare(compiled(), "pair")

    async def runs() -> None:
        threads = [{"configurable": {"thread_id": f"talk-{i}"}} for i in range(2)]
        await asyncio.gather(*(graph.ainvoke({"said": []}, thread) for thread in threads))

    asyncio.run(runs())
    assert sorted(recorded) == sorted(
        (node, "pair", f"talk-{i}") for i in range(2) for node in ("first", "first", "second")
    )


def test_retries_of_nodes_and_plain_clients_are_named(served, recorded):
    workflows, failures = LangGraphWorkflows(served.url), iter([True])

    def fail(node: str) -> None:
        if node == "planner":
            plain = OpenAI(base_url=served.url, api_key="none", http_client=workflows.http_client())
            plain.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "?"}], max_tokens=1)
            if next(failures, False):
                raise ConnectionError("once")

    graph = workflows.declare(team(chat_model(workflows), fail), "report", without=["merge"])
    graph.invoke({"said": []})
    assert names(recorded) == ["planner", "planner", *ONE_RUN]
    chat_model(workflows).invoke("outside of any run")
    assert recorded[-1][1:] == (None, None)


def test_tools_and_subgraphs(served, recorded):
    workflows = LangGraphWorkflows(served.url)
    model = chat_model(workflows)

    @tool
    def ask(question: str) -> str:
        """Asks the model."""
        return str(model.invoke(question).content)

    def call(state: Any) -> Any:
        model.invoke([("user", "Go.")])
        return {"said": ["call"]}

    class Inner(State):
        messages: Annotated[list[Any], operator.add]

    def choose(state: Any) -> Any:
        from langchain_core.messages import AIMessage

        calls: Any = [{"name": "ask", "args": {"question": "Who?"}, "id": "1"}]
        return {"messages": [AIMessage("", tool_calls=calls)]}

    inner = StateGraph(Inner).add_node("choose", choose).add_node("tools", ToolNode([ask])).add_node("answer", call)
    inner.add_edge(START, "choose").add_edge("choose", "tools").add_edge("tools", "answer").add_edge("answer", END)
    outer = StateGraph(Inner).add_node("helper", inner.compile()).add_node("close", call)
    outer.add_edge(START, "helper").add_edge("helper", "close")
    graph = workflows.declare(outer.compile(), "nested", repeats=False)
    workflow = served.system.graph["nested"]
    assert sorted((e.source, e.target) for e in workflow.edges()) == [
        ("helper:answer", "close"), ("helper:choose", "helper:answer"),
    ]  # fmt: skip
    graph.invoke({"said": [], "messages": []})
    assert names(recorded) == ["helper:tools", "helper:answer", "close"]
    with pytest.raises(ValueError, match="got 'choose' as an agent to leave out; accepted: close, helper:choose,"):
        workflows.declare(outer.compile(), "nested", without=["choose"])


def test_a_tool_node_can_be_an_agent(served):
    builder = StateGraph(State).add_node("tools", ToolNode([])).add_node("a", lambda state: state)
    builder.add_edge(START, "tools").add_edge("tools", "a")
    workflows = LangGraphWorkflows(served.url)
    for without, agents in ((None, ["a"]), ([], ["a", "tools"])):
        workflows.declare(builder.compile(), "with tools", without)
        assert sorted(served.system.graph["with tools"].ids) == agents


def test_names_that_headers_cannot_carry(served, recorded):
    workflows = LangGraphWorkflows(served.url)
    model = chat_model(workflows)

    def call(state: State) -> Any:
        model.invoke("Go.")
        return {"said": ["x"]}

    long = "ж" * 200
    builder = StateGraph(State).add_node("пла́н", call).add_node(long, call).add_node(" x%", call)
    builder.add_edge(START, "пла́н").add_edge("пла́н", long).add_edge(long, " x%")
    graph = workflows.declare(builder.compile(), "Bericht für alle: " + "w" * 200)
    thread: Any = {"configurable": {"thread_id": "t" * 300}}
    graph.invoke({"said": []}, thread)
    (workflow,) = [each for each in served.system.graph if each.name != "learned"]
    assert [*workflow.ids] == names(recorded) and len(recorded) == 3
    assert all(len(each) <= 256 and each.isascii() for call in recorded for each in call)
    assert workflow.name == recorded[0][1] and len(workflow.name) == MAX_WORKFLOW_NAME
    assert name_on_the_wire("a b:c") == "a b:c" != name_on_the_wire("a%20b:c")


def test_undeclared_ways_are_warned_of(served):
    workflows = LangGraphWorkflows(served.url)
    builder = StateGraph(State).add_node("a", lambda state: Command(goto="b")).add_node("b", lambda state: state)
    builder.add_edge(START, "a")
    with pytest.warns(UserWarning, match=r"the successors of 'a' are unknown and no declared edge leads to 'b'"):
        workflows.declare(builder.compile(), "ways")


class OtherServer(BaseHTTPRequestHandler):
    """An OpenAI server that knows no workflows."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(404)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = (
            b'{"id": "1", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [{"index": 0, '
            b'"finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}]}'
        )
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_other_servers_answer_after_one_warning(caplog):
    server = ThreadingHTTPServer(("127.0.0.1", 0), OtherServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        workflows = LangGraphWorkflows(url, config=WorkflowClientConfig(refresh_s=0.01))
        with caplog.at_level(logging.WARNING), warnings.catch_warnings():
            warnings.simplefilter("error")
            graph = workflows.declare(team(chat_model(workflows)), "report", without=["merge"])
            assert graph.invoke({"said": []})["said"] == ONE_RUN
            workflows.close()
        (record,) = caplog.records
        assert record.getMessage() == (
            f"the workflow 'report' is not known to {url} (status 404): calls are answered without its predictions, "
            "and it is declared again every 0.01 s"
        )
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_is_started_later_gets_the_workflow(serve, caplog, monkeypatch):
    served = serve()
    monkeypatch.setattr(workflow_client.urllib.request, "urlopen", refuse := Refusing())
    workflows = LangGraphWorkflows(served.url, config=WorkflowClientConfig(refresh_s=0.05))
    graph = workflows.declare(team(chat_model(workflows)), "report", without=["merge"])
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "refused" in caplog.text
    assert "report" not in served.system.graph
    monkeypatch.undo()
    time.sleep(0.05)
    graph.invoke({"said": []})
    served.until(lambda: "report" in served.system.graph)
    assert refuse.calls == 1 and len(caplog.records) == 1


class Refusing:
    """Stands for `urlopen` while the server is down."""

    calls = 0

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.calls += 1
        raise OSError("connection refused")


def test_calls_to_other_addresses_are_not_named(served, recorded):
    workflows = LangGraphWorkflows("http://localhost:1/v1")
    plain = OpenAI(base_url=served.url, api_key="none", http_client=workflows.http_client())
    with workflows.session("talk"):
        plain.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "?"}], max_tokens=1)
        assert recorded[-1][2] is None
        named = LangGraphWorkflows(served.url)
        with named.session("talk"):
            client = OpenAI(base_url=served.url, api_key="none", http_client=named.http_client())
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "?"}], max_tokens=1)
    assert recorded[-1][2] == "talk"
    for wrong in ("127.0.0.1:8000", "file:///etc/passwd", "http:///v1"):
        with pytest.raises(ValueError, match=r"as base_url; accepted: such as http://127\.0\.0\.1:8000/v1"):
            LangGraphWorkflows(wrong)


def test_the_headers_are_those_that_the_server_reads():
    sent = {workflow_client.AGENT_HEADER, workflow_client.WORKFLOW_HEADER, workflow_client.SESSION_HEADER}
    assert {name.lower() for name in sent} <= {name for read in HEADERS.values() for name in read}
