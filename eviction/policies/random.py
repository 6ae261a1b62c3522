"""Random eviction: the baseline that every policy must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from tenure.checked import Range

from ..layer_view import LayerView
from .policy import Policy


@dataclass(frozen=True)
class Random(Policy):
    """A hash of (seed, layer, head, position) in [0, 1): independent of the batch and of the step.

    Attributes:
        seed: of the hash.
    """

    seed: Annotated[int, Range(-(2**31), 2**31)] = 0

    name: ClassVar[str] = "random"

    def score(self, view: LayerView) -> torch.Tensor:
        heads = view.first_head + torch.arange(view.shape[1], device=view.time.device).view(1, -1, 1)
        mixed = _mix(_mix(_mix(view.positions + self.seed) + heads) + view.layer_idx)
        return (mixed & 0xFFFFFF).float() / 2**24


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of the 32-bit integers that spreads every bit (a murmur3 finaliser; int64 keeps the products)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)
