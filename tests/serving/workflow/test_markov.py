"""Transitions are learned from calls, forget old habits, and are used like a declared graph."""

from __future__ import annotations

import math
import random

import pytest

from tenure.serving.workflow.graph import StepGraph
from tenure.serving.workflow.graph_config import GraphConfig, MarkovConfig
from tenure.serving.workflow.markov import LearnedTransitions
from tenure.serving.workflow.spec import AgentSpec, EdgeSpec, WorkflowSpec

HABITS = {
    "plan": {"code": 0.7, "ask": 0.3},
    "code": {"test": 1.0},
    "test": {"code": 0.6, "plan": 0.4},
    "ask": {"plan": 1.0},
}


def walk(habits: dict[str, dict[str, float]], calls: int, first: str = "plan", seed: int = 0) -> list[str]:
    draws, agent, walked = random.Random(seed), first, []
    for _ in range(calls):
        walked.append(agent)
        agent = draws.choices(list(habits[agent]), list(habits[agent].values()))[0]
    return walked


def learner(**options: object) -> tuple[list[float], StepGraph, LearnedTransitions]:
    seconds = [0.0]
    graph = StepGraph(lambda: seconds[0], GraphConfig(discount_s=10.0))
    return seconds, graph, LearnedTransitions(graph, config=MarkovConfig(**options))  # type: ignore[arg-type]


def test_a_ring_is_learned_in_one_round():
    seconds, graph, learned = learner()
    agents = [f"a{i}" for i in range(10)]
    for agent in [*agents, *agents, "a0"]:
        learned.observe("session", agent)
        seconds[0] += 1.0
    assert [graph.next_steps(agent) for agent in agents] == [10, *range(1, 10)]
    values = [graph.reuse(agent) for agent in agents]
    assert values[1:] == sorted(values[1:], reverse=True)
    assert min(values) == values[0] > 0


def test_probabilities_come_near_the_true_ones():
    _, _, learned = learner(decay=0.998)
    for agent in walk(HABITS, 4000):
        learned.observe("session", agent)
    for agent, row in HABITS.items():
        for other in HABITS:
            assert learned.probability(agent, other) == pytest.approx(row.get(other, 0.0), abs=0.06)


def test_reuse_is_that_of_the_declared_graph():
    """Every call takes two seconds."""
    seconds, graph, learned = learner(decay=0.999, min_probability=0.001)
    for agent in walk(HABITS, 6000):
        seconds[0] += 2.0
        learned.observe("session", agent)
    learned.observe("session", "plan")
    agents = [AgentSpec(name, call_s=2.0, call_spread_s=0.0) for name in HABITS]
    edges = [EdgeSpec(source, target, p) for source, row in HABITS.items() for target, p in row.items()]
    declared = StepGraph(lambda: 0.0, GraphConfig(discount_s=10.0))
    declared.add_workflow(WorkflowSpec("declared", agents, edges)).start("plan")
    for agent in HABITS:
        assert graph.reuse(agent) == pytest.approx(declared.reuse(agent), abs=0.05)
        assert graph.next_steps(agent) == declared.next_steps(agent)


def test_old_habits_fade():
    _, graph, learned = learner(decay=0.9)
    for agent in ["a", "b"] * 50 + ["a", "c"] * 50:
        learned.observe("session", agent)
    assert learned.probability("a", "c") > 0.9
    assert learned.probability("a", "b") < 0.02
    learned.observe("session", "a")
    assert graph.steps("c") == 1
    assert graph.steps("b") == math.inf  # below min_probability: no edge is left


def test_sessions_are_told_apart():
    _, graph, learned = learner()
    for _ in range(10):
        for session, agents in (("one", "ab"), ("two", "xy")):
            for agent in agents:
                learned.observe(session, agent)
    assert learned.probability("b", "x") == 0.0
    assert graph.next_steps("a") == graph.next_steps("x") == 1
    learned.end("one")
    assert graph.next_steps("a") == math.inf
    assert graph.next_steps("x") == 1
    learned.end("nobody")


def test_an_end_is_a_habit_too():
    _, _, learned = learner(decay=1.0)
    for session in range(100):
        for agent in ("a", "b"):
            learned.observe(session, agent)
        learned.end(session)
    assert learned.probability("a", "b") == pytest.approx(1.0, abs=0.01)
    learned.observe("last", "b")
    learned.observe("last", "a")
    assert learned.probability("b", "a") == pytest.approx(0.01, abs=0.005)


def test_memory_is_bounded():
    _, graph, learned = learner(max_agents=20, max_successors=4, max_sessions=5)
    draws = random.Random(0)
    for _ in range(3000):
        learned.observe(f"s{draws.randrange(50)}", f"a{draws.randrange(200)}")
    assert graph.agents <= 20
    assert graph.edges <= 20 * 4
    assert sum(map(len, learned.workflow.running.values())) <= 5
    assert {learned.workflow.names[node] for node in learned.workflow.running} <= set(learned.workflow.ids)


def test_a_graph_without_room_for_edges_still_counts_calls():
    graph = StepGraph(config=GraphConfig(max_edges=1))
    learned = LearnedTransitions(graph)
    for agent in "abcabcabc":
        learned.observe("session", agent)
    assert graph.edges == 1
    assert learned.probability("b", "c") > 0.8
    assert graph.steps("c") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.0}, "got 0.0 as decay; accepted: a number above 0 and up to 1"),
        ({"max_agents": 1}, "got 1 as max_agents; accepted: a whole number of 2 or more"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        learner(**options)


def test_names_are_checked_before_anything_changes():
    _, graph, learned = learner()
    learned.observe("session", "a")
    with pytest.raises(ValueError, match="accepted: a string of 1 to 256 characters"):
        learned.observe("session", "")
    assert (graph.agents, graph.steps("a")) == (1, 0)
