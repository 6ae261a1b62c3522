"""Attention of new queries over ragged segments: a C kernel for one query per head, SDPA on views of the storage."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...retention.ops.softmax import ORDINARY, Softmax
from ..forward_state import ForwardStep
from ..ops.segment_attention import find_kernel, segment_attention
from .dense_attention import explicit_attention
from .paged_store import PagedStore
from .segment_store import SegmentStore


def ragged_attention(
    store: SegmentStore, query: torch.Tensor, scaling: float | None, step: ForwardStep, softmax: Softmax = ORDINARY
) -> torch.Tensor:
    """Attention of the newest tokens, already appended to `store`, over everything stored.

    Args:
        store: the layer's segments; the last `step.counts[row]` entries of each are those of the queries' tokens.
        query: `(batch, num_heads, q_len, head_dim)`, post-RoPE.
        scaling: factor of the logits; None for `head_dim ** -0.5`.
        step: the running forward.
        softmax: the model's own variant of it.

    Returns:
        `(batch, q_len, num_heads, value_dim)`; zeros for padding.
    """
    if isinstance(store, PagedStore):
        return store.attend(query, scaling, step, softmax)
    if step.valid is None and query.shape[2] == 1:
        return _one_query(store, query, scaling, step, softmax)
    if not softmax.ordinary:
        return explicit_attention(store, query, scaling, step, softmax)
    if step.valid is not None:
        return _padded(store, query, scaling, step)
    return _many_queries(store, query, scaling, step)


def _one_query(
    store: SegmentStore, query: torch.Tensor, scaling: float | None, step: ForwardStep, softmax: Softmax
) -> torch.Tensor:
    """The heads of a group become the queries of one unmasked call, so that a segment is read once for all of them."""
    batch, num_heads, _, head_dim = query.shape
    heads = store.num_kv_heads
    packed = query.reshape(batch, heads, num_heads // heads, head_dim)
    if softmax.ordinary and not query.requires_grad:  # which one it is depends on the group alone
        group = packed.shape[2]
        if group not in store.kernels:
            store.kernels[group] = find_kernel(packed, store.key, store.value)
        kernel = store.kernels[group]
    else:
        kernel = find_kernel(packed, store.key, store.value, softmax)
    if kernel is not None:
        factor = head_dim**-0.5 if scaling is None else scaling
        out = segment_attention(kernel, packed, store.key, store.value, *store.bounds(), factor, softmax)
        return out.view(batch, 1, num_heads, -1)
    if not softmax.ordinary:
        return explicit_attention(store, query, scaling, step, softmax)
    if store.uniform:
        out = scaled_dot_product_attention(packed, store.dense(store.key), store.dense(store.value), scale=scaling)
        return out.reshape(batch, 1, num_heads, -1)
    queries = packed.view(batch * heads, 1, 1, -1, head_dim).unbind(0)
    parts = [
        scaled_dot_product_attention(q, k, v, scale=scaling) for q, (k, v) in zip(queries, store.pairs(), strict=True)
    ]
    return torch.cat(parts, dim=2).view(batch, 1, num_heads, -1)


def _many_queries(store: SegmentStore, query: torch.Tensor, scaling: float | None, step: ForwardStep) -> torch.Tensor:
    batch, num_heads, q_len, _ = query.shape
    heads = store.num_kv_heads
    group = num_heads // heads
    if store.uniform:
        key, value = store.dense(store.key), store.dense(store.value)
        mask = step.causal_mask(q_len, key.shape[2], query.dtype)
        parts = [
            _group(query[:, h * group : (h + 1) * group], key[:, h : h + 1], value[:, h : h + 1], mask, scaling)
            for h in range(heads)
        ]
        return torch.cat(parts, dim=1).transpose(1, 2)
    rows = []
    segments = store.pairs()
    for row in range(batch):
        parts = []
        for head in range(heads):
            key, value = next(segments)
            mask = step.causal_mask(q_len, key.shape[2], query.dtype)
            parts.append(_group(query[row : row + 1, head * group : (head + 1) * group], key, value, mask, scaling))
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows).transpose(1, 2)


def _padded(store: SegmentStore, query: torch.Tensor, scaling: float | None, step: ForwardStep) -> torch.Tensor:
    """Some new tokens are padding, which has no entries: the real queries of each row are gathered."""
    batch, num_heads, q_len, _ = query.shape
    heads = store.num_kv_heads
    group = num_heads // heads
    out = query.new_zeros(batch, q_len, num_heads, store.value.shape[1])
    segments = store.pairs()
    for row in range(batch):
        count, columns = step.counts[row], step.real_columns(row)
        for head in range(heads):
            key, value = next(segments)
            if count == 0:
                continue
            mask = step.causal_mask(count, key.shape[2], query.dtype)
            own = slice(head * group, (head + 1) * group)
            part = _group(query[row : row + 1, own, columns], key, value, mask, scaling)
            out[row, columns, own] = part[0].transpose(0, 1)
    return out


def _group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """The query heads `(batch, group, q, dim)` that share one key/value head `(batch, 1, n, dim)`."""
    group = query.shape[1]
    key, value = key.expand(-1, group, -1, -1), value.expand(-1, group, -1, -1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
