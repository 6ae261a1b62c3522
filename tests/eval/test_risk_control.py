"""Promises of calibration: exact tails, simulated violation rates, and the order of testing."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tenure.eval import RiskControl
from tenure.eval.risk_control import binomial_cdf, hoeffding_bentkus, p_value, resplit

BUDGETS = [0.8, 0.6, 0.4, 0.2]


def exact_cdf(successes: int, trials: int, probability: Fraction) -> Fraction:
    return sum(
        (math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k) for k in range(successes + 1)),
        start=Fraction(0),
    )


def sum_of_bernoullis(chances: np.ndarray) -> np.ndarray:
    """P(X ≤ k) for k = 0, 1, … of a sum of independent Bernoullis with these chances."""
    masses = np.ones(1)
    for chance in chances:
        masses = np.convolve(masses, [1 - chance, chance])
    return masses.cumsum()


@pytest.mark.parametrize("trials", [1, 7, 60, 300])
@pytest.mark.parametrize("probability", [Fraction(1, 50), Fraction(1, 3), Fraction(9, 10)])
def test_binomial_tails_are_exact(trials, probability):
    for successes in {0, 1, trials // 3, trials // 2, trials - 1, trials}:
        exact = float(exact_cdf(successes, trials, probability))
        assert binomial_cdf(successes, trials, float(probability)) == pytest.approx(exact, rel=1e-9, abs=1e-300)


def test_binomial_tails_at_the_ends():
    assert binomial_cdf(-1, 5, 0.5) == 0.0 and binomial_cdf(5, 5, 0.5) == 1.0
    assert binomial_cdf(2, 5, 0.0) == 1.0 and binomial_cdf(2, 5, 1.0) == 0.0
    assert 0 < binomial_cdf(0, 10_000, 0.05) < 1e-200


@pytest.mark.parametrize("cases", [1, 5, 22, 60, 200])
@pytest.mark.parametrize("bound", [0.02, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("binary", [False, True])
def test_p_values_are_never_below_the_chance_of_so_little_loss(cases, bound, binary):
    """Losses of 0 or 1 whose mean chance is the bound: all alike, unlike, and as unlike as can be."""
    rng = np.random.default_rng(cases)
    spread = rng.uniform(-0.5, 0.5, cases) * min(bound, 1 - bound)
    certain, rest = divmod(cases * bound, 1)
    extreme = np.zeros(cases)
    extreme[: int(certain)] = 1.0
    extreme[int(certain)] = rest
    for chances in (np.full(cases, bound), bound + spread - spread.mean(), extreme):
        chance_of = sum_of_bernoullis(chances)
        for lost in range(cases + 1):
            assert p_value(lost, cases, bound, binary) >= chance_of[lost] * (1 - 1e-9)
    assert p_value(math.ceil(cases * bound), cases, bound, binary) == 1.0  # nothing speaks for the bound


def test_p_values_grow_with_the_loss_and_shrink_with_the_bound_and_the_cases():
    totals = [hoeffding_bentkus(total, 50, 0.2) for total in np.linspace(0, 50, 101)]
    assert totals == sorted(totals) and totals[0] == pytest.approx(0.8**50) and totals[-1] == 1.0
    bounds = [hoeffding_bentkus(5, 50, bound) for bound in (0.1, 0.15, 0.2, 0.5)]
    assert bounds == sorted(bounds, reverse=True)
    assert hoeffding_bentkus(10, 100, 0.2) < hoeffding_bentkus(5, 50, 0.2)
    assert p_value(5, 50, 0.2, binary=True) < hoeffding_bentkus(5, 50, 0.2)  # exact is sharper


ROUNDS = 1000


def violations(risks: list[float], draw, control: RiskControl, cases: int) -> float:
    """Share of simulated calibrations whose chosen budget has an expected loss above the bound."""
    rng = np.random.default_rng(1)
    broken = 0
    for _ in range(ROUNDS):
        losses = np.stack([draw(rng, risk, cases) for risk in risks], axis=1)
        outcome = control.decide(losses, BUDGETS)
        broken += outcome.accepted is not None and risks[outcome.accepted] > control.bound
    return broken / ROUNDS


def bernoulli(rng, risk, cases):
    return (rng.random(cases) < risk).astype(float)


def beta(rng, risk, cases):
    return rng.beta(4 * risk, 4 * (1 - risk), cases)


def uniform(rng, risk, cases):
    return rng.uniform(0, 2 * risk, cases)


def mostly_nothing(rng, risk, cases):
    """KL as it is: usually little, sometimes clipped."""
    return np.where(rng.random(cases) < risk / 2, 1.0, rng.uniform(0, 2 * (risk / 2) / (1 - risk / 2), cases))


@pytest.mark.parametrize("draw", [bernoulli, beta, uniform, mostly_nothing])
@pytest.mark.parametrize(
    "risks",
    [[0.02, 0.05, 0.101, 0.3], [0.101, 0.2, 0.3, 0.4], [0.04, 0.101, 0.03, 0.101], [0.09, 0.0999, 0.1001, 0.11]],
)
@pytest.mark.parametrize("confidence", [0.9, 0.6])
def test_the_bound_is_broken_no_more_often_than_stated(draw, risks, confidence):
    """Several risks are a hair above the bound, where a test errs most."""
    control = RiskControl(0.1, confidence=confidence, binary=draw is bernoulli)
    rate, level = violations(risks, draw, control, cases=40), 1 - confidence
    assert rate <= level + 4 * math.sqrt(level * (1 - level) / ROUNDS)


def test_the_simulation_could_tell():
    """An exact test comes close to its level, and one that looks at the mean alone breaks the bound far too often."""
    risks = [0.05, 0.06, 0.101, 0.3]
    exact = violations(risks, bernoulli, RiskControl(0.1, confidence=0.7, binary=True), cases=60)
    assert 0.05 < exact <= 0.33
    rng = np.random.default_rng(1)
    naive = np.mean([bernoulli(rng, 0.101, 60).mean() <= 0.1 for _ in range(ROUNDS)])
    assert naive > 0.45


@pytest.mark.parametrize("monotone", [True, False])
def test_conformal_risk_control_bounds_the_mean_over_calibrations(monotone):
    control = RiskControl(0.1, method="crc")
    risks = [0.02, 0.08, 0.12, 0.3] if monotone else [0.02, 0.12, 0.05, 0.3]
    rng = np.random.default_rng(2)
    achieved = []
    for _ in range(4000):
        common = rng.random((25, 1)) if monotone else rng.random((25, 4))
        outcome = control.decide((common < risks).astype(float), BUDGETS)
        achieved.append(0.0 if outcome.accepted is None else risks[outcome.accepted])
    assert np.mean(achieved) <= 0.1 + 4 * np.std(achieved) / math.sqrt(4000)
    assert len(set(achieved)) >= 3  # it really depends on the draw


def test_testing_stops_at_the_first_budget_that_fails():
    losses = np.zeros((100, 4))
    losses[:50, 2] = 1.0
    outcome = RiskControl(0.1, binary=True).decide(losses, BUDGETS)
    assert [row.accepted for row in outcome.table] == [True, True, False, False]
    assert outcome.table[3].statistic < 0.1  # it would pass alone
    assert outcome.budget == 0.6 and outcome.accepted == 1
    assert [row.mean_loss for row in outcome.table] == [0, 0, 0.5, 0]
    best = RiskControl(0.1, binary=True).decide(np.zeros((22, 4)), BUDGETS)
    assert best.budget == 0.2 and all(row.accepted for row in best.table)
    entries = RiskControl(0.1, binary=True).decide(np.zeros((22, 2)), [512, 64])
    assert entries.budget == 64


@pytest.mark.parametrize(
    ("control", "needed"),
    [
        (RiskControl(0.1, binary=True), 22),
        (RiskControl(0.1), 22),
        (RiskControl(0.2, max_loss=2.0), 22),
        (RiskControl(0.1, confidence=0.99), 44),
        (RiskControl(0.1, method="crc"), 9),
    ],
)
def test_so_many_cases_are_the_least(control, needed):
    assert control.least_cases == needed
    assert control.decide(np.zeros((needed, 1)), [0.5]).budget == 0.5
    assert control.decide(np.zeros((needed - 1, 1)), [0.5]).budget is None


@pytest.mark.parametrize("method", ["ltt", "crc"])
@pytest.mark.parametrize("max_loss", [1.0, 3.0])
def test_where_none_qualifies_it_says_what_would(method, max_loss):
    losses = max_loss * np.random.default_rng(3).uniform(0.0, 0.3, (20, 1))
    mean = float(losses.mean())
    control = RiskControl(mean * 1.2, max_loss, 0.99, method)
    outcome = control.decide(losses, [0.8])
    assert outcome.budget is None and outcome.accepted is None
    reachable = control.reachable(mean, 20)
    for factor, budget in ((1.0001, 0.8), (0.9999, None)):
        assert RiskControl(reachable * factor, max_loss, 0.99, method).decide(losses, [0.8]).budget == budget
    needed = control.cases_needed(mean)
    assert needed is not None and needed > 20
    assert control.decide(np.tile(losses, (math.ceil(needed / 20), 1)), [0.8]).budget == 0.8
    assert control.cases_needed(control.bound) is None


def test_conformal_risk_control_makes_losses_monotone():
    losses = np.array([[0.0, 1.0, 0.0]] * 4 + [[0.0, 0.0, 0.0]] * 36)
    rows = RiskControl(0.15, method="crc").decide(losses, [0.6, 0.4, 0.2]).table
    assert [row.statistic for row in rows] == pytest.approx([1 / 41, 5 / 41, 5 / 41])
    assert rows[2].mean_loss == 0.0 and rows[2].accepted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bound": 0.0}, "between 0 and the largest loss, 1, got 0"),
        ({"bound": 1.0}, "between 0 and the largest loss"),
        ({"bound": 0.1, "confidence": 1.0}, "confidence must be between 0 and 1, got 1"),
        ({"bound": 0.1, "method": "guess"}, "unknown method 'guess'; known: ltt, crc"),
    ],
)
def test_what_cannot_be_asked_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RiskControl(**values)


@pytest.mark.parametrize(
    ("losses", "budgets", "message"),
    [
        (np.zeros((0, 2)), [0.5, 0.2], r"expected losses \(cases, 2\) .* got \(0, 2\)"),
        (np.zeros((3, 1)), [0.5, 0.2], r"got \(3, 1\)"),
        (np.zeros((3, 2)), [0.2, 0.5], r"budgets must fall .* got \[0.2, 0.5\]"),
        (np.zeros((3, 2)), [0.5, 0.5], "budgets must fall"),
        (np.full((3, 2), 1.5), [0.5, 0.2], r"losses must lie in \[0, 1\], got 1.5"),
        (np.full((3, 2), np.nan), [0.5, 0.2], r"losses must lie in \[0, 1\], got nan"),
        (np.full((3, 2), 0.5), [0.5, 0.2], "binary losses are 0 or 1"),
    ],
)
def test_what_cannot_be_decided_is_refused(losses, budgets, message):
    with pytest.raises(ValueError, match=message):
        RiskControl(0.1, binary=True).decide(losses, budgets)


def test_resplits_of_cases_that_are_alike_keep_the_promise():
    rng = np.random.default_rng(4)
    losses = np.stack([mostly_nothing(rng, risk, 400) for risk in (0.02, 0.05, 0.08, 0.3)], axis=1)
    found = resplit(losses, BUDGETS, range(400), RiskControl(0.1), splits=100, seed=5)
    assert found.splits == 100 and found.rate <= 0.1
    assert sum(found.chosen.values()) + found.none == 100
    assert 0.6 in found.chosen and 0.2 not in found.chosen and 0.01 < found.mean_loss < 0.1
    assert found == resplit(losses, BUDGETS, range(400), RiskControl(0.1), splits=100, seed=5)
    assert found != resplit(losses, BUDGETS, range(400), RiskControl(0.1), splits=100, seed=6)


def test_resplits_never_tear_a_group_apart():
    """Half of the groups lose everything: calibrated on the others, the promise breaks; torn groups would show it."""
    groups = [0] * 100 + [1] * 100
    losses = np.array(groups, dtype=float)[:, None]
    found = resplit(losses, [0.5], groups, RiskControl(0.1, binary=True), splits=200)
    assert found.chosen == {0.5: found.broken} and found.none == 200 - found.broken
    assert 60 < found.broken < 140 and found.mean_loss == 1.0
    apart = resplit(losses, [0.5], range(200), RiskControl(0.1, binary=True), splits=50)
    assert apart.none == 50 and math.isnan(apart.mean_loss) and apart.rate == 0


def test_resplits_need_two_groups():
    with pytest.raises(ValueError, match="two or more different ones, got 1"):
        resplit(np.zeros((3, 1)), [0.5], [7, 7, 7], RiskControl(0.1))
    with pytest.raises(ValueError, match="expected the groups of 3 cases"):
        resplit(np.zeros((3, 1)), [0.5], [1, 2], RiskControl(0.1))
