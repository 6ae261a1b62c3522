"""Functions shared by policies: attention of a window of queries, and ranks within a head."""

from __future__ import annotations

from typing import Annotated

import torch

from tenure.checked import Range

from ..layer_view import LayerView
from ..ops.naive import attention_over
from ..ops.radix_select import top_of_each_head

MAX_WINDOW = 1 << 16  # queries that a cache records for every row, head and layer, and entries of a pooling
Window = Annotated[int, Range(1, MAX_WINDOW)]
Share = Annotated[float, Range(0, 1)]
Tokens = Annotated[int, Range(0, 2**31)]  # a number or an age, which is added to positions


def check_kernel(policy: str, kernel: int) -> None:
    """Raises ValueError unless the pooling's `kernel` is odd."""
    if kernel % 2 == 0:
        raise ValueError(f"{policy}'s kernel must be odd, got {kernel}")


def window_attention(view: LayerView, queries: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
    """`ops.naive.attention_over` of the view's entries, with its arguments and result."""
    return attention_over(view.keys, view.positions, queries, query_positions, view.scaling)


def own_entries(view: LayerView, window: int) -> torch.Tensor:
    """bool `(batch, num_kv_heads, n)`: the entries of the last `window` tokens."""
    return view.positions >= (view.time - window).view(-1, 1, 1)


def best_of_each_head(score: torch.Tensor, valid: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Marks the `count` highest scores of each head; ties favour the newer entry.

    Args:
        score: fp32 `(batch, num_kv_heads, n)`.
        valid: bool of that shape: there is an entry.
        count: int64 `(batch, num_kv_heads)`; a head with fewer entries keeps them all.

    Returns:
        bool `(batch, num_kv_heads, n)`.
    """
    places = torch.arange(score.shape[2], device=score.device).expand_as(score)
    return top_of_each_head(score.masked_fill(~valid, -torch.inf), places, count.flatten().tolist())


def ranks(score: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Each entry's rank in its head, int64 `(batch, num_kv_heads, n)`: 0 is the highest score, ties favour newer.

    Args:
        score, valid: as in `best_of_each_head`.
    """
    # Stable, from the end: among equal scores the newer entry comes first.
    order = score.masked_fill(~valid, -torch.inf).flip(2).sort(dim=2, descending=True, stable=True).indices
    places = torch.arange(score.shape[2], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(2, order, places).flip(2)
