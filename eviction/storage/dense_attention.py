"""Attention over stored entries as dense tensors, where fused attention over segments does not apply.

* Latents (multi-head latent attention, DeepSeek-V2): an entry serves all heads of its layer. The cache of these models
  holds, for every token, a compressed latent and a rotated key part; the attention module expands them to keys and
  values of every head (`expand_kv`). That is done for the stored entries at every forward, so memory is saved, and not
  time: the expansion of n entries costs what a prompt of n tokens pays for it.
* Other softmaxes (capped logits, learned sinks) where no kernel runs: those for pages, and for one query per head on a
  CPU, have them. Logits are made explicitly, one key/value head at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...retention.ops.softmax import Softmax
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
    visible = _visible(valid, step)
    out = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    return _without_padding(out, step).transpose(1, 2)


def explicit_attention(
    store: SegmentStore, query: torch.Tensor, scaling: float | None, step: ForwardStep, softmax: Softmax
) -> torch.Tensor:
    """As `attention.ragged_attention`, with a softmax that fused attention lacks; logits and weights are fp32."""
    heads = store.num_kv_heads
    group = query.shape[1] // heads
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    index, valid = store.dense_index()
    key, value, visible = store.dense(store.key, index), store.dense(store.value, index), _visible(valid, step)
    parts = []
    for head in range(heads):
        own = slice(head * group, (head + 1) * group)
        dots = (query[:, own] @ key[:, head : head + 1].transpose(-1, -2)).float() * scale
        logits = softmax.capped(dots).masked_fill(~visible[:, head : head + 1], -torch.inf)
        sinks = None if softmax.sinks is None else softmax.sinks[own]
        weights = Softmax(softmax.softcap, sinks).weights(logits)
        parts.append(weights.to(value.dtype) @ value[:, head : head + 1])
    return _without_padding(torch.cat(parts, dim=1), step).transpose(1, 2)


def _visible(valid: torch.Tensor, step: ForwardStep) -> torch.Tensor:
    """bool `(batch, heads, q_len, n)`: the entries that each new token sees, of `valid` `(batch, heads, n)` ones.

    Entries end with those of the new tokens; a query does not see those of newer tokens.
    """
    limit = valid.sum(2, keepdim=True) - step.newer_tokens.clamp(min=0).unsqueeze(1)
    return torch.arange(valid.shape[2], device=valid.device) < limit.unsqueeze(3)


def _without_padding(out: torch.Tensor, step: ForwardStep) -> torch.Tensor:
    """`(batch, num_heads, q_len, value_dim)` with zeros for padding."""
    return out if step.valid is None else out.masked_fill(~step.valid[:, None, :, None], 0.0)
