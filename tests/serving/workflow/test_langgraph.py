"""Real LangGraph graphs: what waits for all of its predecessors, and what runs after any of them."""

from __future__ import annotations

import operator
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph

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
    for letter in dict.fromkeys("".join([edges, waiting, *conditional, *conditional.values()])):
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
