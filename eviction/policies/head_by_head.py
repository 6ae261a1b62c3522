"""What a window of queries attends to, one key/value head at a time, so that its attention stays in the cache."""

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
    for row in range(batch):
        for head in range(heads):
            length, counted, common = (counts[kind][row][head] for kind in range(3))
            if not length:
                continue
            logits = scaled[row, head] @ keys[row, head, :length].float().t()
            late = logits[:, common:].view(group, window, -1)
            late.masked_fill_(positions[row, head, common:length] > query_positions[row].unsqueeze(1), -torch.inf)
            attention = torch.softmax(logits, 1)
            if common == 0:
                attention.nan_to_num_(0.0)  # a query that is missing or sees nothing
            torch.mv(attention.t(), weights[row], out=mean[row, head, :length])
            if worst is not None and kernel is not None and counted:
                worst[row, head, :counted] = _worst(attention[:, :counted], kernel)
    return worst, mean


def _worst(attention: torch.Tensor, kernel: int) -> torch.Tensor:
    """The worst case `(n,)` of `(queries, n)`, pooled and renormalised."""
    pooled = attention.clone(memory_format=torch.contiguous_format)
    for shift in range(1, min(kernel // 2, attention.shape[1] - 1) + 1):
        pooled[:, shift:] += attention[:, :-shift]
        pooled[:, :-shift] += attention[:, shift:]
    scale = attention.sum(1, keepdim=True) / pooled.sum(1, keepdim=True)  # the kernel's width cancels out
    return pooled.mul_(scale.nan_to_num_(0.0, posinf=0.0)).amax(0)
