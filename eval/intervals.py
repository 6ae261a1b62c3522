"""Confidence intervals and tests for means over a finite number of cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def to_dict(self, scale: Callable[[float], float] = float) -> dict[str, float]:
        """`value, low, high`, each after `scale`, which must rise."""
        return {"value": scale(self.value), "low": scale(self.low), "high": scale(self.high)}


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a proportion (Wilson 1927); sensible at 0 and 1 and for few trials.

    Raises:
        ValueError: no trials, more successes than trials, or a confidence outside (0, 1).
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    # Rounding must not push the ends past 0, 1 or the estimate itself.
    return Interval(share, max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))


def bootstrap_mean(values: Sequence[float], seed: int = 0, resamples: int = 2000, confidence: float = 0.95) -> Interval:
    """The mean of `values` with its percentile bootstrap interval; the same seed gives the same interval.

    Raises:
        ValueError: no values, or a confidence outside (0, 1).
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("no values to take the mean of")
    means = _resampled_means(data, seed, resamples)
    tail = (1 - _checked(confidence)) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(float(data.mean()), float(low), float(high))


@dataclass(frozen=True)
class PairedDifference(Interval):
    """Mean of `a − b` over the same cases, its interval and a two-sided p-value for "no difference"."""

    p_value: float


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = 5000, confidence: float = 0.95
) -> PairedDifference:
    """Compares two methods on the same cases by resampling the cases (Efron & Tibshirani 1993, chapters 13 and 16).

    Args:
        a, b: one number a case and method, in the same order of cases.

    Raises:
        ValueError: different numbers of cases, none, or a confidence outside (0, 1).
    """
    if len(a) != len(b):
        raise ValueError(f"paired values must be of the same cases, got {len(a)} and {len(b)}")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    interval = bootstrap_mean(list(differences), seed, resamples, confidence)
    # Under "no difference" the distribution is the observed one moved to mean 0.
    shifted = _resampled_means(differences - differences.mean(), seed, resamples)
    extreme = int((np.abs(shifted) >= abs(interval.value) - 1e-12).sum())
    return PairedDifference(interval.value, interval.low, interval.high, (extreme + 1) / (resamples + 1))


def stratified_mean(
    strata: Sequence[Sequence[float]], seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """The mean of the strata's means, e.g. over tasks, by resampling the cases within each (Efron & Tibshirani 1993).

    Raises:
        ValueError: no strata, one without values, or a confidence outside (0, 1).
    """
    return _percentiles(*_stratified(strata, seed, resamples), confidence)


def stratified_difference(
    strata: Sequence[Sequence[float]], seed: int = 0, resamples: int = 5000, confidence: float = 0.95
) -> PairedDifference:
    """`stratified_mean` of differences `a − b` of the same cases, with the p-value of `paired_bootstrap`."""
    value, means = _stratified(strata, seed, resamples)
    interval = _percentiles(value, means, confidence)
    extreme = int((np.abs(means - value) >= abs(value) - 1e-12).sum())
    return PairedDifference(interval.value, interval.low, interval.high, (extreme + 1) / (resamples + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, in order, adjusted for their number (Holm 1979): in 95 % of studies none below 5 % is wrong."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda one: p_values[one])):
        largest = max(largest, min(1.0, p_values[number] * (len(p_values) - rank)))
        adjusted[number] = largest
    return adjusted


def _stratified(strata: Sequence[Sequence[float]], seed: int, resamples: int) -> tuple[float, np.ndarray]:
    arrays = [np.asarray(values, dtype=np.float64) for values in strata]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError("no values to take the mean of")
    means = [_resampled_means(array, (seed, number), resamples) for number, array in enumerate(arrays)]
    return float(np.mean([array.mean() for array in arrays])), np.mean(means, axis=0)


def _percentiles(value: float, means: np.ndarray, confidence: float) -> Interval:
    tail = (1 - _checked(confidence)) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(value, float(low), float(high))


def _resampled_means(data: np.ndarray, seed: int | tuple[int, ...], resamples: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 1_000_000 // data.size)  # bounds the memory of long inputs
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        means[start:stop] = data[rng.integers(0, data.size, (stop - start, data.size))].mean(axis=1)
    return means


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return confidence
