"""Choosing within a head, for policies whose score depends on what else is chosen."""

from __future__ import annotations

import torch


def best_of_each_head(score: torch.Tensor, valid: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Marks the `count` highest scores of each head; among equal ones the newer stays.

    Args:
        score: fp32 `(batch, num_kv_heads, n)`.
        valid: bool of that shape: there is an entry.
        count: int64 `(batch, num_kv_heads)`; a head with fewer entries keeps them all.

    Returns:
        bool `(batch, num_kv_heads, n)`.
    """
    rank = ranks(score, valid)
    return (rank < count.unsqueeze(2)) & valid


def ranks(score: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Each entry's place in its head, int64 `(batch, num_kv_heads, n)`: 0 for the highest score, the newer of equals.

    Args:
        score, valid: as in `best_of_each_head`.
    """
    # Stable, from the end: of equal scores the entry further behind comes first.
    order = score.masked_fill(~valid, -torch.inf).flip(2).sort(dim=2, descending=True, stable=True).indices
    places = torch.arange(score.shape[2], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(2, order, places).flip(2)
