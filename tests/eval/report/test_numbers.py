"""The report's numbers against those worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tenure.eval import wilson
from tenure.eval.report import RecordedRun, compare_runs, report_markdown, settings_of

from ..made import made


def run_of(records, name: str = "a") -> RecordedRun:
    return RecordedRun(Path(name), records, [], {"model": {"id": "tiny"}}, [], [])


def scored(scores, **values):
    return [made(index=index, score=score, **values) for index, score in enumerate(scores)]


def two_tasks(policy: str, vt, needle, **values):
    return scored(vt, task="vt", policy=policy, **values) + scored(needle, task="needle", policy=policy, **values)


def test_the_mean_weighs_tasks_equally_and_its_interval_resamples_within_them():
    records = two_tasks("knorm", [1.0, 0.0, 0.0, 0.0], [1.0, 1.0], kl=0.5)
    (setting,) = settings_of(records)
    assert (setting.length, setting.aware, setting.tasks, setting.budgets) == (256, False, ("vt", "needle"), (0.2,))
    point = setting.points[("knorm", "head"), 0.2]
    assert point.accuracy.value == (0.25 + 1.0) / 2
    # Only the first task varies: the mean of four draws with a chance of 1/4 each. P(none) = 0.32, P(4) = 0.004 and
    # P(3 or more) = 0.05, so that the 97.5 % quantile is 3 of 4.
    assert (point.accuracy.low, point.accuracy.high) == (0.5, 0.5 * 0.75 + 0.5)
    assert point.kl is not None and (point.kl.low, point.kl.value, point.kl.high) == (0.5, 0.5, 0.5)
    assert (point.cases, point.bytes) == (6, 2_000_000)
    assert point.tasks == {"vt": wilson(1, 4), "needle": wilson(2, 2)}


def test_one_task_has_wilsons_interval():
    (setting,) = settings_of(scored([1.0, 1.0, 0.0]))
    assert setting.points[("knorm", "head"), 0.2].accuracy == wilson(2, 3)


def test_lengths_and_kinds_of_question_stand_apart():
    records = scored([1.0], length=512) + scored([0.0], aware=True) + scored([0.5])
    assert [(one.length, one.aware) for one in settings_of(records)] == [(256, False), (512, False), (256, True)]
    assert [one.title for one in settings_of(records)][::2] == [
        "256 tokens, question asked after the compression", "256 tokens, question read before the compression"
    ]  # fmt: skip
    assert [one.points[("knorm", "head"), 0.2].accuracy.value for one in settings_of(records)] == [0.5, 1.0, 0.0]


def test_the_full_cache_comes_first_and_stands_beside_every_budget():
    records = scored([0.0], policy="h2o", budget=64) + scored([1.0], policy="tova", budget=0.5)
    records += scored([0.5], policy="tova", budget=0.2) + scored([0.25], policy="full", scope="none", budget=1.0)
    (setting,) = settings_of(records)
    assert setting.methods == (("full", "none"), ("tova", "head"), ("h2o", "head"))  # then by accuracy
    assert setting.budgets == (0.5, 0.2, 64)
    full = setting.full
    assert full is not None and full.accuracy.value == 0.25
    assert all(setting.point(("full", "none"), budget) is full for budget in setting.budgets)
    assert setting.point(("h2o", "head"), 0.5) is None


def test_those_ahead_are_the_best_and_what_is_not_worse_on_the_same_cases():
    best = [1.0] * 9 + [0.0]
    close = [1.0] * 8 + [0.0, 1.0]  # one case lost, one won
    worse = [1.0] * 3 + [0.0] * 7
    records = [*scored(best, policy="a"), *scored(close, policy="b"), *scored(worse, policy="c")]
    (setting,) = settings_of([replace(one, policy=name) for one, name in zip(records, "a" * 10 + "b" * 10 + "c" * 10,
                                                                             strict=True)])  # fmt: skip
    ahead = {method[0] for (method, _), point in setting.points.items() if point.ahead}
    assert ahead == {"a", "b"}
    assert {method[0] for (method, _), point in setting.points.items() if point.tasks_ahead == {"vt"}} == {"a", "b"}
    assert {point.tasks_ahead for (method, _), point in setting.points.items() if method[0] == "c"} == {frozenset()}


def test_two_runs_are_compared_on_the_cases_that_both_have():
    first = two_tasks("knorm", [0.0, 0.0, 1.0, 0.0], [0.0, 0.0]) + scored([1.0], policy="tova")
    second = two_tasks("knorm", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], kl=0.125) + scored([1.0], policy="h2o")
    (one,) = compare_runs(run_of(first), run_of(second, "b"))
    assert (one.method, one.budget, one.aware, one.cases) == (("knorm", "head"), 0.2, False, 5)
    assert one.before == pytest.approx((1 / 3 + 0) / 2) and one.after == 1.0
    assert one.accuracy.value == pytest.approx((2 / 3 + 1) / 2)
    assert one.accuracy.low == 0.5 and one.accuracy.high == 1.0  # three draws of (1, 1, 0), all 0 in 1 of 27
    assert one.significant and one.holm == one.accuracy.p_value
    assert one.kl is not None and one.kl.value == one.kl.low == one.kl.high == -0.125


def test_p_values_are_adjusted_for_their_number_and_no_difference_is_none():
    first = [*scored([0.0] * 12, policy="knorm"), *scored([1.0, 0.0], policy="tova")]
    second = [*scored([1.0] * 12, policy="knorm"), *scored([0.0, 1.0], policy="tova")]
    large, none = compare_runs(run_of(first), run_of(second, "b"))
    assert large.significant and large.holm == pytest.approx(2 * large.accuracy.p_value)
    assert not none.significant and none.accuracy.value == 0.0 and none.holm == 1.0
    text = report_markdown([run_of(first), run_of(second, "b")], [large, none])
    assert "1 of 2 accuracies differ (their interval leaves out 0), 1 of them also after Holm's" in text
    assert "| Knorm | 20% | 12 | 0.000 | 1.000 | +1.000 * | +1.000 to +1.000 | 0.0002 | 0.0004 |" in text


def test_runs_that_share_nothing_are_refused():
    first = run_of(scored([1.0]))
    with pytest.raises(ValueError, match=r"a and b share no case \(the same task, length, seed, number and answer\)"):
        compare_runs(first, run_of(scored([1.0], seed=1), "b"))
    with pytest.raises(ValueError, match="a and b share no case"):
        compare_runs(first, run_of(scored([1.0], answer="another"), "b"))
    with pytest.raises(ValueError, match="a and b share cases but no policy at the same budget"):
        compare_runs(first, run_of(scored([1.0], budget=0.5), "b"))
    (same,) = compare_runs(first, run_of(scored([1.0], answer=""), "b"))  # a program that writes no answers down
    assert same.cases == 1


def test_markdown_has_every_number():
    records = two_tasks("full", [1.0, 1.0], [1.0, 0.0], scope="none", budget=1.0, kl=0.0)
    records += two_tasks("knorm", [1.0, 0.0], [0.0, 0.0])
    text = report_markdown([run_of(records)], [])
    assert "tiny; 4 cases, 8 records." in text
    assert "| full cache | 0.75 [.50–1.00], KL 0.000 |" in text
    assert "| Knorm | **0.25 [.00–.50]**, KL 0.250 |" in text
    assert "| policy | vt | needle |" in text
    assert "| Knorm | **0.50 [.09–.91]** | **0.00 [.00–.66]** |" in text
