"""CAKE: layers get budgets by the spread and the change of their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch.nn import functional as F

from tenure.checked import NotNegative, Positive, Range

from ..layer_view import LayerView
from .common import MAX_WINDOW, Window, check_kernel, own_entries
from .policy import Policy


@dataclass(frozen=True)
class CAKE(Policy):
    """Mean and variance over the last queries of the attention to an entry, under budgets by the layers' preferences.

    An entry's score is `mean + gamma · variance`, pooled along the sequence, mean over the heads of a group. A layer's
    preference is `H^(1/tau_entropy) · V^(1/tau_variance)`, H the entropy of the window's attention outside the window
    and V its variance over the queries, both summed over heads, queries and entries.

    Source: "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences" (Qin et al., 2025), sections 3 and
    4; as in the released code. It tunes both temperatures for each model and budget, between 0.4 and 2.3 (Llama-3.1-8B
    at 1024 entries: 1.6 and 0.4); 1 stands for untuned. Later evictions choose anew here; the code continues as
    SnapKV under the prompt's budgets.

    Attributes:
        window: number of the last queries that observe; their own entries are kept.
        kernel: width of the pooling, odd.
        gamma: weight of the variance.
        tau_entropy, tau_variance: temperatures of the preference.
    """

    window: Annotated[int, Range(2, MAX_WINDOW)] = 32  # of one query there is no variance
    kernel: Window = 5
    gamma: NotNegative = 200.0
    tau_entropy: Positive = 1.0
    tau_variance: Positive = 1.0

    name: ClassVar[str] = "cake"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})
    default_scope: ClassVar[str] = "preference"
    scores_heads_alone: ClassVar[bool] = False  # a layer's preference sums over its heads

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel("CAKE", self.kernel)

    @property
    def window_size(self) -> int:
        return self.window

    def score(self, view: LayerView) -> torch.Tensor:
        own = own_entries(view, self.window)
        attention = _outside(view, own)
        indicator = attention.mean(3) + self.gamma * attention.var(3)
        pooled = F.avg_pool1d(indicator.flatten(0, 1), self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.view_as(indicator).mean(2).masked_fill(own, torch.inf)

    def layer_preference(self, view: LayerView) -> torch.Tensor:
        attention = _outside(view, own_entries(view, self.window))
        entropy = -(attention * (attention + 1e-10).log()).sum((1, 2, 3, 4))
        variance = attention.var(3).sum((1, 2, 3))
        return entropy.clamp(min=0) ** (1 / self.tau_entropy) * variance ** (1 / self.tau_variance)


def _outside(view: LayerView, own: torch.Tensor) -> torch.Tensor:
    """fp32 `(batch, num_kv_heads, num_kv_groups, window, n)`: the attention, 0 for the window's own entries."""
    hidden = (own | ~view.valid)[:, :, None, None]
    return view.window_attention.masked_fill(hidden, 0.0)
