"""What a window of queries attends to, for the policies that are built on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..view import LayerView


def check_window(policy: str, window: int, kernel: int) -> None:
    """Raises ValueError unless `window` is at least 1 and the pooling's `kernel` odd."""
    if window < 1:
        raise ValueError(f"{policy}'s window must be at least 1, got {window}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{policy}'s kernel must be odd, got {kernel}")


def window_attention(view: LayerView, queries: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
    """Causal softmax of each query over all entries of its key/value head.

    Args:
        queries: `(batch, num_heads, w, head_dim)`, post-RoPE.
        query_positions: int64 `(batch, w)`, -1 for no query.

    Returns:
        fp32 `(batch, num_kv_heads, num_kv_groups, w, n)`; zeros for a query that is missing or sees nothing.
    """
    return attention_over(view.keys, view.positions, queries, query_positions, view.scaling)


def attention_over(
    keys: torch.Tensor,
    positions: torch.Tensor,
    queries: torch.Tensor,
    query_positions: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """`window_attention` over keys `(batch, num_kv_heads, n, head_dim)` at `positions`, -1 for no entry."""
    batch, heads, n, _ = keys.shape
    groups = queries.shape[1] // heads
    queries = queries.float().reshape(batch, heads, -1, queries.shape[-1])  # the group's heads as queries
    logits = (queries * scaling) @ keys.float().transpose(2, 3)
    logits = logits.view(batch, heads, groups, -1, n)
    hidden = positions.unsqueeze(2) > query_positions[:, None, :, None]
    hidden = (hidden | (positions < 0).unsqueeze(2)).unsqueeze(2)
    attention = logits.masked_fill_(hidden, torch.finfo(torch.float32).min).softmax(-1)
    blind = hidden.all(-1, keepdim=True)
    return attention.masked_fill_(blind, 0.0) if bool(blind.any()) else attention


def mean_over_queries(attention: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
    """Mean over the queries that exist, then over the heads of a group.

    Args:
        attention: fp32 `(batch, num_kv_heads, num_kv_groups, w, n)`.
        query_positions: int64 `(batch, w)`, -1 for no query.

    Returns:
        fp32 `(batch, num_kv_heads, n)`.
    """
    present = (query_positions >= 0)[:, None, None, :, None]
    count = present.sum(3).clamp(min=1)
    return ((attention * present).sum(3) / count).mean(2)


def own_entries(view: LayerView, window: int) -> torch.Tensor:
    """bool `(batch, num_kv_heads, n)`: the entries of the last `window` tokens."""
    return view.positions >= (view.time - window).view(-1, 1, 1)
