"""H2O: the entries with the most attention so far (heavy hitters), and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layer_view import LayerView
from ..ops.window_risk_by_heads import HELD_ON_CPU, HELD_ON_GPU, received_by_heads
from .common import Share, window_attention
from .policy import Policy


@dataclass(frozen=True)
class H2O(Policy):
    """Attention that an entry has received from every query so far, summed, mean over the heads of a group.

    Source: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (Zhang et al., 2023),
    algorithm 1: half of the budget for heavy hitters, half for the newest tokens. Attention is computed a second time
    for this, in pieces.

    Attributes:
        recent: the share of a head's budget reserved for the newest tokens.
        average: divide by the number of queries that could attend to the entry, without which the sum favours old
            entries; as `ObservedAttentionPress` of kvpress.
    """

    recent: Share = 0.5
    average: bool = False

    name: ClassVar[str] = "h2o"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    states: ClassVar[tuple[str, ...]] = ("attention",)

    def observe(self, view: LayerView, queries: torch.Tensor, query_positions: torch.Tensor) -> dict[str, torch.Tensor]:
        held = HELD_ON_CPU if queries.device.type == "cpu" else HELD_ON_GPU
        batch, heads, n = view.shape
        if batch * heads * view.num_kv_groups * n * queries.shape[2] <= held:
            new = window_attention(view, queries, query_positions).sum(3).mean(2)
        else:
            given = queries, view.keys, view.positions, query_positions, view.scaling
            new = received_by_heads(*given, held)
        return {"attention": view.state("attention") + new}

    def score(self, view: LayerView) -> torch.Tensor:
        total = view.state("attention")
        if self.average:
            total = total / (view.time.view(-1, 1, 1) - view.positions)
        newest = (view.budget * self.recent).long()
        return total.masked_fill(view.positions >= (view.time - newest).view(-1, 1, 1), torch.inf)
