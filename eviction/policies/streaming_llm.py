"""StreamingLLM: keep the first tokens and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layer_view import LayerView
from .common import Tokens
from .policy import Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Attention sinks and a sliding window.

    Source: "Efficient Streaming Language Models with Attention Sinks" (Xiao et al., 2023). Positions are not
    renumbered.

    Attributes:
        first: number of first tokens that are kept.
    """

    first: Tokens = 4

    name: ClassVar[str] = "streaming_llm"

    def score(self, view: LayerView) -> torch.Tensor:
        positions = view.positions
        return torch.where(positions < self.first, view.time.view(-1, 1, 1) + 1, positions).float()
