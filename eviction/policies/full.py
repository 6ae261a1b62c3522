"""The full cache: nothing is evicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layer_view import LayerView
from .policy import Policy


@dataclass(frozen=True)
class Full(Policy):
    """Keeps everything, whatever the budget: as the reference, or for a prefill that other policies compress later."""

    name: ClassVar[str] = "full"
    evicts: ClassVar[bool] = False

    def score(self, view: LayerView) -> torch.Tensor:
        return torch.zeros(view.shape, dtype=torch.float32, device=view.time.device)
