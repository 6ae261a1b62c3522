"""The step graph against a mirror that applies the definition of steps to plain sets."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.serving import VirtualClock
from tenure.serving.workflow.graph import StepGraph
from tenure.serving.workflow.graph_config import (
    DurationConfig,
    GraphConfig,
    MarkovConfig,
    ReuseConfig,
    TransitionConfig,
)
from tenure.serving.workflow.markov import LearnedTransitions
from tenure.serving.workflow.spec import AgentSpec, EdgeSpec, WorkflowSpec

HORIZON = 8
MAX_AGE = GraphConfig.max_age
AGENTS = [f"a{i}" for i in range(7)]


class Mirror:
    """One workflow, solved by brute force."""

    def __init__(self) -> None:
        self.joins: dict[str, Any] = {}
        self.edges: dict[tuple[str, str], float] = {}
        self.running: list[str] = []
        self.expected: set[str] = set()
        self.pending: dict[tuple[str, str], bool] = {}  # whether it is one of several branches that are still open
        self.valid: dict[tuple[str, str], float] = {}  # of pending predictions, after unpredicted calls

    def start(self, agent: str) -> None:
        if agent not in self.expected and all(t != agent for _, t in self.pending):
            kept = 1 - 1 / max(1, len({s for s, _ in self.pending}))
            self.valid = {mark: self.valid.get(mark, 1.0) * kept for mark in self.pending}
            self.pending = {mark: open_ for mark, open_ in self.pending.items() if self.valid[mark] >= 0.1}
        for source in [s for s, t in self.pending if t == agent]:
            if self.pending.pop((source, agent)):
                self.pending = {m: u for m, u in self.pending.items() if m[0] != source or self.edges[m] == 1}
        self.expected.discard(agent)
        self.running.append(agent)

    def finish(self, agent: str, chose: list[str] | None) -> None:
        self.running.remove(agent)
        for edge, probability in self.edges.items():
            if edge[0] == agent and (chose is None or edge[1] in chose):
                self.pending[edge] = chose is None and probability < 1
                self.valid[edge] = 1.0

    def retry(self, agent: str) -> None:
        if agent in self.running:
            self.running.remove(agent)
        self.pending = {mark: open_ for mark, open_ in self.pending.items() if mark[0] != agent}
        self.expected.add(agent)

    def remove(self, agent: str) -> None:
        del self.joins[agent]
        self.edges = {edge: p for edge, p in self.edges.items() if agent not in edge}
        self.pending = {mark: open_ for mark, open_ in self.pending.items() if agent not in mark}
        self.expected.discard(agent)
        self.running = [other for other in self.running if other != agent]

    def _join(self, steps: dict[str, float], agent: str) -> float:
        ways = [0.0 if (s, t) in self.pending else steps[s] + 1 for s, t in self.edges if t == agent]
        join = (max if self.joins[agent] == "and" else min)(ways, default=math.inf)
        return join if join <= HORIZON else math.inf

    def solve(self) -> tuple[dict[str, float], dict[str, float]]:
        """Steps, and steps to the next call."""
        now = {agent: 0.0 for agent in self.joins if agent in self.running or agent in self.expected}
        steps = {agent: now.get(agent, math.inf) for agent in self.joins}
        for _ in range(HORIZON + 2):
            steps = {agent: now.get(agent, self._join(steps, agent)) for agent in self.joins}
        after = {
            agent: self._join(steps, agent) if agent in self.running and agent not in self.expected else steps[agent]
            for agent in self.joins
        }
        return steps, after


def _act(graph: StepGraph, mirrors: dict[str, Mirror], choose: random.Random) -> None:
    """The same random change to both."""
    if len(mirrors) < 2 or (choose.random() < 0.05 and len(mirrors) < 4):
        name = f"w{choose.randrange(10**9)}"
        mirror = mirrors[name] = Mirror()
        mirror.joins = {agent: choose.choice(["or", "or", "and"]) for agent in choose.sample(AGENTS, 5)}
        pairs = [(source, target) for source in mirror.joins for target in mirror.joins]
        mirror.edges = {edge: choose.choice([1.0, 0.5]) for edge in choose.sample(pairs, choose.randint(5, 12))}
        mirror.expected = {choose.choice(AGENTS)} & set(mirror.joins)
        agents = [AgentSpec(agent, join) for agent, join in mirror.joins.items()]
        edges = [EdgeSpec(*edge, probability) for edge, probability in mirror.edges.items()]
        graph.add_workflow(WorkflowSpec(name, agents, edges, sorted(mirror.expected)))
        return
    name = choose.choice(sorted(mirrors))
    mirror, flow = mirrors[name], graph[name]
    agents, edges = sorted(mirror.joins), sorted(mirror.edges)
    kind = choose.choice(
        [
            "agent",
            "edge",
            "edge",
            "cut",
            *["start"] * 3,
            *["finish"] * 4,
            "expect",
            "retry",
            "remove",
            "join",
            "workflow",
        ]
    )
    if kind == "agent":
        new = choose.choice(AGENTS)
        if new not in agents:
            mirror.joins[new] = choose.choice(["or", "or", "and"])
            flow.add_agent(AgentSpec(new, mirror.joins[new]))
    elif kind == "workflow" and choose.random() < 0.2:
        graph.remove_workflow(name)
        del mirrors[name]
    elif kind == "cut" and edges:
        edge = choose.choice(edges)
        flow.remove_edge(*edge)
        del mirror.edges[edge]
        mirror.pending.pop(edge, None)
    elif not agents:
        return
    elif kind == "edge":
        edge, probability = (choose.choice(agents), choose.choice(agents)), choose.choice([1.0, 0.5])
        flow.add_edge(*edge, probability)
        mirror.edges[edge] = probability
    elif kind == "finish" and mirror.running:
        agent = choose.choice(mirror.running)
        successors = [t for s, t in edges if s == agent]
        chose = choose.choice([None, [s for s in successors if choose.random() < 0.5]])
        flow.finish(agent, _calls(flow, agent)[-1], chose=chose)
        mirror.finish(agent, chose)
    else:
        agent = choose.choice(agents)
        if kind == "start":
            flow.start(agent, choose.random())
            mirror.start(agent)
        elif kind == "expect":
            flow.expect(agent)
            mirror.expected.add(agent)
        elif kind == "retry":
            flow.retry(agent)
            mirror.retry(agent)
        elif kind == "remove":
            flow.remove_agent(agent)
            mirror.remove(agent)
        elif kind == "join":
            mirror.joins[agent] = choose.choice(["or", "and"])
            flow.set_join(agent, mirror.joins[agent])


def _calls(flow, agent: str) -> list:
    return list(flow.running[flow.ids[agent]])


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), actions=st.integers(5, 80))
def test_steps_are_those_of_brute_force(seed, actions):
    """Agents, edges, joins, cycles, unreachable inputs, shared agents; adding, removing, finishing and retrying."""
    choose = random.Random(seed)
    graph, mirrors = StepGraph(lambda: 0.0, GraphConfig(horizon=HORIZON)), {}
    known: dict[str, float] = {}  # to a reader of `changed_steps`
    for _ in range(actions):
        _act(graph, mirrors, choose)
        if choose.random() < 0.4:
            continue
        solved = [mirror.solve() for mirror in mirrors.values()]
        for agent in AGENTS:
            assert graph.steps(agent) == min((s[agent] for s, _ in solved if agent in s), default=math.inf)
            assert graph.next_steps(agent) == min((s[agent] for _, s in solved if agent in s), default=math.inf)
        known |= {agent: graph.next_steps(agent) for agent in graph.changed_steps()}
        assert {a: s for a, s in known.items() if s < math.inf} == {
            agent: graph.next_steps(agent) for agent in AGENTS if graph.next_steps(agent) < math.inf
        }
    assert graph.agents == sum(len(mirror.joins) for mirror in mirrors.values())
    assert graph.edges == sum(len(mirror.edges) for mirror in mirrors.values())
    reach = {agent: graph.chance(agent) for agent in AGENTS}
    assert all(0 <= reuse <= chance <= 1 for chance, reuse in reach.values()), reach


def ring(count: int, name: str = "ring") -> WorkflowSpec:
    agents = [AgentSpec(f"a{i}") for i in range(count)]
    return WorkflowSpec(name, agents, [EdgeSpec(f"a{i}", f"a{(i + 1) % count}") for i in range(count)], ["a0"])


def test_a_ring_of_agents_takes_turns():
    graph = StepGraph()
    flow = graph.add_workflow(ring(5))
    flow.start("a0")
    assert [graph.next_steps(f"a{i}") for i in range(5)] == [5, 1, 2, 3, 4]
    assert graph.steps("a0") == 0
    flow.finish("a0")
    assert [graph.next_steps(f"a{i}") for i in range(5)] == [4 + 0, 0, 1, 2, 3]
    flow.start("a1")
    assert [graph.next_steps(f"a{i}") for i in range(5)] == [4, 5, 1, 2, 3]


def test_an_and_waits_for_all_and_counts_the_finished():
    agents = [AgentSpec("left"), AgentSpec("right"), AgentSpec("join", "and")]
    graph = StepGraph()
    flow = graph.add_workflow(WorkflowSpec("w", agents, [EdgeSpec("left", "join"), EdgeSpec("right", "join")]))
    flow.start("left")
    assert graph.steps("join") == math.inf  # nothing leads to `right`
    flow.expect("right")
    assert graph.steps("join") == 1
    flow.finish("left")
    flow.start("right")
    assert graph.steps("join") == 1
    flow.finish("right")
    assert graph.steps("join") == 0
    flow.start("join")
    assert graph.next_steps("join") == math.inf  # what it waited for is used up


def test_a_branch_that_is_not_taken_is_dropped():
    agents = [AgentSpec(name) for name in ("router", "tool", "answer", "log")]
    edges = [EdgeSpec("router", "tool", 0.5), EdgeSpec("router", "answer", 0.5), EdgeSpec("router", "log")]
    graph = StepGraph()
    flow = graph.add_workflow(WorkflowSpec("w", agents, edges))
    flow.start("router")
    flow.finish("router")
    assert [graph.steps(name) for name in ("tool", "answer", "log")] == [0, 0, 0]  # all candidates
    flow.start("tool")
    assert [graph.steps(name) for name in ("answer", "log")] == [math.inf, 0]
    flow.start("router")
    flow.finish("router", chose=["answer"])
    assert [graph.next_steps(name) for name in ("tool", "answer")] == [math.inf, 0]


def test_an_unpredicted_call_cancels_the_only_prediction():
    graph = StepGraph(lambda: 0.0)
    flow = graph.add_workflow(ring(4))
    for agent in ("a0", "a1"):
        flow.start(agent)
        flow.finish(agent)
    graph.changed_steps()
    assert flow.accuracy == 1
    flow.start("a0")  # not a2, which the edge predicted
    assert flow.next_steps("a2") == 2 and flow.next_steps("a1") == 1
    assert {"a1", "a2"} <= graph.changed_steps()
    assert flow.accuracy == pytest.approx(1 - 1 / 7)  # a1 was predicted; the prior counts as five correct predictions
    flow.finish("a0")
    flow.start("a1")
    assert 1 - 1 / 7 < flow.accuracy < 1


def test_active_workflows_without_events_are_reported_again():
    seconds = [0.0]
    graph = StepGraph(lambda: seconds[0], GraphConfig(discount_s=2.0))
    flow = graph.add_workflow(ring(3))
    other = graph.add_workflow(WorkflowSpec("other", [AgentSpec("b")], [], ["b"]))
    graph.add_workflow(WorkflowSpec("idle", [AgentSpec("c")], []))
    assert graph.changed_reuse() == {"a0", "a1", "a2", "b", "c"}
    flow.start("a0")
    assert graph.changed_reuse() == {"a0", "a1", "a2"}
    seconds[0] = 2.0 * MAX_AGE - 1
    assert graph.changed_reuse() == set()
    other.expect("b")
    assert graph.changed_reuse() == {"b"}
    seconds[0] = 2.0 * MAX_AGE
    assert graph.changed_reuse() == {"a0", "a1", "a2"} and graph.changed_reuse() == set()
    graph.remove_workflow("other")
    graph.changed_reuse()
    seconds[0] += 2.0 * MAX_AGE
    assert graph.changed_reuse() == {"a0", "a1", "a2"}
    flow.finish("a0", chose=())
    assert graph.changed_reuse() == {"a0", "a1", "a2"}
    seconds[0] += 100.0 * MAX_AGE
    assert graph.changed_reuse() == set(), "nothing is in progress"


def test_a_change_of_the_discount_is_reported_over_several_calls_events_first():
    seconds = [0.0]
    graph = StepGraph(lambda: seconds[0])
    flows = [
        graph.add_workflow(WorkflowSpec(f"w{n}", [AgentSpec(f"w{n}.{i}") for i in range(3)], []))
        for n in range(6)
    ]  # fmt: skip
    graph.changed_reuse()
    flows[0].start("w0.0")
    seconds[0] = 100.0
    flows[0].finish("w0.0", chose=[])
    flows[5].start("w5.1")
    before = graph.rate

    def names(*numbers: int) -> set[str]:
        return {f"w{n}.{i}" for n in numbers for i in range(3)}

    assert graph.changed_reuse(limit=4) == names(0, 5, 1, 2) and graph.has_due, "events, and whole workflows up to 4"
    assert graph.rate != before
    flows[4].start("w4.2")
    graph.remove_workflow("w3")
    assert graph.changed_reuse(limit=1) == names(3, 4) and not graph.has_due, "w4 is not due twice"
    assert graph.changed_reuse(limit=1) == set()


def test_the_phase_is_the_integral_of_the_discount():
    seconds = [10.0]
    graph = StepGraph(lambda: seconds[0])
    flow = graph.add_workflow(WorkflowSpec("w", [AgentSpec("a")], []))
    first = graph.rate
    start = graph.phase(10.0)
    flow.start("a")
    seconds[0] = 110.0
    flow.finish("a")
    assert graph.phase(110.0) - start == pytest.approx(100 * first)
    graph.changed_reuse()
    assert graph.rate != first and graph.phase(110.0) - start == pytest.approx(100 * first), "it does not jump"
    assert graph.phase(120.0) - start == pytest.approx(100 * first + 10 * graph.rate)


def test_an_unpredicted_call_lowers_the_validity_of_all_predictions():
    graph, names = StepGraph(lambda: 0.0), ["fork", "left", "right", "l", "r", "other"]
    edges = [EdgeSpec("fork", "left"), EdgeSpec("fork", "right"), EdgeSpec("left", "l"), EdgeSpec("right", "r")]
    flow = graph.add_workflow(WorkflowSpec("w", [AgentSpec(name) for name in names], edges))
    flow.start("fork")
    flow.finish("fork")
    for agent in ("left", "right"):
        flow.start(agent)
    for agent in ("left", "right"):
        flow.finish(agent)
    flow.start("other", 0)
    assert flow.next_steps("l") == flow.next_steps("r") == 0
    assert {flow.pending.validity(prediction) for prediction in flow.pending.values()} == {0.5}
    assert graph.reuse("l") == graph.reuse("r") < 0.5
    for call in (1, 2):
        flow.start("other", call)
    assert {flow.pending.validity(prediction) for prediction in flow.pending.values()} == {0.125} and 0 < graph.reuse(
        "l"
    ) < 0.125
    flow.start("other", 3)
    assert flow.next_steps("l") == flow.next_steps("r") == math.inf and not flow.pending
    flow.expect("l")
    flow.start("l")
    assert flow.accuracy == pytest.approx(7 / 11), "an expected call is no surprise"


def test_validity_does_not_degrade_over_thousands_of_calls():
    graph, names = StepGraph(lambda: 0.0), ["one", "two", "after one", "after two", "other"]
    edges = [EdgeSpec("one", "after one"), EdgeSpec("two", "after two")]
    flow = graph.add_workflow(WorkflowSpec("w", [AgentSpec(name) for name in names], edges))
    for call in range(3000):
        for agent in ("one", "two"):
            flow.expect(agent)
            flow.start(agent)
            flow.finish(agent)
        flow.start("other", call)
        assert {flow.pending.validity(prediction) for prediction in flow.pending.values()} == {0.5}, call


def test_a_retry_withdraws_the_answer():
    graph = StepGraph()
    flow = graph.add_workflow(ring(3))
    flow.start("a0")
    flow.finish("a0")
    assert graph.steps("a1") == 0
    flow.retry("a0")
    assert [graph.steps(f"a{i}") for i in range(3)] == [0, 1, 2]
    flow.start("a0")
    flow.retry("a0")  # a call in progress ends without an answer
    assert not flow.running
    assert graph.next_steps("a0") == 0


def test_shared_agents_take_the_minimum_over_workflows():
    graph = StepGraph()
    for name, first in (("one", "a0"), ("two", "a3")):
        graph.add_workflow(ring(5), name=name)
        graph[name].start("a0")
        if first == "a3":
            for i in range(3):
                graph[name].finish(f"a{i}")
                graph[name].start(f"a{i + 1}")
    assert [graph.next_steps(f"a{i}") for i in range(5)] == [2, 1, 2, 3, 1]
    graph.changed_steps()
    graph.remove_workflow("two")
    assert graph.changed_steps() == graph.changed_reuse() == {f"a{i}" for i in range(5)}
    assert [graph.next_steps(f"a{i}") for i in range(5)] == [5, 1, 2, 3, 4]


def test_only_workflows_with_an_event_are_reported():
    graph = StepGraph()
    for name in ("one", "two"):
        spec = ring(3, name)
        agents = [AgentSpec(f"{name}.{agent.name}") for agent in spec.agents]
        edges = [EdgeSpec(f"{name}.{edge.source}", f"{name}.{edge.target}") for edge in spec.edges]
        graph.add_workflow(WorkflowSpec(name, agents, edges))
    assert graph.changed_steps() == graph.changed_reuse() != set()
    graph["two"].start("two.a1")
    assert graph.changed_steps() == graph.changed_reuse() == {f"two.a{i}" for i in range(3)}
    assert graph.changed_steps() == graph.changed_reuse() == set()


def test_silent_workflows_expire():
    seconds = [0.0]
    graph = StepGraph(lambda: seconds[0])
    graph.add_workflow(ring(3, "old"))
    seconds[0] = 50.0
    graph.add_workflow(ring(3, "new"))
    graph.add_workflow(ring(3, "busy")).start("a0")
    seconds[0] = 70.0
    assert graph.expire(10.0) == ["old", "new"]
    assert "busy" in graph and "old" not in graph and len(graph) == 1
    assert graph.agents == graph.edges == 3


def test_silent_workflows_make_room_for_new_ones():
    seconds = [0.0]
    graph = StepGraph(lambda: seconds[0], GraphConfig(max_workflows=2))
    graph.add_workflow(ring(3, "silent"))
    graph.add_workflow("persistent").persistent = True
    seconds[0] = 3599.0
    with pytest.raises(ValueError, match="2 workflows are accepted in all"):
        graph.add_workflow(ring(3, "new"))
    seconds[0] = 3601.0
    graph.add_workflow(ring(3, "new"))
    assert {flow.name for flow in graph} == {"persistent", "new"}


def test_declarations_are_bounded():
    graph = StepGraph(config=GraphConfig(max_workflows=1, max_agents=3, max_edges=3))
    with pytest.raises(ValueError, match="the workflow 'ring' does not fit: 3 agents are accepted in all"):
        graph.add_workflow(ring(4))
    flow = graph.add_workflow(ring(3))
    with pytest.raises(ValueError, match="the workflow 'two' does not fit: 1 workflows are accepted in all"):
        graph.add_workflow("two")
    with pytest.raises(ValueError, match="the graph is full: 3 agents are accepted"):
        flow.add_agent("a3")
    with pytest.raises(ValueError, match="the graph is full: 3 edges are accepted"):
        flow.add_edge("a0", "a2")
    flow.remove_edge("a0", "a1")
    flow.add_edge("a0", "a2")
    with pytest.raises(ValueError, match="accepted: text of 1 to 256 characters"):
        flow.add_agent("x" * 257)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g["nobody"], "there is no workflow 'nobody'"),
        (lambda g: g.add_workflow("ring"), "there is a workflow 'ring' already"),
        (lambda g: g["ring"].start("z"), "the workflow 'ring' has no agent 'z'"),
        (lambda g: g["ring"].start(["a0"]), r"the workflow 'ring' has no agent \['a0'\]"),
        (lambda g: g["ring"].add_agent("a0"), "the workflow 'ring' has an agent 'a0' already"),
        (lambda g: g["ring"].finish("a0"), "'a0' has no call in progress in the workflow 'ring'"),
        (lambda g: g["ring"].finish("a0", "x"), "'a0' has no call 'x' in progress in the workflow 'ring'"),
        (lambda g: g["ring"].finish("a0", chose=["a2"]), "'a0' has no edge to 'a2' in the workflow 'ring'"),
        (lambda g: g["ring"].remove_edge("a0", "a2"), "the workflow 'ring' has no edge from 'a0' to 'a2'"),
        (lambda g: g["ring"].set_join("a0", "xor"), "got join='xor'; accepted: or or and"),
        (lambda g: g["ring"].add_edge("a0", "a1", 0), "got 0 as the probability of an edge; accepted"),
        (lambda g: g["ring"].add_edge("a0", "a1", math.nan), "got nan as the probability of an edge; accepted"),
        (lambda g: [g["ring"].start("a1", 7) for _ in "ab"], "the call 7 of 'a1' in the workflow 'ring' has started"),
        (lambda g: GraphConfig(horizon=0), "got 0 as horizon; accepted: a number above 0"),
        (lambda g: GraphConfig(discount_s=math.inf), "got inf as discount_s; accepted: a number above 0"),
    ],
)
def test_invalid_calls_are_refused(call, message):
    graph = StepGraph()
    graph.add_workflow(ring(3))
    with pytest.raises(ValueError, match=message):
        call(graph)
    assert graph.next_steps("a0") == 0  # a refusal changes nothing


@pytest.mark.parametrize(
    ("agents", "edges", "start", "message"),
    [
        (["a", "a"], [], [], "has the agent 'a' twice"),
        (["a"], [("a", "b")], [], "names 'b', which is none of its agents"),
        (["a"], [("a", "a"), ("a", "a")], [], "has the edge from 'a' to 'a' twice"),
        (["a"], [], ["b"], "starts at 'b', which is none of its agents"),
        (["", "a"], [], [], "got '' as agents..name; accepted: text of 1 to 256 characters"),
    ],
)
def test_invalid_specs_are_refused(agents, edges, start, message):
    with pytest.raises(ValueError, match=message):
        WorkflowSpec("w", [AgentSpec(name) for name in agents], [EdgeSpec(*edge) for edge in edges], start)


@pytest.mark.parametrize("kind", [DurationConfig, GraphConfig, MarkovConfig, ReuseConfig, TransitionConfig])
def test_tuned_numbers_are_checked(kind):
    """Every field with a number refuses 0, and only the horizon may be infinite."""
    for each in dataclasses.fields(kind):
        if isinstance(each.default, (int, float)):
            with pytest.raises(ValueError, match=f"got 0 as {each.name}; accepted: a "):
                kind(**{each.name: 0})
            if each.name != "horizon":
                with pytest.raises(ValueError, match=f"got inf as {each.name}; accepted: a "):
                    kind(**{each.name: math.inf})
    assert GraphConfig(horizon=math.inf).horizon == math.inf


def test_replacing_a_workflow_keeps_it_if_nothing_has_changed():
    graph = StepGraph()
    spec = WorkflowSpec("w", [AgentSpec("a"), AgentSpec("b")], [EdgeSpec("a", "b")], ["a"])
    assert graph.replace_workflow(spec, client="team")
    workflow = graph["w"]
    workflow.start("a")
    assert not graph.replace_workflow(spec, client="team") and graph["w"] is workflow
    assert workflow.running and not workflow.expected
    with pytest.raises(ValueError, match="is not this client's"):
        graph.replace_workflow(spec, client="other")
    assert not graph.replace_workflow(WorkflowSpec("w", [AgentSpec("a")]), client="team")
    assert graph["w"] is workflow and (graph.agents, graph.edges) == (1, 0)


def test_a_changed_workflow_keeps_the_state_of_what_it_still_has():
    clock = VirtualClock()
    graph = StepGraph(clock)
    edges = [EdgeSpec("a", "b", 0.5), EdgeSpec("a", "c", 0.5)]
    graph.add_workflow(WorkflowSpec("w", [AgentSpec(name) for name in "abc"], edges, ["a"]), client="team")
    workflow = graph["w"]
    workflow.start("a", 1)
    clock.advance_to(2.0)
    workflow.start("b", 2)
    workflow.finish("a", 1)
    more = WorkflowSpec(
        "w", [AgentSpec("a"), AgentSpec("b", "and", call_s=9.0), AgentSpec("d", call_s=7.0)],
        [EdgeSpec("a", "b", 0.5), EdgeSpec("b", "d")], ["d"],
    )  # fmt: skip
    assert not graph.replace_workflow(more, client="team") and graph["w"] is workflow
    assert set(workflow.ids) == {"a", "b", "d"} and {(e.source, e.target) for e in workflow.edges()} == {
        ("a", "b"), ("b", "d"),
    }  # fmt: skip
    assert (graph.agents, graph.edges) == (3, 2) and workflow.join("b") == "and"
    assert list(workflow.pending) == [(workflow.ids["a"], workflow.ids["b"])], "the call of a is remembered"
    assert workflow.running[workflow.ids["b"]] == {2: 2.0} and graph.next_steps("d") == 1
    assert not workflow.expected, "a workflow that runs has begun already"
    clock.advance_to(5.0)
    workflow.finish("b", 2)
    assert graph.next_steps("d") == 0 and workflow.graph_state.durations["b"].call.mean == 3.0
    assert workflow.graph_state.durations["d"].call.mean == 7.0
    fresh = StepGraph(clock)
    fresh.add_workflow(WorkflowSpec("w", [AgentSpec("a"), AgentSpec("b")], (), ["a"]))
    fresh.replace_workflow(WorkflowSpec("w", [AgentSpec("a", call_s=4.0), AgentSpec("b")], (), ["b"]))
    assert fresh.steps("a") == math.inf and fresh.steps("b") == 0
    assert fresh["w"].graph_state.durations["a"].call.mean == 4.0


def test_a_change_that_does_not_fit_changes_nothing():
    graph = StepGraph(config=GraphConfig(max_agents=4, max_edges=2, client_share=0.75))
    spec = WorkflowSpec("w", [AgentSpec("a"), AgentSpec("b")], [EdgeSpec("a", "b")])
    graph.add_workflow(spec, client="team")
    for more, message in (
        (WorkflowSpec("w", [AgentSpec(name) for name in "abcde"]), "4 agents are accepted in all"),
        (WorkflowSpec("w", [AgentSpec(name) for name in "abcd"]), "3 agents of one client are accepted"),
        (WorkflowSpec("w", spec.agents, [EdgeSpec("a", "b"), EdgeSpec("b", "a")]), "1 edges of one client"),
    ):
        with pytest.raises(ValueError, match=message):
            graph.replace_workflow(more, client="team")
        assert graph["w"].edges() == spec.edges and (graph.agents, graph.edges) == (2, 1)
    graph.add_workflow(WorkflowSpec("theirs", [AgentSpec("x")], [EdgeSpec("x", "x")]), client="other")


def test_learned_workflows_are_nobodys():
    graph = StepGraph()
    LearnedTransitions(graph)
    for call in (lambda: graph.remove_workflow("learned"), lambda: graph.replace_workflow(WorkflowSpec("learned", ()))):
        with pytest.raises(ValueError, match="accepted: a"):
            call()
