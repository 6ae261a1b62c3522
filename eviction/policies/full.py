"""The full cache: nothing is evicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .base import Policy

if TYPE_CHECKING:
    from ..layer_view import LayerView


@dataclass(frozen=True)
class Full(Policy):
    """Keeps everything, whatever the budget: the reference, and a prefill that other policies compress later."""

    name: ClassVar[str] = "full"
    evicts: ClassVar[bool] = False

    def score(self, view: LayerView) -> torch.Tensor:
        return torch.zeros(view.shape, device=view.time.device)
