"""Learned retention: keep the entries whose gates predict the most remaining usefulness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layer_view import LayerView
from .policy import Policy


def log_retention(view: LayerView) -> torch.Tensor:
    """`(T + 1 - i) · log β_i`, fp32 `(batch, num_kv_heads, n)`: the log of the retention at the next token.

    Between the chunks of a prompt T is the end of the prompt: an entry is scored by its retention after the whole
    prompt has been read, so that the evictions after all chunks work towards the same choice.
    """
    age = view.horizon.view(-1, 1, 1) + 1 - view.positions
    return age.float() * view.log_beta


@dataclass(frozen=True)
class Retention(Policy):
    """`score_i = (T + 1 - i) · log β_i`, the log of the retention β^(T+1-i) at the next token.

    Source: TRIM-KV and DBTrimKV (Bui et al., "Cache What Lasts" and "Make Each Token Count"). Needs trained gates;
    scores of different layers and heads are comparable, hence the global scope.

    Attributes:
        lookahead: n, the number of next tokens summed over: `log Σ_{s=1..n} β^(T+s-i)`, the retention expected over
            them; the larger, the more β counts relative to age.
        threshold: an entry whose retention at the next token is below it, in (0, 1), is evicted at the next eviction
            even if the budget is not used up. Evictions run when the budget is exceeded; protected tokens of the plan
            are kept.
    """

    lookahead: int = 1
    threshold: float | None = None

    name: ClassVar[str] = "retention"
    needs: ClassVar[frozenset[str]] = frozenset({"log_beta"})
    default_scope: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        if self.lookahead < 1:
            raise ValueError(f"lookahead must be at least 1 token, got {self.lookahead}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold is a retention in (0, 1), or None, got {self.threshold}")

    def score(self, view: LayerView) -> torch.Tensor:
        now = log_retention(view)
        score = now
        if self.lookahead > 1:
            score = now + log_geometric_sum(view.log_beta, self.lookahead)
        return score if self.threshold is None else score.masked_fill(now < math.log(self.threshold), -torch.inf)


def log_geometric_sum(log_beta: torch.Tensor, n: int) -> torch.Tensor:
    """`log (1 + β + … + β^(n-1))`, shaped as `log_beta`; log n at β = 1."""
    rate = log_beta.double().clamp(max=-1e-12)  # below this the quotient is n to double precision
    return (torch.expm1(n * rate) / torch.expm1(rate)).log().to(log_beta.dtype)
