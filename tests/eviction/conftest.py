"""Prompts and gates shared by the eviction tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from tenure.retention import RetentionGates


@pytest.fixture
def gates_for() -> Callable[[PreTrainedModel], RetentionGates]:
    """Random gates whose log β differ from token to token, head to head and layer to layer."""

    def make(model: PreTrainedModel) -> RetentionGates:
        torch.manual_seed(1)
        return RetentionGates.for_model(model, gate_width=8, init_std=0.5, initial_bias=2.0)

    return make


@pytest.fixture
def prompt() -> Callable[..., torch.Tensor]:
    """Token ids `(batch, length)` free of special tokens; the same for the same arguments."""

    def make(batch: int, length: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 128, (batch, length), generator=generator)

    return make
