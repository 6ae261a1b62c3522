"""Scores of gates without age: an entry's rank is fixed when it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..layer_view import LayerView
from .policy import Policy


@dataclass(frozen=True)
class GateScore(Policy):
    """`score_i = log β_i = logsigmoid(s_i)`, s the gate's raw score; age does not count.

    Source: KVzap and Fast KVzip (gates that predict KVzip's scores). Needs gates trained as scores, see `tenure
    convert`; gates of TRIM-KV and DBTrimKV are decays and belong to `retention`. KVzap protects the last 128 tokens,
    Fast KVzip in decoding the first 4 and the last 8: set `sinks` and `recent`.

    Attributes:
        threshold: entries with a raw score s below it are evicted at the next eviction even if the budget is not used
            up; KVzap's is -4.
    """

    threshold: float | None = None

    name: ClassVar[str] = "gate_score"
    needs: ClassVar[frozenset[str]] = frozenset({"log_beta"})
    default_scope: ClassVar[str] = "global"

    def score(self, view: LayerView) -> torch.Tensor:
        score = view.log_beta
        if self.threshold is None:
            return score
        least = F.logsigmoid(torch.tensor(self.threshold, dtype=score.dtype, device=score.device))
        return score.masked_fill(score < least, -torch.inf)
