"""SnapKV: keep the entries that the last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from ..layer_view import LayerView
from .common import Window, check_kernel, own_entries
from .policy import Policy


@dataclass(frozen=True)
class SnapKV(Policy):
    """Attention of the last queries, averaged over them and over the heads of a group, pooled along the sequence.

    Source: "SnapKV: LLM Knows What You are Looking for Before Generation" (Li et al., 2024), section 4; defaults and
    pooling as in kvpress.

    Attributes:
        window: number of the last queries that observe; their own entries are kept.
        kernel: width of the pooling, odd.
        pool: "avg" or "max".
    """

    window: Window = 64
    kernel: Window = 5
    pool: Literal["avg", "max"] = "avg"

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(type(self).__name__, self.kernel)

    @property
    def window_size(self) -> int:
        return self.window

    def score(self, view: LayerView) -> torch.Tensor:
        mean = view.mean_attention
        own = own_entries(view, self.window)
        mean = mean.masked_fill(own | ~view.valid, 0.0)
        pooling = F.avg_pool1d if self.pool == "avg" else F.max_pool1d
        pooled = pooling(mean, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.masked_fill(own, 1.0)  # above any mean of attention shares
