"""AdaKV's budgets per head with CriticalKV's selection within each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layer_view import LayerView
from .common import best_of_each_head, own_entries, ranks
from .criticalkv import CriticalKV
from .snapkv import SnapKV


@dataclass(frozen=True)
class AdaCriticalKV(CriticalKV):
    """The heads of a layer compete by SnapKV's score for budgets; each fills its own in CriticalKV's two stages.

    Source: "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective" (Feng et al., 2025);
    as `CriticalAdaKVPress` of kvpress. Budgets per head are computed here, with the default floor; for the scopes
    "head" and "pyramid", which fix every head's budget, use `CriticalKV`.
    """

    name: ClassVar[str] = "ada_criticalkv"
    default_scope: ClassVar[str] = "layer"
    default_floor: ClassVar[float] = 0.2

    def score(self, view: LayerView) -> torch.Tensor:
        attention = SnapKV.score(self, view)
        valid = view.of_all_heads(view.valid.to(attention.dtype), 0.0).bool()
        of_all_heads = view.of_all_heads(attention, 0.0)
        budgets = view.of_own_heads(head_budgets(of_all_heads, valid, view.budget, self.default_floor))
        critical = (attention + self.epsilon) * view.value_norms
        first = best_of_each_head(attention, view.valid, (budgets * self.first_stage).long())
        first |= own_entries(view, self.window)
        # Entries that the stages choose score above all others, so that a layer's top k is this choice.
        chosen = best_of_each_head(critical.masked_fill(first, torch.inf), view.valid, budgets)
        score = critical / (1 + critical) + chosen  # in [0, 1), in the same order
        return score.masked_fill(first & chosen, torch.inf)


def head_budgets(score: torch.Tensor, valid: torch.Tensor, average: torch.Tensor, floor: float) -> torch.Tensor:
    """Number of entries each head keeps when the heads of a layer compete; int64 `(batch, num_kv_heads)`.

    Args:
        score: fp32 `(batch, num_kv_heads, n)`.
        valid: bool of that shape.
        average: int64 `(batch,)`: entries per head on average.
        floor: the share of `average` that every head keeps, at least one entry.
    """
    batch, heads, n = score.shape
    safe = (average * floor).long().clamp(min=1).unsqueeze(1).expand(-1, heads)
    lifted = score.masked_fill(best_of_each_head(score, valid, safe), torch.inf)
    place = ranks(lifted.view(batch, 1, -1), valid.view(batch, 1, -1)).view(batch, heads, n)
    return ((place < (average * heads).view(-1, 1, 1)) & valid).sum(2)
