"""Capacity losses: the excess of the gates' occupancy over the budget they are trained for (TRIM-KV, DBTrimKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .ops.occupancy import occupancy, occupancy_at
from .segments import Segments

Scope = Literal["global", "local"]


@dataclass(frozen=True)
class Capacity:
    """A capacity loss and the occupancy it was computed from.

    Attributes:
        loss: scalar, differentiable.
        occupancy: `(layers, batch, num_kv_heads, positions)`, detached.
        index: `(batch, positions)`, the columns that were evaluated.
    """

    loss: torch.Tensor
    occupancy: torch.Tensor
    index: torch.Tensor


def capacity_loss(
    log_beta: torch.Tensor, segments: Segments, budget: float | torch.Tensor, scope: Scope = "global",
    samples: int | None = None, generator: torch.Generator | None = None,
) -> Capacity:  # fmt: skip
    """Mean relative excess of occupancy over the budget, over the positions that exceed it.

    local: `max(0, S-M) / max(1, p-M)` per layer, head and position; global: the same of the mean of S over layers and
    heads (p is the 0-based position in its document). Averaged over strictly positive entries, 0 if there is none.
    DBTrimKV's global loss sums over the L·H heads instead, `max(0, S_g-M_g) / max(1, p_g-M_g)` with everything times
    L·H: the same wherever `p-M ≥ 1`, but at the one or two positions around `p = M` its denominator is 1 against a
    numerator of L·H, an outlier that drowns a sampled loss; taking the mean bounds every entry by 2.

    Args:
        log_beta: `(layers, batch, num_kv_heads, seq_len)` fp32.
        segments: documents and padding.
        budget: M, entries per layer and head; a number, or `(batch, seq_len)` for one that differs by token.
        scope: `global` or `local`.
        samples: positions per row to evaluate, one drawn uniformly from each of that many equal strata, so sums
            over positions are estimated without bias; None evaluates all positions.
        generator: randomness of the sample, on CPU.

    Raises:
        ValueError: unknown scope, or a budget or sample count that is not positive.
    """
    if scope not in ("global", "local"):
        raise ValueError(f"scope of the capacity loss is {scope!r}; accepted: global, local")
    limit = torch.as_tensor(budget, dtype=log_beta.dtype, device=log_beta.device)
    if bool((limit <= 0).any()) or (samples is not None and samples < 1):
        raise ValueError(f"budget {budget} and samples {samples} must be positive")
    batch, seq_len = segments.document.shape
    if samples is None or samples >= seq_len:
        index = torch.arange(seq_len, device=log_beta.device).expand(batch, seq_len)
        held = occupancy(log_beta, segments)
    else:
        index = stratified_positions(batch, seq_len, samples, generator).to(log_beta.device)
        held = occupancy_at(log_beta, index, segments)
    excess = relative_excess(held, index, segments, limit, scope)
    positive = excess > 0
    loss = excess.sum() / positive.sum().clamp_min(1)
    return Capacity(loss, held.detach(), index)


def stratified_positions(
    batch: int, seq_len: int, samples: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One uniform draw from each of `samples` equal strata of `[0, seq_len)`: `(batch, samples)`, rising.

    Every column is drawn with probability `samples / seq_len`, so `seq_len / samples` times a sum over the drawn
    columns is an unbiased estimate of the sum over all.
    """
    edges = torch.arange(samples, dtype=torch.float64)
    draw = torch.rand(batch, samples, generator=generator, dtype=torch.float64)
    return ((edges + draw) * (seq_len / samples)).long().clamp_max(seq_len - 1)


def relative_excess(
    held: torch.Tensor, index: torch.Tensor, segments: Segments, limit: torch.Tensor, scope: Scope
) -> torch.Tensor:
    """`max(0, S-M) / max(1, p-M)`: `(layers, batch, heads, positions)` if local, `(batch, positions)` if global."""
    position = segments.position.gather(1, index).to(held.dtype)
    if limit.dim():
        limit = limit.gather(1, index)
    if scope == "global":
        held = held.mean(dim=(0, 2))
    else:
        position, limit = position[:, None], limit[:, None] if limit.dim() else limit
    return (held - limit).clamp_min(0) / (position - limit).clamp_min(1)
