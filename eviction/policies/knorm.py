"""Knorm: keep the keys of the smallest norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layer_view import LayerView
from .policy import Policy


@dataclass(frozen=True)
class Knorm(Policy):
    """Negative L2 norm of the key.

    Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression" (Devoto et al., 2024).
    """

    name: ClassVar[str] = "knorm"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def score(self, view: LayerView) -> torch.Tensor:
        return -torch.linalg.vector_norm(view.keys.float(), dim=-1)
