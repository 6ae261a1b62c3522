"""Expected discounted reuse against the linear system where there is one, and against Monte Carlo everywhere."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.serving.workflow.durations import Duration
from tenure.serving.workflow.graph import StepGraph
from tenure.serving.workflow.graph_config import DurationConfig, GraphConfig, ReuseConfig, TransitionConfig
from tenure.serving.workflow.reuse_model import FirstPassage
from tenure.serving.workflow.spec import AgentSpec, EdgeSpec, WorkflowSpec

DISCOUNT_S = 10.0
MEMORY, PRIOR_WEIGHT = DurationConfig.memory, DurationConfig.prior_weight
RUNS = 3000
NOISE = 3.5 * 0.5 / math.sqrt(RUNS)  # of a mean of numbers from 0 to 1
Draw = Callable[[float, float, random.Random], float]


def shifted_exponential(mean: float, spread: float, draws: random.Random) -> float:
    """The law that `durations` describes."""
    return mean - spread + (draws.expovariate(1 / spread) if spread else 0.0)


def lognormal(mean: float, spread: float, draws: random.Random) -> float:
    variance = math.log(1 + (spread / mean) ** 2) if spread else 0.0
    return draws.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))


def next_calls(
    spec: WorkflowSpec, first: str, draws: random.Random, draw: Draw, elapsed: float = 0.0
) -> dict[str, float]:
    """One run of a workflow in which `first` has been running for `elapsed` seconds: when each agent starts next."""
    agents = {agent.name: agent for agent in spec.agents}
    out = {name: [edge for edge in spec.edges if edge.source == name] for name in agents}
    into = {name: [edge.source for edge in spec.edges if edge.target == name] for name in agents}
    arrived: dict[str, set[str]] = {name: set() for name in agents}
    starts: dict[str, float] = {}
    queue: list[tuple[float, int, str, str]] = []

    def call(name: str, now: float, elapsed: float = 0.0) -> None:
        agent = agents[name]
        seconds = -1.0
        while seconds < elapsed:
            seconds = draw(agent.call_s or 0.0, agent.call_spread_s or 0.0, draws)
        seconds += draw(agent.pause_s, agent.pause_spread_s or 0.0, draws) if agent.pause_s else 0.0
        taken = [edge for edge in out[name] if edge.probability == 1]
        choice = draws.random()
        for edge in (edge for edge in out[name] if edge.probability < 1):
            if choice < edge.probability:
                taken.append(edge)
                break
            choice -= edge.probability
        for edge in taken:
            heapq.heappush(queue, (now + seconds - elapsed, len(queue), edge.target, name))

    call(first, 0.0, elapsed)
    for _ in range(300):
        if not queue or queue[0][0] > 12 * DISCOUNT_S or len(starts) == len(agents):
            break
        now, _, name, source = heapq.heappop(queue)
        if agents[name].join == "and":
            arrived[name].add(source)
            if len(arrived[name]) < len(into[name]):
                continue
            arrived[name].clear()
        starts.setdefault(name, now)
        call(name, now)
    return starts


def sampled(spec: WorkflowSpec, first: str, draw: Draw = shifted_exponential, elapsed: float = 0.0) -> dict[str, float]:
    """Monte Carlo of E[exp(-T / DISCOUNT_S)] for every agent."""
    draws = random.Random(0)
    total = dict.fromkeys((agent.name for agent in spec.agents), 0.0)
    for _ in range(RUNS):
        for name, at in next_calls(spec, first, draws, draw, elapsed).items():
            total[name] += math.exp(-at / DISCOUNT_S)
    return {name: value / RUNS for name, value in total.items()}


SMALL = ReuseConfig(max_exact_targets=3)  # larger workflows are not solved exactly


def computed(
    spec: WorkflowSpec,
    first: str,
    elapsed: float = 0.0,
    reuse: ReuseConfig = ReuseConfig(),  # noqa: B008
) -> dict[str, float]:
    seconds = [0.0]
    graph = StepGraph(lambda: seconds[0], GraphConfig(discount_s=DISCOUNT_S, reuse=reuse))
    graph.add_workflow(spec).start(first)
    seconds[0] = elapsed
    return {agent.name: graph.reuse(agent.name) for agent in spec.agents}


def agents(*names: str, **fields: object) -> list[AgentSpec]:
    laws = [(2.0, 1.0), (3.0, 0.0), (1.0, 1.0), (4.0, 2.0), (0.5, 0.2)]
    return [AgentSpec(n, call_s=m, call_spread_s=s, **fields) for n, (m, s) in zip(names, laws * 3, strict=False)]  # type: ignore[arg-type]


BRANCHES = WorkflowSpec(
    "branches",
    [
        *agents("plan", "code", "test", "ask"),
        AgentSpec("done", call_s=1.0, call_spread_s=0.5, pause_s=3.0, pause_spread_s=2.0),
    ],
    [
        EdgeSpec("plan", "code", 0.7),
        EdgeSpec("plan", "ask", 0.3),
        EdgeSpec("ask", "plan", 0.9),
        EdgeSpec("code", "code", 0.2),
        EdgeSpec("code", "test", 0.8),
        EdgeSpec("test", "code", 0.5),
        EdgeSpec("test", "done", 0.4),
        EdgeSpec("done", "plan"),
    ],
)


def test_unpredicted_calls_are_modelled():
    """A ring and a branch whose edges are right in two of three calls; else any agent comes."""
    names = ["a", "b", "c", "d"]
    specs = agents(*names)
    edges = [
        EdgeSpec("a", "b", 0.5),
        EdgeSpec("a", "c", 0.5),
        EdgeSpec("b", "d"),
        EdgeSpec("c", "d"),
        EdgeSpec("d", "a"),
    ]
    accuracy, index = 2 / 3, {name: place for place, name in enumerate(names)}
    branches = [{index[e.target]: e.probability for e in edges if e.source == name} for name in names]
    legs = [Duration(a.call_s or 0.0, a.call_spread_s or 0.0).discount(1 / DISCOUNT_S) for a in specs]
    passage = FirstPassage(branches, [False] * 4, np.array(legs), accuracy)
    true = [EdgeSpec(e.source, e.target, accuracy * e.probability + (1 - accuracy) / 4) for e in edges]
    true += [
        EdgeSpec(source, target, (1 - accuracy) / 4)
        for source in names
        for target in names
        if (source, target) not in {(e.source, e.target) for e in edges}
    ]
    for name, value in sampled(WorkflowSpec("true", specs, true), "a").items():
        assert passage.after.reuse[0, index[name]] == pytest.approx(value, abs=NOISE), name
    assert (passage.after.reach == 1).all()
    began = np.stack([passage.from_start(agent).reuse for agent in range(4)])
    after_a = np.array([true[0].probability, true[1].probability])
    others = np.delete(began, [1, 2], 0).sum(0) * (1 - accuracy) / 4
    assert passage.from_end(0).reuse == pytest.approx(after_a @ began[1:3] + others)
    once, never = passage.from_end(0), passage.from_end(0, repeat_factor=0.0)
    assert once.reuse - never.reuse == pytest.approx(np.array([(1 - accuracy) / 4, 0, 0, 0])), "what it had of the rest"
    assert passage.from_end(0, repeat_factor=1e9).reach[0] == passage.from_end(0, repeat_factor=1e9).reuse[0] == 1.0
    assert (passage.from_end(0).reuse == once.reuse).all(), "rows are copies"


def test_observed_transitions_are_blended_with_edges():
    """The edge of `a` to b counts as eight calls, and c has followed in eight more."""
    branches = [{1: 1.0}, {0: 1.0}, {0: 1.0}]
    legs = np.full(3, 0.5)
    seen = FirstPassage(branches, [False] * 3, legs, 1.0, [{2: TransitionConfig.edge_weight}, {}, {}])
    told = FirstPassage([{1: 0.5, 2: 0.5}, {0: 1.0}, {0: 1.0}], [False] * 3, legs)
    assert seen.after.reuse == pytest.approx(told.after.reuse) and seen.after.reach == pytest.approx(told.after.reach)


def test_a_workflow_learns_how_often_its_edges_are_right():
    seconds, draws = [0.0], random.Random(1)
    names = [f"a{i}" for i in range(6)]
    graph = StepGraph(lambda: seconds[0], GraphConfig(discount_s=1.0))
    edges = [EdgeSpec(s, t) for s, t in zip(names, names[1:] + names[:1], strict=True)]
    specs = [AgentSpec(name, call_s=1.0, call_spread_s=0.0) for name in names]
    flow = graph.add_workflow(WorkflowSpec("ring", specs, edges))
    at, wrong = 0, 0
    for _ in range(400):
        flow.start(names[at])
        seconds[0] += 1
        flow.finish(names[at])
        surprise = draws.random() < 0.5
        wrong += surprise
        at = draws.choice([n for n in range(6) if n != (at + 1) % 6]) if surprise else (at + 1) % 6
    assert abs(flow.accuracy - (1 - wrong / 400)) < 0.2
    flow.start(names[at])
    value = [graph.reuse(names[(at + step) % 6]) for step in range(6)]
    assert 0.5 * math.exp(-1) < value[1] < 0.8 * math.exp(-1) and 0 < max(value[2:]) < value[1] / 2
    for _ in range(200):
        seconds[0] += 1
        flow.finish(names[at])
        at = (at + 1) % 6
        flow.start(names[at])
    assert flow.accuracy > 0.97 and graph.reuse(names[(at + 1) % 6]) == pytest.approx(math.exp(-1), abs=0.05)


@pytest.mark.parametrize("pause", [0.0, 2.0])
def test_the_agent_just_called_is_worth_less_if_there_is_time_to_load_another(pause: float):
    seconds, draws = [0.0], random.Random(3)
    names = [f"a{i}" for i in range(6)]
    graph = StepGraph(lambda: seconds[0], GraphConfig(discount_s=1.0))
    edges = [EdgeSpec(s, t) for s, t in zip(names, names[1:] + names[:1], strict=True)]
    specs = [AgentSpec(name, call_s=1.0, call_spread_s=0.0, pause_s=pause, pause_spread_s=0.0) for name in names]
    flow = graph.add_workflow(WorkflowSpec("ring", specs, edges))
    at, at_end, value = 0, 0, {}
    for _ in range(60):  # any agent but the same
        flow.start(names[at])
        seconds[0] += 1
        flow.finish(names[at])
        value = {name: graph.reuse(name) for name in names}
        at_end, at = at, draws.choice([n for n in range(6) if n != at])
        seconds[0] += pause
    others = [value[name] for name in names if name not in (names[at_end], names[(at_end + 1) % 6])]
    assert (value[names[at_end]] < 0.8 * min(others)) == (pause > 0)


@pytest.mark.parametrize("habit", [True, False])
def test_repeated_unpredicted_calls_become_a_habit(habit):
    """Half of the calls of a ring of eight go elsewhere: for each agent to the same one, or anywhere."""
    seconds, draws, names = [0.0], random.Random(2), [f"a{i}" for i in range(8)]
    graph = StepGraph(lambda: seconds[0], GraphConfig(discount_s=1.0))
    edges = [EdgeSpec(s, t) for s, t in zip(names, names[1:] + names[:1], strict=True)]
    specs = [AgentSpec(name, call_s=1.0, call_spread_s=0.0) for name in names]
    flow = graph.add_workflow(WorkflowSpec("ring", specs, edges))
    at = 0
    for _ in range(240):
        flow.start(names[at])
        seconds[0] += 1
        flow.finish(names[at])
        instead = (at + 4) % 8 if habit else draws.choice([n for n in range(8) if n != at])
        at = instead if draws.random() < 0.5 else (at + 1) % 8
    flow.start(names[at])
    value = [graph.reuse(names[(at + step) % 8]) for step in range(8)]
    others = [value[step] for step in (2, 3, 5, 6, 7)]
    assert graph.is_observed_successor(names[(at + 1) % 8])
    if habit:
        assert value[4] > 2 * max(others) and value[4] == pytest.approx(value[1], rel=0.5)
        assert graph.is_observed_successor(names[(at + 4) % 8]) and not any(
            graph.is_observed_successor(names[(at + n) % 8]) for n in (2, 3, 5, 6)
        )
    else:
        assert value[1] > 2 * value[4]
    flow.remove_agent(names[(at + 4) % 8])
    flow.add_agent("new")
    assert not flow.is_observed_successor("new"), "what was learned of an agent goes with it"


def test_an_agent_without_observations_has_the_durations_of_all():
    """Where its durations were not declared."""
    seconds = [0.0]
    graph = StepGraph(lambda: seconds[0], GraphConfig(discount_s=DISCOUNT_S))
    told = AgentSpec("told", call_s=7.0, call_spread_s=0.0, pause_s=0.0)
    specs = [AgentSpec("a"), AgentSpec("b"), told, AgentSpec("c")]
    flow = graph.add_workflow(WorkflowSpec("w", specs, [EdgeSpec(s.name, t.name) for s, t in pairwise(specs)], ["a"]))
    flow.start("a")
    assert graph.seconds("told") == pytest.approx(2 * DISCOUNT_S * math.log(1.5), rel=1e-6), "two guesses of 5 s"
    for _ in range(20):
        seconds[0] += 1.0
        flow.finish("a", chose=[])
        flow.start("a")
    assert graph.seconds("told") == pytest.approx(2.0, rel=0.1)
    assert graph.seconds("c") - graph.seconds("told") == pytest.approx(7.0, rel=0.01)


def test_the_discount_follows_what_steps_take():
    seconds = [0.0]
    graph = StepGraph(lambda: seconds[0], GraphConfig(default_call_s=5.0))
    flow = graph.add_workflow(WorkflowSpec("w", agents("a", "b"), [EdgeSpec("a", "b"), EdgeSpec("b", "a")]))
    other = graph.add_workflow(WorkflowSpec("other", agents("c"), []))
    assert graph.rate == 1 / 2.0
    graph.changed_reuse()
    for agent in ["a", "b"] * 10:
        flow.start(agent)
        seconds[0] += 10
        flow.finish(agent)
        seconds[0] += 20
    assert graph.rate == 1 / 2.0, "it changes where it is reported"
    assert graph.changed_reuse() == {"a", "b", "c"} and other
    assert graph.rate == pytest.approx(1 / 12)
    flow.start("a")
    assert graph.changed_reuse() == {"a", "b"}
    assert graph.seconds("b") == pytest.approx(30, rel=0.1)


def test_a_far_call_is_worth_a_reload():
    names = [f"a{i}" for i in range(10)]
    graph = StepGraph(lambda: 0.0, GraphConfig(discount_s=0.4))
    edges = [EdgeSpec(s, t) for s, t in zip(names, names[1:] + names[:1], strict=True)]
    specs = [AgentSpec(name, call_s=1.0, call_spread_s=0.0) for name in names]
    graph.add_workflow(WorkflowSpec("ring", [*specs, AgentSpec("never")], edges)).start("a0")
    worth = [graph.retention_value(name) for name in [*names[1:], "a0"]]
    assert worth == sorted(worth, reverse=True) and graph.retention_value("never") == 0.0
    assert worth[0] == pytest.approx(graph.reuse("a1"), rel=0.02)
    assert worth[-1] == pytest.approx(0.001 * math.exp(-10 / 6.4), rel=0.01)
    assert graph.reuse("a0") < 1e-4 * worth[-1]


def test_small_chances_are_told_apart_in_forks():
    """Rounds go on until the smallest chance stands still, not only the largest."""
    names = [f"a{i}" for i in range(12)]
    edges = [EdgeSpec(s, t) for s, t in pairwise(names)] + [EdgeSpec("a0", "side"), EdgeSpec(names[-1], "a0")]
    specs = [AgentSpec(name, call_s=5.0, call_spread_s=0.0) for name in [*names, "side"]]
    graph = StepGraph(lambda: 0.0, GraphConfig(discount_s=2.0))
    graph.add_workflow(WorkflowSpec("w", specs, edges)).start("a0")
    for number in range(1, 12):
        assert graph.reuse(f"a{number}") == pytest.approx(math.exp(-2.5 * number), rel=1e-4)


@pytest.mark.parametrize("first", ["plan", "test", "done"])
def test_branches_and_loops_are_exact(first):
    """Retries, a self loop, a pause for a tool and a branch that leads nowhere."""
    for name, value in sampled(BRANCHES, first).items():
        assert computed(BRANCHES, first)[name] == pytest.approx(value, abs=NOISE), name


def test_what_is_left_of_a_running_call_is_exact():
    assert computed(BRANCHES, "plan", elapsed=1.5) != computed(BRANCHES, "plan")
    for name, value in sampled(BRANCHES, "plan", elapsed=1.5).items():
        assert computed(BRANCHES, "plan", elapsed=1.5)[name] == pytest.approx(value, abs=NOISE), name


def test_another_law_of_durations_matters_little():
    """Lognormal calls of the same means and spreads."""
    for name, value in sampled(BRANCHES, "plan", lognormal).items():
        assert computed(BRANCHES, "plan")[name] == pytest.approx(value, abs=NOISE + 0.01), name


def fork(join: Any) -> WorkflowSpec:
    """Two ways of unequal length that meet, the shorter of which may be retried, and a way back."""
    workers = agents("plan", "left", "right", "more")
    names = [
        ("plan", "left"),
        ("plan", "right"),
        ("left", "more"),
        ("more", "meet"),
        ("right", "meet"),
        ("meet", "plan"),
    ]
    edges = [EdgeSpec(*pair) for pair in names if pair != ("right", "meet")]
    edges += [EdgeSpec("right", "meet", 0.6), EdgeSpec("right", "right", 0.4)]
    return WorkflowSpec(join, [*workers, AgentSpec("meet", join, call_s=2.0, call_spread_s=1.0)], edges)


def test_an_and_join_is_never_below_and_close():
    spec = fork("and")
    values = computed(spec, "plan")
    for name, value in sampled(spec, "plan").items():
        assert value - NOISE <= values[name] <= value + NOISE + 0.02, name


def test_the_first_of_several_ways_is_never_above_and_close():
    spec = fork("or")
    values = computed(spec, "plan")
    for name, value in sampled(spec, "plan").items():
        assert value - NOISE - 0.02 <= values[name] <= value + NOISE, name


def test_the_limit_of_and_joins_is_known():
    """Two equal exponential calls: the later one is worth 1/(1 + γm) · 1/(1 + γm/2), and is taken for one of them."""
    workers = [AgentSpec(name, call_s=4.0, call_spread_s=4.0) for name in ("left", "right")]
    plan = AgentSpec("plan", call_s=0.0, call_spread_s=0.0)
    edges = [EdgeSpec(*pair) for pair in (("plan", "left"), ("plan", "right"), ("left", "meet"), ("right", "meet"))]
    spec = WorkflowSpec("limit", [plan, *workers, AgentSpec("meet", "and", call_s=1.0)], edges)
    assert sampled(spec, "plan")["meet"] == pytest.approx(1 / 1.4 / 1.2, abs=NOISE)
    assert computed(spec, "plan")["meet"] == pytest.approx(1 / 1.4, abs=1e-4)


def test_sure_durations_make_forks_and_joins_exact():
    spec = fork("and")
    sure = [AgentSpec(agent.name, agent.join, agent.call_s, 0.0) for agent in spec.agents]
    spec = WorkflowSpec(
        "sure", sure, [edge for edge in spec.edges if edge.source != "right"] + [EdgeSpec("right", "meet")]
    )
    seconds = {"left": 2.0, "right": 2.0, "more": 5.0, "meet": 9.0, "plan": 11.0}
    values = {name: math.exp(-at / DISCOUNT_S) for name, at in seconds.items()}
    assert computed(spec, "plan") == pytest.approx(values, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 7))
def test_first_passages_solve_the_linear_system(seed, count):
    draws = np.random.default_rng(seed)
    edges = draws.random((count, count)) * (draws.random((count, count)) < 0.6)
    edges *= 0.95 / np.maximum(0.95, edges.sum(1, keepdims=True))  # each call may be the last one
    legs = draws.uniform(0.3, 0.98, count)
    branches = [{t: float(p) for t, p in enumerate(row) if p} for row in edges]
    passage = FirstPassage(branches, [False] * count, legs)
    for target in range(count):
        for name, weights in (("reuse", legs), ("reach", np.ones(count))):
            step = weights[:, None] * edges
            onward = np.delete(step, target, 1)
            q = np.linalg.solve(np.eye(count) - onward @ np.delete(np.eye(count), target, 0), step[:, target])
            assert getattr(passage.after, name)[:, target] == pytest.approx(q, abs=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_expected_visits_give_what_rounds_give(seed):
    """Graphs without forks: with endless cycles, calls that take no time, dead ends, and edges into a join."""
    draws = random.Random(seed)
    count = draws.randrange(2, 9)
    is_and = [draws.random() < 0.2 for _ in range(count)]
    branches: list[dict[int, float]] = []
    for _ in range(count):
        ways = draws.sample(range(count), draws.randrange(min(4, count)))
        branches.append({way: 1 / len(ways) for way in ways})  # one way alone is a sure one
    legs = np.array([draws.choice([1.0, draws.uniform(0.5, 0.99)]) for _ in range(count)])
    passage = FirstPassage(branches, is_and, legs)
    choice = np.zeros((count, passage.targets))
    for agent, row in enumerate(branches):
        for way, probability in row.items():
            choice[agent, passage.and_inputs[way][agent] if is_and[way] else way] = probability
    direct, rounds = passage._solve_linear(choice), passage._iterate(choice, np.zeros((count, 0), dtype=np.int64))
    for name in ("reach", "reuse"):
        assert getattr(direct, name) == pytest.approx(getattr(rounds, name), abs=2e-5)
        assert getattr(passage.onward, name) == pytest.approx(getattr(direct, name), abs=0)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_chances_are_chances(seed):
    """Any graph, with joins and cycles through them, in any state: 0 <= reuse <= reach <= 1."""
    draws = random.Random(seed)
    names = [f"a{i}" for i in range(6)]
    spec = WorkflowSpec(
        "w",
        [AgentSpec(name, draws.choice(["or", "and"]), call_s=draws.random() * 9) for name in names],
        [EdgeSpec(s, t, draws.choice([1.0, 0.5])) for s in names for t in draws.sample(names, 2)],
        draws.sample(names, 2),
    )
    seconds = [0.0]
    graph = StepGraph(lambda: seconds[0], GraphConfig(discount_s=DISCOUNT_S))
    flow = graph.add_workflow(spec)
    for _ in range(10):
        seconds[0] += 1
        agent = draws.choice(names)
        flow.finish(agent) if flow.ids[agent] in flow.running else flow.start(agent)
        for reach, value in graph._reuse[flow].chances().values():
            assert 0 <= value <= reach + 1e-9 <= 1 + 2e-9


def test_an_agent_nothing_leads_to_has_no_chance():
    graph = StepGraph()
    graph.add_workflow(
        WorkflowSpec(
            "w",
            [AgentSpec("a"), AgentSpec("b", "and"), AgentSpec("c")],
            [EdgeSpec("a", "b"), EdgeSpec("c", "b")],
            ["a"],
        )
    )
    assert graph.chance("b") == graph.chance("c") == graph.chance("nobody") == (0.0, 0.0)
    assert graph.seconds("b") == math.inf
    assert graph.chance("a") == (1.0, 1.0)


def test_workflows_that_share_an_agent_add_their_chances():
    spec = WorkflowSpec("w", [AgentSpec("a", call_s=1.0, call_spread_s=0.0), AgentSpec("b")], [EdgeSpec("a", "b", 0.5)])
    graph = StepGraph(lambda: 0.0, GraphConfig(discount_s=DISCOUNT_S))
    for name in ("one", "two"):
        graph.add_workflow(spec, name).start("a")
    discount = math.exp(-0.1)
    assert graph.chance("b") == pytest.approx((0.75, 0.75 * discount), abs=1e-5)
    assert graph.seconds("b") == pytest.approx(1.0, abs=1e-3)


def test_observed_durations_move_the_expected_time():
    seconds = [0.0]
    graph = StepGraph(lambda: seconds[0], GraphConfig(discount_s=DISCOUNT_S, default_call_s=5.0))
    flow = graph.add_workflow(
        WorkflowSpec("w", [AgentSpec("a"), AgentSpec("b")], [EdgeSpec("a", "b"), EdgeSpec("b", "a")])
    )
    for _ in range(40):
        for agent in ("a", "b"):
            flow.start(agent)
            seconds[0] += 1.0
            flow.finish(agent)
            seconds[0] += 2.0  # the pause for a tool
    flow.start("a")
    assert graph.seconds("b") == pytest.approx(3.0, rel=0.05)
    assert graph.seconds("a") == pytest.approx(6.0, rel=0.05)
    seconds[0] += 1.0
    flow.finish("a")
    assert graph.seconds("b") == pytest.approx(2.0, rel=0.05)
    seconds[0] += 1.0
    assert graph.seconds("b") == pytest.approx(1.0, rel=0.05)


def test_large_workflows_follow_the_most_probable_path():
    """On a graph with one way to each agent the two ways to compute agree."""
    chain = [f"a{i}" for i in range(8)]
    spec = WorkflowSpec(
        "chain",
        [AgentSpec(name, call_s=1.0, call_spread_s=0.5) for name in [*chain, "side"]],
        [*(EdgeSpec(s, t, 0.9) for s, t in pairwise(chain)), EdgeSpec("a2", "side", 0.1)],
    )
    exact = computed(spec, "a0")
    assert computed(spec, "a0", reuse=SMALL) == pytest.approx(exact, abs=1e-4)
    graph = StepGraph(lambda: 0.0, GraphConfig(discount_s=DISCOUNT_S, reuse=SMALL))
    flow = graph.add_workflow(spec)
    flow.start("a0")
    graph.reuse("a1")
    flow.finish("a0", chose=["a1"])
    assert graph.reuse("a1") == 1.0
    flow.start("a1")
    assert graph.reuse("a2") == pytest.approx(exact["a1"], abs=1e-4)
    assert graph.reuse("a1") == 0.0


def test_large_workflows_learn_how_long_calls_take():
    """Calls that were said to take 5 s take half a second: the next one is soon expected after that."""
    now = [0.0]
    names = [f"a{i}" for i in range(6)]
    graph = StepGraph(lambda: now[0], GraphConfig(discount_s=10.0, reuse=SMALL))
    edges = [EdgeSpec(s, t) for s, t in zip(names, names[1:] + names[:1], strict=True)]
    flow = graph.add_workflow(WorkflowSpec("ring", [AgentSpec(name, call_s=5.0) for name in names], edges))
    flow.start("a0")
    assert graph.seconds("a1") == pytest.approx(10 * math.log(1 + 0.5), rel=0.01)
    for name in [*names * 40, "a0"]:
        if name != "a0" or now[0]:
            flow.start(name)
        now[0] += 0.5
        flow.finish(name)
    flow.start("a1")
    assert graph.seconds("a2") == pytest.approx(0.5, rel=0.05)


def test_running_mean_and_spread():
    duration = Duration(7.0, 3.0)
    duration.observe(2.0)
    assert (duration.mean, duration.spread) == (2.0, 2.0 * 3 / 7)  # one call says nothing of the spread but its scale
    draws = np.random.default_rng(0)
    values = draws.gamma(9.0, 0.5, 2000)
    for value in values:
        duration.observe(float(value))
    assert duration.mean == pytest.approx(4.5, abs=4 * 1.5 / math.sqrt(MEMORY))
    assert duration.spread == pytest.approx(1.5, rel=0.5)
    for _ in range(200):
        duration.observe(1.0)  # it forgets
    assert duration.mean == pytest.approx(1.0, abs=0.05)
    duration.observe(-5.0)  # the clock was set back
    assert 0.9 < duration.mean < 1.0


def test_the_discount_of_a_duration():
    draws = np.random.default_rng(0)
    left = 2.0 + draws.exponential(1.5, 200_000)
    assert Duration(3.5, 1.5).discount(0.1) == pytest.approx(np.exp(-0.1 * left).mean(), abs=2e-3)
    late = left[left > 3.0] - 3.0
    assert Duration(3.5, 1.5).discount(0.1, elapsed=3.0) == pytest.approx(np.exp(-0.1 * late).mean(), abs=2e-3)
    assert Duration(0.0, 0.0).discount(0.1) == 1.0


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_wide_waits_use_the_last_observations(sigma: float):
    draws = np.random.default_rng(0)
    truth = draws.lognormal(0.0, sigma, 200_000)
    for elapsed in (0.0, 1.0, 5.0):
        left = truth[truth > elapsed] - elapsed
        errors, by_mean = [], []
        for _ in range(50):
            duration = Duration(1.0, 1.0)
            for value in draws.lognormal(0.0, sigma, MEMORY):
                duration.observe(float(value))
            true = np.exp(-left).mean()
            errors.append(abs(duration.discount(1.0, elapsed) - true))
            by_mean.append(abs(1 / (1 + duration.mean) - true))
        assert np.mean(errors) < 0.15
        assert sigma < 2 or elapsed or np.mean(errors) < np.mean(by_mean) / 2


def test_one_endless_wait_is_one_of_many_and_the_prior_has_little_weight():
    duration = Duration(1.0, 1.0)
    for seconds in (0.5, 1.5, 1.0, 0.2, 1e6):
        duration.observe(seconds)
    before = PRIOR_WEIGHT / (1 + 1.0)
    seen = sum(math.exp(-seconds) for seconds in (0.5, 1.5, 1.0, 0.2))
    assert duration.discount(1.0) == pytest.approx((before + seen) / (PRIOR_WEIGHT + 5))
    assert duration.discount(1.0, elapsed=1.2) == pytest.approx((before + math.exp(-0.3)) / (PRIOR_WEIGHT + 2))
    for seconds in [*[0.1, 2.0] * MEMORY]:
        duration.observe(seconds)
    half = MEMORY / 2 * (math.exp(-0.1) + math.exp(-2.0))
    assert duration.discount(1.0) == pytest.approx((before + half) / (PRIOR_WEIGHT + MEMORY)), "it forgets"


def test_the_prior_of_an_undeclared_agent_is_the_duration_of_all():
    others, own = Duration(0.0, 0.0), Duration(0.0, 0.0)
    own.prior = others
    assert own.discount(1.0) == 1.0
    for seconds in (1.0, 9.0, 1.0, 9.0):
        others.observe(seconds)
    assert own.discount(1.0) == others.discount(1.0) == pytest.approx(math.exp(-1) / 2, rel=0.3)
    for seconds in (3.0, 0.5):
        own.observe(seconds)
    seen = math.exp(-3.0) + math.exp(-0.5)
    assert own.discount(1.0) == pytest.approx((PRIOR_WEIGHT * others.discount(1.0) + seen) / (PRIOR_WEIGHT + 2))


def test_a_duration_has_numbers():
    with pytest.raises(ValueError, match="got the spread nan for a duration; accepted: seconds, 0 or more and finite"):
        Duration(1.0, math.nan)
