"""CriticalKV: selection by attention, then by attention times the norm of the projected value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tenure.checked import NotNegative

from ..layer_view import LayerView
from .common import Share, best_of_each_head, own_entries
from .snapkv import SnapKV


@dataclass(frozen=True)
class CriticalKV(SnapKV):
    """Half of a head's budget by SnapKV's score s, the rest by `(s + ε) · ‖v_i W_O‖₁`.

    Source: "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective" (Feng et al., 2025),
    algorithm 1; ε and the norm as in kvpress.

    Attributes:
        first_stage: the share of the budget chosen by attention alone.
        epsilon: added to the score, so that entries without attention are ranked by their values.
    """

    first_stage: Share = 0.5
    epsilon: NotNegative = 1e-4

    name: ClassVar[str] = "criticalkv"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "queries", "output_weight"})

    def score(self, view: LayerView) -> torch.Tensor:
        attention = super().score(view)
        count = (view.budget * self.first_stage).long().unsqueeze(1).expand(-1, view.shape[1])
        first = best_of_each_head(attention, view.valid, count)
        score = (attention + self.epsilon) * view.value_norms
        return score.masked_fill(first | own_entries(view, self.window), torch.inf)
