"""A padded prompt, and gates that forget, for tiny models of any architecture."""

from __future__ import annotations

import torch

from tenure.retention import RetentionGates

IDS = torch.randint(3, 140, (2, 40), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[1, :11] = 0


def forgetful(model) -> RetentionGates:
    torch.manual_seed(3)
    return RetentionGates.for_model(model, gate_width=16, initial_bias=1.0, init_std=0.5)
