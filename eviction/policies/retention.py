"""Learned retention: how much of an entry's usefulness is left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .base import Policy

if TYPE_CHECKING:
    from ..view import LayerView


def log_retention(view: LayerView, ahead: int = 0) -> torch.Tensor:
    """`(T + 1 + ahead - i) · log β_i`, fp32 `(batch, num_kv_heads, n)`: the log of the retention so many tokens on."""
    age = view.time.view(-1, 1, 1) + 1 + ahead - view.positions
    return age.float() * view.log_beta


@dataclass(frozen=True)
class Retention(Policy):
    """`score_i = (T + 1 + lookahead - i) · log β_i`, the log of the retention β^(T+1-i) at the next token, or later.

    Source: TRIM-KV and DBTrimKV (Bui et al., "Cache What Lasts" and "Make Each Token Count"). Needs trained gates;
    scores of different layers and heads are comparable, hence the global scope.

    Attributes:
        lookahead: judge by the retention so many tokens after the next: the larger, the more β counts against age.
        threshold: an entry whose retention at the next token is below it, in (0, 1), never stays: at an eviction it
            goes even if the budget has room. Evictions run when the budget is exceeded; sinks and recent tokens of the
            plan stay.
    """

    lookahead: int = 0
    threshold: float | None = None

    name: ClassVar[str] = "retention"
    needs: ClassVar[frozenset[str]] = frozenset({"log_beta"})
    default_scope: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        if self.lookahead < 0:
            raise ValueError(f"lookahead must not be negative, got {self.lookahead}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold is a retention in (0, 1), or None, got {self.threshold}")

    def score(self, view: LayerView) -> torch.Tensor:
        score = log_retention(view, self.lookahead)
        if self.threshold is None:
            return score
        return score.masked_fill(log_retention(view) < math.log(self.threshold), -torch.inf)
