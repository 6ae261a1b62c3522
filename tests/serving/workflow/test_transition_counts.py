"""What has followed whose calls."""

from __future__ import annotations

import pytest

from tenure.serving.workflow.workflow import DOUBT, FADING, MOST, TRUST, TransitionCounts


def test_what_no_edge_names_counts_from_the_second_time_on():
    followed = TransitionCounts()
    followed.saw(0, 1, told=0.9)
    followed.saw(0, 5, told=0.0)
    assert followed.counts(0, named=[1]) == {1: FADING} and not followed.again(0, 5)
    followed.saw(0, 5, told=0.0)
    assert followed.counts(0, named=[1]) == pytest.approx({1: FADING**2, 5: FADING}) and followed.again(0, 5)
    assert followed.counts(3, named=[1]) == {} and not followed.again(3, 5)


def test_whether_the_same_agent_is_called_again_for_no_reason_is_learned():
    followed = TransitionCounts()
    assert followed.repeating(10) == 1.0, "at first as any other"
    followed.surprised(False)
    assert followed.repeating(10) == pytest.approx(DOUBT / (1 + DOUBT))
    for _ in range(200):
        followed.surprised(False)
    assert followed.repeating(10) < 0.05
    for _ in range(200):
        followed.surprised(True)
    assert followed.repeating(10) == pytest.approx(10, rel=0.1), "it alone"


def test_what_is_as_it_was_told_moves_nothing():
    followed = TransitionCounts()
    for _ in range(5):
        followed.saw(0, 1, told=1.0)
    assert followed.moved == 0.0
    followed.saw(0, 2, told=0.0)
    assert followed.moved == pytest.approx(1 / (TRUST + 1 + sum(FADING**n for n in range(5))))


def test_old_habits_fade_and_many_are_bounded():
    followed = TransitionCounts()
    for _ in range(3):
        followed.saw(0, 1, told=0.0)
    for _ in range(200):
        followed.saw(0, 2, told=0.0)
    assert not followed.again(0, 1) and followed.again(0, 2)
    for target in range(10, 10 + 3 * MOST):
        followed.saw(0, target, told=0.0)
    assert len(followed.counts(0, named=range(1000))) == MOST
    followed.saw(7, 2, told=0.0)
    followed.saw(2, 7, told=0.0)
    followed.forget(2)
    assert followed.counts(7, named=[2]) == followed.counts(2, named=[7]) == {}
    followed.forget(7)
