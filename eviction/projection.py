"""The output projection W_O of an attention module, head by head."""

from __future__ import annotations

import torch
from torch import nn

from ..retention.seams import AttentionLayer


def has_output_weight(layer: AttentionLayer) -> bool:
    """Whether `output_weight` can be had: the module's `o_proj` is a linear layer with a floating-point weight."""
    projection = getattr(layer.module, "o_proj", None)
    if not isinstance(projection, nn.Linear) or not projection.weight.is_floating_point():
        return False
    return projection.weight.shape[1] % layer.num_heads == 0


def output_weight(layer: AttentionLayer) -> torch.Tensor:
    """W_O of a layer for which `has_output_weight`, `(num_heads, value_dim, hidden_size)`, a view of the weight."""
    projection = layer.module.o_proj
    assert isinstance(projection, nn.Linear), "the session has checked the module"
    return projection.weight.detach().t().unflatten(0, (layer.num_heads, -1))
