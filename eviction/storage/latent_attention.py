"""Attention over stored latents (multi-head latent attention, DeepSeek-V2): an entry serves all heads of its layer.

The cache of these models holds, for every token, a compressed latent and a rotated key part; the attention module
expands them to keys and values of every head (`expand_kv`). That is done for the stored entries at every forward, so
memory is saved, and not time: the expansion of n entries costs what a prompt of n tokens pays for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..forward_state import ForwardStep
from .segment_store import SegmentStore

# expand(latent (batch, 1, n, rank), rotated (batch, 1, n, rotary_dim)) -> keys and values, (batch, num_heads, n, dim)
Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def latent_attention(
    store: SegmentStore, expand: Expand, query: torch.Tensor, scaling: float | None, step: ForwardStep
) -> torch.Tensor:
    """Attention of the newest tokens, already appended to `store`, over everything stored.

    Args:
        store: one segment a row: latents as keys, rotated key parts as values.
        expand: the attention module's own function.
        query, scaling, step: as in `attention.ragged_attention`.

    Returns:
        `(batch, q_len, num_heads, value_dim)`; zeros for padding.
    """
    index, valid = store.dense_index()
    latent, rotated = store.dense(store.key, index), store.dense(store.value, index)
    key, value = expand(latent.to(query.dtype), rotated.to(query.dtype))
    # Entries end with those of the new tokens: a query does not see the ones of newer tokens.
    limit = valid.sum(2) - step.newer_tokens.clamp(min=0)  # (batch, q_len)
    visible = torch.arange(key.shape[2], device=key.device) < limit.unsqueeze(2)
    out = scaled_dot_product_attention(query, key, value, attn_mask=visible.unsqueeze(1), scale=scaling)
    if step.valid is not None:
        out = out.masked_fill(~step.valid[:, None, :, None], 0.0)
    return out.transpose(1, 2)
