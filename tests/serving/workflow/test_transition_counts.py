"""Observed transitions: decayed counts, habits, repeated calls."""

from __future__ import annotations

import pytest

from tenure.serving.workflow.graph_config import TransitionConfig
from tenure.serving.workflow.transitions import TransitionCounts

DECAY, EDGE_WEIGHT, REPEAT_PRIOR = TransitionConfig.decay, TransitionConfig.edge_weight, TransitionConfig.repeat_prior
MAX_SUCCESSORS = TransitionConfig.max_successors


def test_undeclared_successors_count_from_the_second_time_on():
    transitions = TransitionCounts()
    transitions.record(0, 1, predicted=0.9)
    transitions.record(0, 5, predicted=0.0)
    assert transitions.counts(0, declared=[1]) == {1: DECAY} and not transitions.is_habit(0, 5)
    transitions.record(0, 5, predicted=0.0)
    assert transitions.counts(0, declared=[1]) == pytest.approx({1: DECAY**2, 5: DECAY}) and transitions.is_habit(0, 5)
    assert transitions.counts(3, declared=[1]) == {} and not transitions.is_habit(3, 5)


def test_unpredicted_repeats_are_learned():
    transitions = TransitionCounts()
    assert transitions.repeat_factor(10) == 1.0, "at first as any other"
    transitions.record_unpredicted(False)
    assert transitions.repeat_factor(10) == pytest.approx(REPEAT_PRIOR / (1 + REPEAT_PRIOR))
    for _ in range(200):
        transitions.record_unpredicted(False)
    assert transitions.repeat_factor(10) < 0.05
    for _ in range(200):
        transitions.record_unpredicted(True)
    assert transitions.repeat_factor(10) == pytest.approx(10, rel=0.1), "it alone"


def test_predicted_transitions_cause_no_drift():
    transitions = TransitionCounts()
    for _ in range(5):
        transitions.record(0, 1, predicted=1.0)
    assert transitions.drift == 0.0
    transitions.record(0, 2, predicted=0.0)
    assert transitions.drift == pytest.approx(1 / (EDGE_WEIGHT + 1 + sum(DECAY**n for n in range(5))))


def test_old_habits_fade_and_many_are_bounded():
    transitions = TransitionCounts()
    for _ in range(3):
        transitions.record(0, 1, predicted=0.0)
    for _ in range(200):
        transitions.record(0, 2, predicted=0.0)
    assert not transitions.is_habit(0, 1) and transitions.is_habit(0, 2)
    for target in range(10, 10 + 3 * MAX_SUCCESSORS):
        transitions.record(0, target, predicted=0.0)
    assert len(transitions.counts(0, declared=range(1000))) == MAX_SUCCESSORS
    transitions.record(7, 2, predicted=0.0)
    transitions.record(2, 7, predicted=0.0)
    transitions.forget(2)
    assert transitions.counts(7, declared=[2]) == transitions.counts(2, declared=[7]) == {}
    transitions.forget(7)
