"""Occupancy `S_t = Σ_{j≤t} β_j^(t-j)`: the effective number of entries of a head at time t (TRIM-KV, capacity loss).

Both forms share one tiled kernel that never holds more than a tile of the T x T terms, forward or backward, and
skips tiles whose terms all lie below fp32 resolution. `occupancy` evaluates it at every position (exact, for
evaluation); `occupancy_at` at chosen positions only (the sampled training loss). On CUDA the kernel is Triton's, see
`occupancy_triton`; elsewhere it is the plain torch below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..segments import Segments
from .kernel_choice import Kernels, chosen_kernels


@dataclass(frozen=True)
class OccupancyTiles:
    """Tiles of the plain form.

    Attributes:
        queries, keys: tokens of a tile, of which `queries · keys` terms exist at a time.
        negligible: exponent below which terms are skipped. A whole tile row of 512 terms below exp(-30) adds less than
            5e-11 to a sum that holds the self term 1.
    """

    queries: int = 128
    keys: int = 512
    negligible: float = -30.0


TILES = OccupancyTiles()


def occupancy(log_beta: torch.Tensor, segments: Segments, kernels: Kernels = "auto") -> torch.Tensor:
    """Exact occupancy at every position.

    Args:
        log_beta: `(..., batch, num_kv_heads, seq_len)`, ≤ 0, fp32; plain torch takes fp64 too. Leading axes are free.
        segments: documents and padding of the batch.
        kernels: see `kernel_choice.chosen_kernels`.

    Returns:
        The same shape: `S[..., b, h, t]`, self included, 0 on padding; entries of another document never count.

    Raises:
        ValueError: the Triton kernels do not run on this device, or log_beta is not fp32 for them.
    """
    if chosen_kernels(log_beta.device, kernels) == "triton":
        return _launch(log_beta, None, segments)
    batch, seq_len = segments.document.shape
    index = torch.arange(seq_len, device=log_beta.device).expand(batch, seq_len)
    return occupancy_at(log_beta, index, segments, "reference")


def occupancy_at(
    log_beta: torch.Tensor, query_index: torch.Tensor, segments: Segments, kernels: Kernels = "auto"
) -> torch.Tensor:
    """Occupancy at chosen positions: cost `O(samples · seq_len)` instead of `O(seq_len²)`.

    Args:
        log_beta: as in `occupancy`.
        query_index: `(batch, samples)` int64, rising in each row, columns of the batch (not document positions).
        kernels: as in `occupancy`.

    Returns:
        `(..., batch, num_kv_heads, samples)`, differentiable in log_beta.

    Raises:
        ValueError: as in `occupancy`.
    """
    if chosen_kernels(log_beta.device, kernels) == "triton":
        return _launch(log_beta, query_index, segments)
    lead = log_beta.shape[:-3]
    flat = log_beta.reshape(-1, *log_beta.shape[-3:])
    out = _Occupancy.apply(flat, query_index, segments)
    assert isinstance(out, torch.Tensor)
    return out.reshape(*lead, *out.shape[1:])


def _launch(log_beta: torch.Tensor, query_index: torch.Tensor | None, segments: Segments) -> torch.Tensor:
    from .occupancy_triton import occupancy as launch

    out = launch(log_beta.reshape(-1, *log_beta.shape[-3:]), query_index, segments)
    return out.reshape(*log_beta.shape[:-3], *out.shape[1:])


class _Occupancy(torch.autograd.Function):
    """log_beta `(layers, batch, heads, seq_len)` -> `(layers, batch, heads, samples)`."""

    @staticmethod
    def forward(ctx: Any, log_beta: torch.Tensor, query_index: torch.Tensor, segments: Segments) -> torch.Tensor:
        ctx.save_for_backward(log_beta, query_index)
        ctx.segments = segments
        out = log_beta.new_zeros(*log_beta.shape[:-1], query_index.shape[1])
        for queries, keys, gap, valid in _tiles(query_index, segments):
            for layer, decay in enumerate(log_beta[..., keys]):
                if _matters(gap, valid, decay):
                    out[layer, ..., queries] += _terms(gap, valid, decay).sum(-1)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        log_beta, query_index = ctx.saved_tensors
        result = torch.zeros_like(log_beta)
        for queries, keys, gap, valid in _tiles(query_index, ctx.segments):
            for layer, decay in enumerate(log_beta[..., keys]):
                if _matters(gap, valid, decay):
                    slope = _terms(gap, valid, decay) * gap
                    result[layer, ..., keys] += (grad[layer, ..., queries].unsqueeze(-2) @ slope).squeeze(-2)
        return result, None, None


def _tiles(query_index: torch.Tensor, segments: Segments):
    """Yields `(queries, keys, gap, valid)`: two slices and, `(batch, 1, queries, keys)`, t - i and whether i counts."""
    document, position = segments.document, segments.position
    seq_len = document.shape[1]
    query_document, query_position = document.gather(1, query_index), position.gather(1, query_index)
    column = torch.arange(seq_len, device=document.device)
    for first in range(0, query_index.shape[1], TILES.queries):
        queries = slice(first, first + TILES.queries)
        index = query_index[:, queries, None]
        reach = int(index.max()) + 1
        for start in range(0, reach, TILES.keys):
            keys = slice(start, min(start + TILES.keys, reach))
            valid = (query_document[:, queries, None] == document[:, None, keys]) & (index >= column[keys])
            valid &= query_document[:, queries, None] >= 0
            if not bool(valid.any()):
                continue
            gap = torch.where(valid, query_position[:, queries, None] - position[:, None, keys], 0)
            yield queries, keys, gap[:, None], valid[:, None]


def _matters(gap: torch.Tensor, valid: torch.Tensor, decay: torch.Tensor) -> bool:
    nearest = torch.where(valid, gap, torch.iinfo(gap.dtype).max).amin(-2)  # (batch, 1, keys)
    return bool((nearest * decay.detach().double() > TILES.negligible).any())


def _terms(gap: torch.Tensor, valid: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """`β_i^(t-i)` over one tile, 0 where i does not count: `(batch, heads, queries, keys)`."""
    return torch.exp(gap * decay[..., None, :]).masked_fill(~valid, 0.0)
