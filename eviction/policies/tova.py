"""TOVA: keep the entries that the last query attends to, over all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layer_view import LayerView
from .common import own_entries
from .policy import Policy


@dataclass(frozen=True)
class TOVA(Policy):
    """Attention of the last query, averaged over all heads of the layer, which keep the same tokens.

    Source: "Transformers are Multi-State RNNs" (Oren et al., 2024), section 3.2. A head that no longer stores a token
    counts as paying no attention to it.
    """

    name: ClassVar[str] = "tova"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})

    @property
    def window_size(self) -> int:
        return 1

    def score(self, view: LayerView) -> torch.Tensor:
        attention = view.window_attention.squeeze(3).mean(2)
        # Heads may store different tokens: the mean is over those at the same position.
        place = view.positions.clamp(min=0).flatten(1)
        total = attention.new_zeros(view.shape[0], int(view.time.max()))
        total.scatter_add_(1, place, attention.masked_fill(~view.valid, 0.0).flatten(1))
        total = view.of_all_heads(total.unsqueeze(1), 0.0).sum(1)
        mean = total.gather(1, place).view(view.shape) / view.attention.all_kv_heads
        return mean.masked_fill(own_entries(view, 1), torch.inf)
