"""Real LangGraph graphs: what waits for all of its predecessors, and what runs after any of them."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send

from tenure.serving.workflow.graph import StepGraph
from tenure.serving.workflow.loaders import workflow_from_langgraph


class State(TypedDict):
    log: Annotated[list, operator.add]


def build(edges: str, conditional: dict[str, str] | None = None, waiting: str = "") -> Any:
    """A compiled graph of agents with names of one letter.

    Args:
        edges: plain ones, as `^a ab b$`, with ^ and $ for the start and the end.
        conditional: the branches of each router, of which the first is taken.
        waiting: `abc` is an edge into c that waits for a and b.
    """
    conditional = conditional or {}
    builder = StateGraph(State)
    names = {"^": START, "$": END}
    letters = "".join([edges, waiting, *conditional, *conditional.values()]).replace(" ", "")
    for letter in dict.fromkeys(letters):
        if names.setdefault(letter, letter) == letter:
            builder.add_node(letter, lambda state, letter=letter: {"log": [letter]})
    for source, target in edges.split():
        builder.add_edge(names[source], names[target])
    for router, branches in conditional.items():
        ends = [names[branch] for branch in branches]
        builder.add_conditional_edges(names[router], lambda state, ends=ends: ends[0], ends)
    for group in waiting.split():
        builder.add_edge(list(group[:-1]), group[-1])
    return builder.compile()


def joins(graph: Any) -> str:
    """The agents that are an AND."""
    return "".join(sorted(agent.name for agent in workflow_from_langgraph(graph).agents if agent.join == "and"))


def test_a_router_with_a_tool_loop_then_a_fork_that_is_waited_for():
    compiled = build("^r tr sa sb j$", {"r": "st$"}, "abj")
    spec = workflow_from_langgraph(compiled, "assistant")
    assert spec == workflow_from_langgraph(compiled.get_graph(), "assistant")
    assert joins(compiled) == "j"
    assert spec.start == ["r"]
    assert {e.target: e.probability for e in spec.edges if e.source == "r"} == {"s": 1 / 3, "t": 1 / 3}
    steps = StepGraph()
    steps.add_workflow(spec).start("r")
    assert {name: steps.next_steps(name) for name in "rtsabj"} == {"r": 2, "t": 1, "s": 1, "a": 2, "b": 2, "j": 3}


@pytest.mark.parametrize("compiled", [True, False])
def test_exclusive_branches_that_meet_do_not_wait_for_each_other(compiled):
    """The router asks search or math, either of which leads to the answer."""
    graph = build("^r sa ma a$", {"r": "sm"})
    assert graph.invoke({"log": []}) == {"log": ["r", "s", "a"]}
    steps = StepGraph()
    flow = steps.add_workflow(workflow_from_langgraph(graph if compiled else graph.get_graph()))
    flow.start("r")
    assert steps.next_steps("a") == 2
    flow.finish("r", chose=["s"])
    flow.start("s")
    assert steps.next_steps("a") == 1
    flow.finish("s")
    assert (steps.next_steps("a"), steps.reuse("a")) == (0, pytest.approx(1, abs=0.01))


@pytest.mark.parametrize(
    ("edges", "conditional", "expected"),
    [
        ("^s sa sb aj bj", {}, "j"),
        ("aj bj", {"^": "ab"}, ""),  # START is the router
        ("^r ac cj bj", {"r": "ab"}, ""),  # one branch is longer
        ("^r aj bj cj", {"r": "abc"}, ""),
        ("^r ac bc cj dj", {"r": "abd"}, ""),  # c runs after a or b, d instead of both
        ("^r as bj sc sd cj dj", {"r": "ab"}, ""),  # of a fork in one branch and the other branch
        ("^r aj rj", {"r": "a$"}, ""),  # a detour that may be left out
        ("^s sr sc aj cj", {"r": "a$"}, ""),  # one side of the fork may end early
        ("^s sr sc aj cj", {"r": "xy", "x": "a$", "y": "a$"}, ""),
        ("^r as ab sj bj", {"r": "a$"}, "j"),  # a fork within one branch
        ("^s sr sc am bm mj cj", {"r": "ab"}, "j"),  # a choice that both sides of the fork do not see
        ("^s sr sc tr oj cj", {"r": "to"}, "j"),  # an agent with tools on one side
        ("^s sr sc oj cj", {"r": "ro"}, "j"),  # one that repeats itself
        ("^s sr sc rx aj xj cj", {"r": "a$"}, ""),
        ("^i iw wc cw", {}, ""),  # a cycle: w does not wait for itself
    ],
)
def test_plain_edges_are_waited_for_where_all_of_their_sources_run(edges, conditional, expected):
    graph = build(edges, conditional)
    assert joins(graph) == expected
    assert joins(graph.get_graph()) == expected


@pytest.mark.parametrize(
    ("edges", "conditional", "waiting", "expected", "without_builder"),
    [
        ("^s sa sb", {}, "abj", "j", "j"),
        ("^r", {"r": "ab"}, "abj", "j", ""),  # a router may choose several branches
        ("^p pa pb", {"j": "p$"}, "abj", "j", ""),  # a round that begins anew
        ("^w wa wb", {}, "abw", "w", ""),  # the start does not wait
        ("^r pa pb dj", {"r": "pd"}, "abj", "", ""),  # d leads to j without a and b
        ("^s sa sb sc sd", {}, "abj cdj", "j", "j"),
        ("^r pa pb qc qd", {"r": "pq"}, "abj cdj", "", ""),  # either pair
    ],
)
def test_edges_that_wait(edges, conditional, waiting, expected, without_builder):
    graph = build(edges, conditional, waiting)
    assert joins(graph) == expected
    assert joins(graph.get_graph()) == without_builder


def test_a_cycle_that_is_waited_for_comes_round():
    """As LangGraph runs it: w starts, then a and b, then w again after both."""
    graph = build("^w wa wb", {}, "abw")
    events = graph.stream({"log": []}, {"recursion_limit": 9}, stream_mode="updates")
    rounds = [{name for event in [next(events)] for name in event} for _ in range(4)]
    assert [sorted(names) for names in rounds] == [["w"], ["a"], ["b"], ["w"]]
    steps = StepGraph()
    flow = steps.add_workflow(workflow_from_langgraph(graph))
    flow.start("w")
    flow.finish("w")
    for name in "ab":
        assert steps.next_steps("w") > 0
        flow.start(name)
        flow.finish(name)
    assert steps.next_steps("w") == 0


def graph_of(nodes: dict[str, Any], edges: str = "", **routers: tuple[Any, ...]) -> Any:
    """A compiled graph of functions; `edges` as in `build`, `routers` by node: a router and its path_map if it has."""
    builder = StateGraph(State)
    for name, function in nodes.items():
        builder.add_node(name, function)
    for source, target in edges.split():
        builder.add_edge({"^": START}.get(source, source), {"$": END}.get(target, target))
    for source, router in routers.items():
        builder.add_conditional_edges(source, *router)
    return builder.compile()


def plain(state: State) -> dict:
    return {"log": ["."]}


def to_b(state: State):
    return Command(goto="b", update={"log": ["a"]})


def to_b_or_end(state: State) -> Command[Literal["b", "__end__"]]:
    return Command(goto="b")


def to_b_or_nowhere(state: State) -> Command[Literal["b"]] | dict | None:
    return Command(goto="b")


def to_b_hidden(state: State):
    def choose():
        return Command(goto="b")

    return choose()


def send(state: State):
    return [Send("b", {"log": []}) for _ in range(3)]


def send_declared(state: State) -> list[Send] | Literal["b"]:
    return [Send("b", {"log": []}) for _ in range(3)]


def send_in_list(state: State) -> list[Literal["b", "c"]]:
    return ["b"]


class Router:
    def __call__(self, state: State) -> Sequence[Literal["b"]]:
        return ["b"]


class Boss:
    def decide(self, state: State):
        return Command(goto="b")


def edges_of(graph: Any) -> set[tuple[str, str, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {(e.source, e.target, e.probability) for e in workflow_from_langgraph(graph).edges}


@pytest.mark.parametrize(
    ("nodes", "edges", "routers", "expected"),
    [
        ({"a": to_b_or_end, "b": plain}, "^a b$", {}, {("a", "b", 0.5)}),
        ({"a": to_b_or_nowhere, "b": plain}, "^a b$", {}, {("a", "b", 1.0)}),  # LangGraph does not look into X | Y
        ({"a": to_b_or_end, "b": plain, "c": plain}, "^a ac b$ c$", {}, {("a", "b", 0.5), ("a", "c", 1.0)}),
        ({"a": plain, "b": plain, "c": plain}, "^a bc c$", {"a": (send, ["b"])}, {("a", "b", 1.0), ("b", "c", 1.0)}),
        ({"a": plain, "b": plain, "c": plain}, "^a bc c$", {"a": (send_declared,)}, {("a", "b", 1.0), ("b", "c", 1.0)}),
        ({"a": plain, "b": plain, "c": plain}, "^a", {"a": (send_in_list,)}, {("a", "b", 0.5), ("a", "c", 0.5)}),
        ({"a": plain, "b": plain}, "^a", {"a": (Router(),)}, {("a", "b", 1.0)}),
        ({"a": plain, "b": plain}, "^a", {"a": (lambda state: "x", {"x": "b", "y": "b"})}, {("a", "b", 1.0)}),
    ],
)  # fmt: skip
def test_declared_ways_of_commands_and_sends_are_edges(nodes, edges, routers, expected):
    graph = graph_of(nodes, edges, **routers)
    assert edges_of(graph) == expected
    assert graph.invoke({"log": []})["log"], "it runs"


@pytest.mark.parametrize("boss", [to_b, to_b_hidden, Boss().decide, functools.partial(to_b)])
def test_a_command_without_declared_destinations_is_warned_of(boss):
    """The edges behind the undeclared one are there, which LangGraph's drawing leaves out."""
    graph = graph_of({"a": boss, "b": plain, "c": plain}, "^a bc c$")
    with pytest.warns(
        UserWarning, match=r"in the LangGraph workflow 'team', the successors of 'a' are unknown"
    ) as seen:
        spec = workflow_from_langgraph(graph, "team")
    (message,) = [str(one.message) for one in seen]
    assert "and no declared edge leads to 'b', 'c': declare them by" in message and "\n" not in message
    assert "`-> Command[Literal[…]]`" in message and "`path_map` of add_conditional_edges" in message
    assert seen[0].filename == __file__
    assert [(edge.source, edge.target) for edge in spec.edges] == [("b", "c")]


def test_a_command_to_a_node_that_other_edges_reach_is_warned_of():
    graph = graph_of({"a": to_b, "b": plain}, "^a ^b a$ b$")
    with pytest.warns(UserWarning, match=r"the successors of 'a' are unknown: declare them by"):
        workflow_from_langgraph(graph)


def test_declared_destinations_need_no_annotation():
    builder = StateGraph(State)
    builder.add_node("a", to_b, destinations=("b",))
    builder.add_node("b", plain)
    builder.add_edge(START, "a")
    assert edges_of(builder.compile()) == {("a", "b", 1.0)}


def test_a_router_without_declared_ways_is_warned_of():
    graph = graph_of({"a": plain, "b": plain, "c": plain}, "^a bc c$", a=(send,))
    with pytest.warns(UserWarning, match=r"the successors of 'a' are unknown and no declared edge leads to 'b', 'c'"):
        spec = workflow_from_langgraph(graph)
    assert [(edge.source, edge.target) for edge in spec.edges] == [("b", "c")]
    with pytest.warns(UserWarning, match=r"'workflow', no declared edge leads to 'b', 'c': declare"):
        workflow_from_langgraph(graph.get_graph())


def test_graphs_without_commands_are_not_warned_of():
    assert edges_of(graph_of({"a": plain, "b": plain}, "^a ab b$")) == {("a", "b", 1.0)}
