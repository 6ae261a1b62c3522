"""Intervals against published values and their defining properties."""

from __future__ import annotations

import numpy as np
import pytest

from tenure.eval import bootstrap_mean, paired_bootstrap, wilson
from tenure.eval.intervals import holm, stratified_difference, stratified_mean


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, table I, method 3: Wilson's interval without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_has_the_published_values(successes, trials, low, high):
    interval = wilson(successes, trials)
    assert interval.value == successes / trials
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_holds_the_estimate():
    for trials in (1, 20, 333):
        for successes in range(0, trials + 1, max(1, trials // 7)):
            interval, mirrored = wilson(successes, trials), wilson(trials - successes, trials)
            assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0
            assert interval.low == pytest.approx(1 - mirrored.high)
    assert wilson(5, 10, 0.99).low < wilson(5, 10, 0.9).low


def test_wilson_refuses_nonsense():
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="got 0 of 0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 95"):
        wilson(1, 2, 95)


def test_bootstrap_is_seeded_and_close_to_the_normal_interval():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400).tolist()
    interval = bootstrap_mean(values, seed=1)
    assert interval == bootstrap_mean(values, seed=1)
    assert interval != bootstrap_mean(values, seed=2)
    error = np.std(values) / 20
    assert interval.value == pytest.approx(np.mean(values))
    assert interval.low == pytest.approx(interval.value - 1.96 * error, abs=0.2 * error)
    assert interval.high == pytest.approx(interval.value + 1.96 * error, abs=0.2 * error)


def test_bootstrap_of_equal_values_has_no_width():
    interval = bootstrap_mean([0.25] * 9)
    assert (interval.low, interval.value, interval.high) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])


def test_paired_bootstrap_sees_what_unpaired_intervals_hide():
    rng = np.random.default_rng(0)
    hard = rng.normal(0.0, 5.0, 60)
    better = (hard + 0.5 + rng.normal(0.0, 0.5, 60)).tolist()
    difference = paired_bootstrap(better, hard.tolist())
    assert 0 < difference.low < difference.value < difference.high
    assert difference.p_value < 0.001
    assert bootstrap_mean(better).low < bootstrap_mean(hard.tolist()).high  # the unpaired intervals overlap


def test_paired_bootstrap_without_a_difference():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    same = paired_bootstrap(values, values)
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    noise = np.random.default_rng(3).normal(size=(2, 100))
    difference = paired_bootstrap(noise[0].tolist(), noise[1].tolist())
    assert difference.low < 0 < difference.high and difference.p_value > 0.05
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_bootstrap([1.0, 2.0], [1.0])


def test_stratified_means_resample_within_the_strata():
    easy, hard = [1.0] * 40, [0.0] * 10
    interval = stratified_mean([easy, hard])
    assert (interval.low, interval.value, interval.high) == (0.5, 0.5, 0.5)  # nothing varies within a stratum
    values = np.random.default_rng(0).normal(size=(2, 200))
    interval = stratified_mean([list(values[0] + 9), list(values[1])], seed=3)
    error = np.sqrt((values[0].var() + values[1].var()) / 200) / 2
    assert interval.value == pytest.approx((values[0].mean() + 9 + values[1].mean()) / 2)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert interval == stratified_mean([list(values[0] + 9), list(values[1])], seed=3)
    with pytest.raises(ValueError, match="no values"):
        stratified_mean([[1.0], []])


def test_stratified_differences_have_the_paired_bootstraps_p_value():
    differences = np.random.default_rng(1).normal(0.25, 1.0, 60)
    one = stratified_difference([list(differences)])
    other = paired_bootstrap(list(differences), [0.0] * 60)
    assert one.value == pytest.approx(other.value) and one.p_value == pytest.approx(other.p_value, abs=0.02)
    assert stratified_difference([[0.0, 0.0]]).p_value == 1.0


def test_holm_has_the_textbooks_values():
    """Holm 1979's procedure: the smallest is multiplied by 4, the next by 3, and none falls below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
