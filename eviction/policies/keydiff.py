"""KeyDiff: keep the keys that differ most from the mean key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..layer_view import LayerView
from .policy import Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Negative cosine similarity to the mean of the normalised keys of the head.

    Source: "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments" (Park et al., 2025), equation 3.
    """

    name: ClassVar[str] = "keydiff"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def score(self, view: LayerView) -> torch.Tensor:
        keys = F.normalize(view.keys.float(), dim=-1)
        valid = view.valid.unsqueeze(-1)
        anchor = (keys * valid).sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)
        return -F.cosine_similarity(keys, anchor, dim=-1)
