"""R-KV: keep entries that are attended to and whose keys are not redundant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch.nn import functional as F

from tenure.checked import Range

from ..layer_view import LayerView
from .common import Share, Window, check_kernel, own_entries
from .policy import Policy


@dataclass(frozen=True)
class RKV(Policy):
    """The attention of the last queries, less the redundancy of the key.

    `mix · attention - (1 - mix) · redundancy`. The attention is a softmax over the entries outside the window of the
    logits, of which each is the maximum over the heads of a group; mean over the queries, and pooled by the maximum.
    The redundancy is a softmax over the head's entries of their mean cosine similarity to the other keys, where each
    key's last one more similar than `threshold` counts as 0.

    Source: "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models" (Cai et al., 2025), section 3; as in the
    released code, whose mix is 0.07 (the paper: 0.1), and which takes the first entry where no key is that similar.

    Attributes:
        window: number of the last queries that observe; their own entries are kept.
        kernel: width of the pooling, odd.
        mix: the weight of the attention, in [0, 1].
        threshold: keys with a greater cosine similarity are similar.
    """

    window: Window = 8
    kernel: Window = 7
    mix: Share = 0.07
    threshold: Annotated[float, Range(-1, 1)] = 0.5

    name: ClassVar[str] = "rkv"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel("RKV", self.kernel)

    @property
    def window_size(self) -> int:
        return self.window

    def score(self, view: LayerView) -> torch.Tensor:
        own = own_entries(view, self.window)
        attention = F.max_pool1d(
            _attention(view, ~own & view.valid), self.kernel, stride=1, padding=self.kernel // 2
        )  # 0 outside, which is no maximum
        redundancy = torch.zeros_like(attention)
        for row, lengths in enumerate(view.valid.sum(2).tolist()):
            for head, n in enumerate(lengths):
                redundancy[row, head, :n] = redundancy_of(view.keys[row, head, :n], self.threshold)
        score = self.mix * attention - (1 - self.mix) * redundancy
        return score.masked_fill(own, torch.inf)


def redundancy_of(keys: torch.Tensor, threshold: float) -> torch.Tensor:
    """fp32 `(n,)`, a softmax over one head's `keys` `(n, head_dim)`; see `RKV`."""
    n = len(keys)
    unit = keys.float() / (keys.float().norm(dim=-1, keepdim=True) + 1e-8)
    similar = unit @ unit.T
    similar.fill_diagonal_(0.0)
    index = torch.arange(n, device=keys.device)
    last = torch.where(similar > threshold, index, 0).amax(1)
    similar[index, last] = 0.0
    return similar.mean(0).softmax(0)


def _attention(view: LayerView, outside: torch.Tensor) -> torch.Tensor:
    """fp32 `(batch, num_kv_heads, n)`, mean over the window's queries; 0 for entries that are not `outside` of it."""
    groups = view.queries.unflatten(1, (view.shape[1], view.num_kv_groups)).float()
    logits = torch.stack([group @ view.keys.float().transpose(2, 3) for group in groups.unbind(2)]).amax(0)
    weights = (logits * view.scaling).masked_fill(~outside.unsqueeze(2), -torch.inf).softmax(-1)
    seen = (view.query_positions >= 0)[:, None, :, None]
    weights = torch.where(seen & outside.unsqueeze(2), weights, 0.0)  # also where nothing is outside
    return weights.sum(2) / seen.sum(2).clamp(min=1)
