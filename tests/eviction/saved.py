"""Caches to be saved, and a file of one."""

from __future__ import annotations

from typing import Any

import torch

OPTIONS: dict[str, Any] = {"sinks": 2, "recent": 4, "buffer": 3, "floor": 0.3, "protect": [(5, 8)]}


@torch.no_grad()
def filled(session, model, prompt):
    """A cache of two rows, one of them padded in the prompt and in a question, and its mask with the next column."""
    mask = torch.ones(2, 46, dtype=torch.long)
    mask[1, :11] = mask[0, 40:42] = 0
    cache = session.new_cache()
    model(prompt(2, 40), attention_mask=mask[:, :40], past_key_values=cache)
    model(prompt(2, 5, seed=1), attention_mask=mask[:, :45], past_key_values=cache)
    return cache, mask
