"""Attention of a window of queries one key/value head at a time, so that it stays in a CPU's cache.

`window_risk_by_heads` reduces it to the worst case and the mean, in C where a compiler is found (`window_risk.c`);
`received_by_heads` sums it over the queries.
"""

from __future__ import annotations

import torch

from ...retention.ops.kernel_choice import multiplies_bf16_tiles
from .c_kernels import COUNT, FLOAT, POINTER, THREADS, Kernel, find_kernel
from .paged_attention import DTYPES, MAX_DIM
from .window_risk import dense

# Attention weights materialised at a time by `received_by_heads`: few enough for a CPU's cache, many enough for a GPU.
HELD_ON_CPU, HELD_ON_GPU = 2**18, 2**24

LANES, KEYS = 16, 8  # of the C kernel: the most queries of a vector, and keys whose logits are written together


def window_risk_by_heads(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, query_positions: torch.Tensor,
    limit: torch.Tensor, scaling: float, kernel: int | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """`window_risk` with its mean, one key/value head at a time.

    Arguments and results as there, but positions are int64, dtypes and kernel width free; `kernel` None skips the worst
    case, which is None then.
    """
    found = find_risk_kernel(queries, keys)
    if found is not None:
        return _risk_in_c(*found, queries, keys, positions, query_positions, limit, scaling, kernel)
    return _risk_in_torch(queries, keys, positions, query_positions, limit, scaling, kernel)


def find_risk_kernel(queries: torch.Tensor, keys: torch.Tensor) -> tuple[Kernel, torch.dtype] | None:
    """The C kernel for these arguments and the dtype in which it takes them; None if there is none, see `c_kernels`."""
    dim = keys.shape[3]
    if keys.device.type != "cpu" or keys.dtype not in DTYPES or queries.dtype != keys.dtype or dim > MAX_DIM:
        return None
    whole, defines = keys.dtype == torch.bfloat16, (f"DIM={dim}",)
    if whole:
        tiles = dim % 32 == 0 and multiplies_bf16_tiles(keys.device)
        defines += ("BF16", "AMX") if tiles else ("BF16",)
    arguments = *(POINTER,) * 5, *(COUNT,) * 8, FLOAT, COUNT, THREADS, *(POINTER,) * 3
    kernel = find_kernel("window_risk", arguments, defines)
    return None if kernel is None else (kernel, torch.bfloat16 if whole else torch.float32)


def _risk_in_c(
    kernel_in_c: Kernel, dtype: torch.dtype, queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor,
    query_positions: torch.Tensor, limit: torch.Tensor, scaling: float, kernel: int | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:  # fmt: skip
    (batch, heads, n, _), window = keys.shape, queries.shape[2]
    queries, keys = queries.detach().to(dtype).contiguous(), dense(keys.detach().to(dtype))
    positions, query_positions, limit = positions.contiguous(), query_positions.contiguous(), limit.contiguous()
    reach, threads = 0 if kernel is None else min(kernel // 2, n), torch.get_num_threads()
    scratch = keys.new_empty(threads * (n + 2 * reach + LANES + KEYS) * LANES, dtype=torch.float32)
    worst = None if kernel is None else keys.new_zeros(batch, heads, n, dtype=torch.float32)
    mean = keys.new_zeros(batch, heads, n, dtype=torch.float32)
    tensors = queries, keys, positions, query_positions, limit
    kernel_in_c(
        *(one.data_ptr() for one in tensors), batch, heads, n, queries.shape[1] // heads, window, *keys.stride()[:3],
        scaling, reach, threads, scratch.data_ptr(), None if worst is None else worst.data_ptr(), mean.data_ptr(),
    )  # fmt: skip
    return worst, mean


def _risk_in_torch(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, query_positions: torch.Tensor,
    limit: torch.Tensor, scaling: float, kernel: int | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """`window_risk_by_heads` by `naive`'s formulas, in plain torch."""
    batch, heads, n, _ = keys.shape
    group, window = queries.shape[1] // heads, queries.shape[2]
    worst = None if kernel is None else keys.new_zeros(batch, heads, n, dtype=torch.float32)
    mean = keys.new_zeros(batch, heads, n, dtype=torch.float32)
    # Numbers of entries of each head: all, those outside the window, and those that every query sees; in this order.
    seen = torch.where(query_positions < 0, -1, query_positions)
    bounds = torch.stack([torch.full_like(limit, torch.iinfo(torch.int64).max), limit, seen.amin(1) + 1])
    order = torch.where(positions < 0, torch.iinfo(torch.int64).max, positions)
    counts = (order.unsqueeze(0) < bounds.view(3, batch, 1, 1)).sum(3).tolist()
    present = query_positions >= 0
    weights = (present / (present.sum(1, keepdim=True) * group).clamp(min=1)).float().repeat(1, group)
    scaled = (queries.float() * scaling).reshape(batch, heads, group * window, -1)
    scratch = mean.new_empty(2, group * window * n)  # reused for every head: fresh memory takes longer
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
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, query_positions: torch.Tensor, scaling: float,
    held: int,
) -> torch.Tensor:  # fmt: skip
    """Attention that each entry receives: `attention_over`, summed over all queries, mean over the heads of a group.

    `held` attention weights are materialised at a time; entries that none of these queries sees are skipped. The other
    arguments as in `window_risk`; returns fp32 `(batch, num_kv_heads, n)`.
    """
    batch, heads, n, _ = keys.shape
    group, q_len = queries.shape[1] // heads, queries.shape[2]
    total = keys.new_zeros(batch, heads, n, dtype=torch.float32)
    size = max(1, held // (group * max(1, n)))
    starts = range(0, q_len, size)
    # Numbers of entries that some query of a piece sees, and that all of them see; entries are in order.
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
    queries: torch.Tensor, query_positions: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, common: int,
    scratch: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Causal softmax in one head, fp32 `(group * window, n)`, of scaled queries; all see the first `common` keys.

    `scratch`: fp32 `(2, group * window * n)` or more, for the logits and the result.
    """
    shape = len(queries), len(positions)
    logits, attention = scratch[:, : shape[0] * shape[1]].unflatten(1, shape)
    torch.mm(queries, keys.float().t(), out=logits)
    window = len(query_positions)
    late = logits[:, common:].view(len(queries) // window, window, len(positions) - common)
    late.masked_fill_(positions[common:] > query_positions.unsqueeze(1), -torch.inf)
    torch.softmax(logits, 1, out=attention)
    return attention if common else attention.nan_to_num_(0.0)  # a query that is missing or sees no entry


def _worst(attention: torch.Tensor, kernel: int, scratch: torch.Tensor) -> torch.Tensor:
    """The worst case `(n,)` of `(queries, n)`, pooled and renormalised, with `scratch` for the pooled attention."""
    pooled = scratch[: attention.numel()].view(attention.shape).copy_(attention)
    for shift in range(1, min(kernel // 2, attention.shape[1] - 1) + 1):
        pooled[:, shift:] += attention[:, :-shift]
        pooled[:, :-shift] += attention[:, shift:]
    scale = attention.sum(1, keepdim=True) / pooled.sum(1, keepdim=True)  # the kernel's width cancels out
    return pooled.mul_(scale.nan_to_num_(0.0, posinf=0.0)).amax(0)
