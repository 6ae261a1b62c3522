"""What queries attend to, one key/value head at a time, so that the attention stays in the processor's cache."""

from __future__ import annotations

import torch


def window_risk_by_heads(
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    query_positions: torch.Tensor,
    limit: torch.Tensor,
    scaling: float,
    kernel: int | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The same as `attention_over`, then `pool_and_renormalise` and `worst_case`, and `mean_over_queries`.

    Args:
        queries: `(batch, num_heads, window, head_dim)`, post-RoPE.
        keys: `(batch, num_kv_heads, n, head_dim)`.
        positions: int64 `(batch, num_kv_heads, n)`, ascending; -1 behind a head's last entry.
        query_positions: int64 `(batch, window)`, -1 for no query.
        limit: int64 `(batch,)`: entries at positions from here on are the window's own and not counted.
        kernel: width of the pooling, odd; None if the worst case is not wanted.

    Returns:
        The worst case (None if not wanted) and the mean, both fp32 `(batch, num_kv_heads, n)`.
    """
    batch, heads, n, _ = keys.shape
    group, window = queries.shape[1] // heads, queries.shape[2]
    worst = None if kernel is None else keys.new_zeros(batch, heads, n, dtype=torch.float32)
    mean = keys.new_zeros(batch, heads, n, dtype=torch.float32)
    # How many entries each head has, has outside the window, and has that every query sees: they are in order.
    seen = torch.where(query_positions < 0, -1, query_positions)
    bounds = torch.stack([torch.full_like(limit, torch.iinfo(torch.int64).max), limit, seen.amin(1) + 1])
    order = torch.where(positions < 0, torch.iinfo(torch.int64).max, positions)
    counts = (order.unsqueeze(0) < bounds.view(3, batch, 1, 1)).sum(3).tolist()
    present = query_positions >= 0
    weights = (present / (present.sum(1, keepdim=True) * group).clamp(min=1)).float().repeat(1, group)
    scaled = (queries.float() * scaling).reshape(batch, heads, group * window, -1)
    scratch = mean.new_empty(2, group * window * n)  # memory that every head uses again: fresh memory takes longer
    for row in range(batch):
        for head in range(heads):
            length, counted, common = (counts[kind][row][head] for kind in range(3))
            if not length:
                continue
            of_head = keys[row, head, :length], positions[row, head, :length]
            attention = _attention(scaled[row, head], query_positions[row], *of_head, common, scratch)
            torch.mv(attention.t(), weights[row], out=mean[row, head, :length])
            if worst is not None and kernel is not None and counted:
                worst[row, head, :counted] = _worst(attention[:, :counted], kernel, scratch[0])
    return worst, mean


def received_by_heads(
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    query_positions: torch.Tensor,
    scaling: float,
    held: int,
) -> torch.Tensor:
    """What each entry receives from all queries together: `attention_over`, summed over them, mean over a group.

    Args:
        queries, keys, positions, query_positions, scaling: as in `window_risk_by_heads`.
        held: attention weights that are held at a time; entries that none of these queries sees are left out.

    Returns:
        fp32 `(batch, num_kv_heads, n)`.
    """
    batch, heads, n, _ = keys.shape
    group, q_len = queries.shape[1] // heads, queries.shape[2]
    total = keys.new_zeros(batch, heads, n, dtype=torch.float32)
    size = max(1, held // (group * max(1, n)))
    starts = range(0, q_len, size)
    # How many entries some query of a piece sees, and all of them: they are in order.
    pieces = [query_positions[:, start : start + size] for start in starts]
    last = torch.stack([piece.amax(1) for piece in pieces])
    first = torch.stack([torch.where(piece < 0, -1, piece).amin(1) for piece in pieces])
    order = torch.where(positions < 0, torch.iinfo(torch.int64).max, positions)
    bounds = torch.stack([last, first]).permute(2, 0, 1).unsqueeze(1).expand(-1, heads, -1, -1).flatten(2)
    counts = torch.searchsorted(order, bounds.contiguous(), right=True).unflatten(2, (2, -1)).tolist()
    scaled = (queries.float() * scaling).unflatten(1, (heads, group))
    scratch = total.new_empty(2, group * min(size, q_len) * n)
    for row in range(batch):
        for head in range(heads):
            for start, seen, common in zip(starts, *counts[row][head], strict=True):
                if not seen:
                    continue
                part = slice(start, start + size)
                asking = scaled[row, head, :, part].flatten(0, 1)
                of_head = keys[row, head, :seen], positions[row, head, :seen]
                attention = _attention(asking, query_positions[row, part], *of_head, common, scratch)
                total[row, head, :seen] += attention.sum(0)
    return total / group


def _attention(
    queries: torch.Tensor,
    query_positions: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    common: int,
    scratch: torch.Tensor,
) -> torch.Tensor:
    """Causal softmax in one head: fp32 `(group * window, n)`.

    Args:
        queries: fp32 `(group * window, head_dim)`, scaled.
        query_positions: int64 `(window,)`, -1 for no query.
        keys: `(n, head_dim)`.
        positions: int64 `(n,)`.
        common: so many entries, the first ones, every query sees.
        scratch: fp32 `(2, group * window * n)` or more: the logits are made in the first half, the result in the other.
    """
    shape = len(queries), len(positions)
    logits, attention = scratch[:, : shape[0] * shape[1]].unflatten(1, shape)
    torch.mm(queries, keys.float().t(), out=logits)
    window = len(query_positions)
    late = logits[:, common:].view(len(queries) // window, window, len(positions) - common)
    late.masked_fill_(positions[common:] > query_positions.unsqueeze(1), -torch.inf)
    torch.softmax(logits, 1, out=attention)
    return attention if common else attention.nan_to_num_(0.0)  # a query that is missing or sees nothing


def _worst(attention: torch.Tensor, kernel: int, scratch: torch.Tensor) -> torch.Tensor:
    """The worst case `(n,)` of `(queries, n)`, pooled and renormalised; the pooled attention is made in `scratch`."""
    pooled = scratch[: attention.numel()].view(attention.shape).copy_(attention)
    for shift in range(1, min(kernel // 2, attention.shape[1] - 1) + 1):
        pooled[:, shift:] += attention[:, :-shift]
        pooled[:, :-shift] += attention[:, shift:]
    scale = attention.sum(1, keepdim=True) / pooled.sum(1, keepdim=True)  # the kernel's width cancels out
    return pooled.mul_(scale.nan_to_num_(0.0, posinf=0.0)).amax(0)
