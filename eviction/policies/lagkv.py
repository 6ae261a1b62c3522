"""LagKV: keep the entries that stand out against the next partition of the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from tenure.checked import Range

from ..layer_view import LayerView
from .common import Tokens
from .policy import Policy


@dataclass(frozen=True)
class LagKV(Policy):
    """Spread of an entry's key and value over the channels, each scaled by its range in the next partition.

    A head's entries after the first ones form partitions; within each, an entry's score is its rank. The last whole
    partition, which has no next one, and the entries after it are kept; a head with fewer than two partitions keeps
    its newest entries.

    Source: "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important" (Liang et al., 2025),
    equations 2 to 9; as in kvpress.

    Attributes:
        first: number of a head's first entries, which are kept and not part of a partition.
        lag: entries of a partition.
        across: let partitions compete by the score itself instead of the rank.
    """

    first: Tokens = 4
    lag: Annotated[int, Range(1, 2**31)] = 128
    across: bool = False

    name: ClassVar[str] = "lagkv"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values"})

    def score(self, view: LayerView) -> torch.Tensor:
        n = view.shape[2]
        lengths = view.valid.sum(2, keepdim=True)
        index = torch.arange(n, device=lengths.device) - self.first
        partitions = max(0, n - self.first) // self.lag
        score = torch.ones(view.shape, dtype=torch.float32, device=lengths.device)
        if partitions >= 2:
            inner = slice(self.first, self.first + (partitions - 1) * self.lag)
            spread = _spread(view.keys[:, :, self.first :], self.lag)
            spread = (spread + _spread(view.values[:, :, self.first :], self.lag)) / 2
            if not self.across:
                spread = spread.argsort(-1).argsort(-1) / self.lag
            score[:, :, inner] = spread.flatten(2)
        # Partition p has a whole next one if the head reaches the end of that one.
        followed = self.first + (index // self.lag + 2) * self.lag <= lengths
        score = score.masked_fill((index < 0) | ~followed, 1.0)
        newest = index / (lengths - self.first).clamp(min=1)
        short = (lengths < self.first + 2 * self.lag) & (index >= 0)
        return torch.where(short, newest, score)


def _spread(states: torch.Tensor, lag: int) -> torch.Tensor:
    """Softmax over each partition of its entries' standard deviations, scaled by the next one's range.

    From `(batch, num_kv_heads, n, dim)` to fp32 `(batch, num_kv_heads, n // lag - 1, lag)`.
    """
    whole = states.shape[2] // lag * lag
    parts = states[:, :, :whole].float().unflatten(2, (-1, lag))
    low, high = parts[:, :, 1:].aminmax(dim=3, keepdim=True)
    # A channel that is constant there has no range: avoid 0/0.
    scaled = (parts[:, :, :-1] - low) / (high - low).clamp(min=1e-6)
    return scaled.std(dim=-1).softmax(-1)
