"""Steps-to-execution in buckets, and what the options of tier policies refuse."""

from __future__ import annotations

import pytest

from tenure.serving.kvcache.eviction_policy import LRU, HeldSteps, StepsToExecution, TierPolicy, WriteBack


def test_steps_beyond_the_first_bucket_are_equal():
    steps = {"running": 0.0, "next": 1.0, "soon": 2.0, "half": 1.5, "far": 3.0, "farther": 9.0}
    held, exact = HeldSteps(steps), StepsToExecution(steps)
    values = {name: held.value(name) for name in (*steps, "unknown")}
    assert values == {
        "running": 0.0, "next": -1.0, "soon": -2.0, "half": -2.0, "far": -3.0, "farther": -3.0, "unknown": -3.0,
    }  # fmt: skip
    assert exact.value("far") > exact.value("farther") > exact.value("unknown")
    assert held.unowned_value(0.0) < min(values.values()), "nodes in no fixed prompt are evicted first"
    assert held.rank(-3.0, (5.0,)) < held.rank(-3.0, (6.0,)) < held.rank(-2.0, (1.0,)), "within a bucket by age"
    with pytest.raises(ValueError, match="got most=0 steps; accepted: 1 or more"):
        HeldSteps(steps, most=0)


def test_pages_are_evicted_one_by_one_only_where_nothing_is_saved():
    assert TierPolicy(LRU(), WriteBack.NOTHING, by_page=True).by_page
    with pytest.raises(ValueError, match=r"got by_page with .*; accepted: with a WriteBack that saves nothing"):
        TierPolicy(LRU(), WriteBack.ALL, by_page=True)
