"""Rates that are fitted to the batches of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..node import Tier
from .costs import Batch, Links


@dataclass(frozen=True)
class FittedCosts:
    """Rates that were fitted to measured batches (`fit`), in seconds.

    Attributes:
        forward_s: of every forward pass.
        token_s: of every new token. pair_s: of every pair of a new token and one before it.
        request_s: of every request that decodes, on top.
        links: for `reload_s`.
    """

    forward_s: float
    token_s: float
    pair_s: float
    request_s: float
    links: Links = field(default_factory=lambda: Links(0.0))

    def batch_s(self, batch: Batch) -> float:
        return sum(
            a * b
            for a, b in zip(features(batch), (self.forward_s, self.token_s, self.pair_s, self.request_s), strict=True)
        )

    def recompute_s(self, start: int, end: int) -> float:
        return self.batch_s(Batch(chunks=((start, end),)))

    def reload_s(self, nbytes: int, tier: Tier) -> float:
        return self.links.reload_s(nbytes, tier)


def features(batch: Batch) -> tuple[float, float, float, float]:
    """What `FittedCosts` multiplies: forward passes, new tokens of prompts, pairs, decoded tokens."""
    new = sum(end - start for start, end in batch.chunks)
    contexts = sum(batch.contexts) + len(batch.contexts) * (batch.steps - 1) / 2
    pairs = sum((end * end - start * start) / 2 for start, end in batch.chunks) + batch.steps * contexts
    return (float(batch.steps), float(new), pairs, float(batch.steps * len(batch.contexts)))


def fit(measured: Sequence[tuple[Batch, float]], links: Links) -> FittedCosts:
    """Least squares over batches and the seconds they took, no rate below 0.

    A batch counts by one over what it is predicted to take, again and again until that settles; then the predicted
    seconds add up to the measured ones, as those of a Poisson regression do.

    Raises:
        ValueError: fewer than 8 batches.
    """
    if len(measured) < 8:
        raise ValueError(f"got {len(measured)} measured batches; accepted: 8 or more")
    seconds = np.array([max(1e-9, took) for _, took in measured])
    rows = np.array([features(batch) for batch, _ in measured])
    expected = np.full(len(seconds), seconds.mean())
    rates = np.zeros(rows.shape[1])
    for _ in range(20):
        rates = _no_rate_below_0(rows / np.sqrt(expected)[:, None], seconds / np.sqrt(expected))
        expected = np.maximum(rows @ rates, 1e-3 * seconds.mean())
    forward_s, token_s, pair_s, request_s = map(float, rates)
    return FittedCosts(forward_s, token_s, pair_s, request_s, links)


def _no_rate_below_0(rows: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Least squares; a rate that comes out below 0 is left out, and the others are found anew."""
    scale = np.maximum(np.linalg.norm(rows, axis=0), 1e-12)
    rates, active = np.zeros(rows.shape[1]), np.ones(rows.shape[1], dtype=bool)
    while active.any():
        rates[:] = 0.0
        rates[active] = np.linalg.lstsq(rows[:, active] / scale[active], goal, rcond=None)[0] / scale[active]
        if (rates >= 0).all():
            break
        active &= rates > 0
    return rates
