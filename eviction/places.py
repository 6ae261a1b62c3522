"""Where the entries of a store stood at one time, for whoever wants to find them in the buffers of then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Places(Protocol):
    """Where the entries of a store stood at one time."""

    def index(self, segments: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Flat indices of the first `lengths[i]` entries of each of `segments`, int64, one segment after the other."""
        ...


@dataclass(frozen=True)
class SegmentPlaces:
    """Where segments began."""

    starts: list[int]
    device: torch.device

    def index(self, segments: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        parts = [torch.arange(self.starts[s], self.starts[s] + n) for s, n in zip(segments, lengths, strict=True)]
        return torch.cat(parts).to(self.device)
