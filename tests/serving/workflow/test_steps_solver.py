"""Incremental distances equal those of the bare definition, and touch no more than they have to."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.serving.workflow.steps_solver import JoinSolver, solve_naively


def _edges(solver: JoinSolver, nodes: list[int]) -> list[tuple[int, int]]:
    return [(source, target) for target in nodes for source in solver.predecessors[target]]


def _edit(solver: JoinSolver, nodes: list[int], choose: random.Random) -> None:
    """One random change."""
    kind = choose.choice(["node", "edge", "edge", "edge", "cut", "source", "rest", "satisfy", "join", "remove"])
    edges = _edges(solver, nodes)
    if kind == "node" or len(nodes) < 2:
        nodes.append(solver.add_node(choose.random() < 0.4))
    elif kind == "edge":
        solver.set_edge(choose.choice(nodes), choose.choice(nodes), choose.choice([1.0, 1.0, 2.5]))
    elif kind == "cut" and edges:
        solver.remove_edge(*choose.choice(edges))
    elif kind in ("source", "rest"):
        solver.set_source(choose.choice(nodes), kind == "source")
    elif kind == "satisfy" and edges:
        solver.satisfy(*choose.choice(edges), choose.random() < 0.6)
    elif kind == "join":
        solver.set_join(choose.choice(nodes), choose.random() < 0.5)
    elif kind == "remove" and len(nodes) > 2:
        solver.remove_node(nodes.pop(choose.randrange(len(nodes))))


def _naive(solver: JoinSolver) -> tuple[list[float], list[float]]:
    return solve_naively(solver.predecessors, solver.is_and, solver.is_source, solver.satisfied, solver.horizon)


def _assert_right(solver: JoinSolver, nodes: list[int]) -> None:
    distance, joined = _naive(solver)
    assert [solver.distance(node) for node in nodes] == [distance[node] for node in nodes]
    assert [solver.next_distance(node) for node in nodes] == [joined[node] for node in nodes]


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    edits=st.integers(1, 60),
    horizon=st.sampled_from([math.inf, 3.0, 9.0]),
    update_limit=st.sampled_from([0, 1, 3, 300]),
    batch=st.integers(1, 5),
)
def test_incremental_distances_are_those_of_the_definition(seed, edits, horizon, update_limit, batch):
    """With cycles, unreachable inputs of ANDs, removals, batches, and the switch to arrays at any point."""
    choose = random.Random(seed)
    solver, nodes = JoinSolver(horizon, update_limit), []
    for number in range(edits):
        _edit(solver, nodes, choose)
        if number % batch == 0:
            _assert_right(solver, nodes)
    _assert_right(solver, nodes)
    solver.solve()
    _assert_right(solver, nodes)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), update_limit=st.sampled_from([0, 2, 300]))
def test_drain_names_exactly_what_changed(seed, update_limit):
    choose = random.Random(seed)
    solver, nodes = JoinSolver(9.0, update_limit), []
    for _ in range(20):
        _edit(solver, nodes, choose)
    for _ in range(20):
        solver.drain()
        distance, joined = _naive(solver)
        kept = set(nodes)
        while True:
            _edit(solver, nodes, choose)
            kept &= set(nodes)  # a number that is given again means another node
            if choose.random() < 0.5:
                break
        after, joined_after = _naive(solver)
        moved = {node for node in kept if (distance[node], joined[node]) != (after[node], joined_after[node])}
        assert set(solver.drain()) & kept == moved


def _ring(count: int, horizon: float = math.inf) -> JoinSolver:
    solver = JoinSolver(horizon)
    for _ in range(count):
        solver.add_node()
    for node in range(count):
        solver.set_edge(node, (node + 1) % count)
    solver.set_source(0)
    return solver


def test_a_ring_counts_up_to_its_next_turn():
    solver = _ring(10)
    assert [solver.distance(node) for node in range(10)] == list(range(10))
    assert solver.next_distance(0) == 10


def test_an_and_with_an_unreachable_input_is_infinitely_far_until_it_is_satisfied():
    solver = JoinSolver()
    known, unknown, join = solver.add_node(), solver.add_node(), solver.add_node(is_and=True)
    solver.set_edge(known, join)
    solver.set_edge(unknown, join)
    solver.set_source(known)
    assert solver.distance(join) == math.inf
    solver.satisfy(unknown, join)
    assert solver.distance(join) == 1
    solver.satisfy(known, join)
    assert solver.distance(join) == 0


def test_and_cycles_without_a_beginning_stay_unknown():
    """No distance supports itself: x = max(x) + 1 has only the solution infinity."""
    solver = JoinSolver()
    one, two = solver.add_node(is_and=True), solver.add_node(is_and=True)
    solver.set_edge(one, two)
    solver.set_edge(two, one)
    assert solver.distance(one) == math.inf
    solver.set_source(one)
    assert (solver.distance(two), solver.next_distance(one)) == (1, 2)
    solver.set_source(one, False)
    assert (solver.distance(one), solver.distance(two)) == (math.inf, math.inf)


def test_an_update_touches_what_it_changes_and_nothing_else():
    solver = JoinSolver()
    for _ in range(1000):  # a hundred rings of ten
        solver.add_node()
    for node in range(1000):
        solver.set_edge(node, node // 10 * 10 + (node + 1) % 10)
    for first in range(0, 1000, 10):
        solver.set_source(first)
    solver.drain()
    before = solver.nodes_updated
    solver.set_source(500, False)
    solver.set_source(501)
    assert solver.distance(500) == 9
    assert sorted(solver.drain()) == list(range(500, 510))
    assert solver.nodes_updated - before <= 20  # ten nodes, each lost and found at most once
    solver.set_edge(3, 8, 7.0)  # a longer way: looked at, changes nothing
    before = solver.nodes_updated
    assert solver.distance(8) == 8
    assert solver.nodes_updated == before


def test_the_horizon_bounds_an_update():
    solver = _ring(10_000, horizon=16)
    assert (solver.distance(16), solver.distance(17)) == (16, math.inf)
    before = solver.nodes_updated
    solver.set_source(0, False)
    solver.set_source(1)
    assert solver.distance(17) == 16
    assert solver.nodes_updated - before <= 2 * 18


def test_a_change_that_reaches_too_much_is_solved_by_arrays():
    solver = _ring(1000)
    solver.update_limit = 50
    solver.distance(0)
    solver.set_source(0, False)
    solver.set_source(1)
    before = solver.nodes_updated
    assert solver.distance(0) == 999
    assert solver.nodes_updated - before == 50
    assert len(solver.drain()) == 1000


@pytest.mark.parametrize("horizon", [0, -1.0, math.nan])
def test_horizons_that_are_none(horizon):
    with pytest.raises(ValueError, match=r"got the horizon .*; accepted: a number above 0"):
        JoinSolver(horizon)
