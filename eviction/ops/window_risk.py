"""Attention of a window of queries, reduced to its worst case and its mean (DefensiveKV, section 4).

On a GPU: two passes over the keys and no tensor of `(group, window, n)`. Twins: `naive.attention_over`,
`naive.pool_and_renormalise` and `naive.worst_case`. On a CPU: `window_risk_by_heads`.

Pooling and renormalising need no pass of their own. A query's attention sums to `a` over the counted entries, and to
`p = Σ_j a_j c_j` after pooling, with c_j the number of counted entries within reach of j, which is the same for all
queries. So the first pass over the keys yields all that the second one scales by: the maximum, the denominator, and
`a / p`. The second pass reads tiles of entries that overlap by the reach, and pools by a product with a band of ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...retention.ops.kernel_choice import LAUNCH_OPTIONS, chosen_kernels, dot_precision, launching_on
from ...retention.ops.triton_language import dot, jit, tl
from . import naive
from .paged_attention import DTYPES, LOG2E, MAX_DIM

MAX_KERNEL = 33  # widest pooling: half of a tile is overlap then

# Tile sizes of the kernels.
BLOCK = 64  # entries of a tile
SPLITS = 16  # programs per segment in the first pass, at most


@jit
def _logits(
    queries, keys, positions, query_positions, scale, row, entry, batch, head, heads, window, n,
    query_row, query_head, query_token, key_row, key_head, key_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of a tile `(rows, entries)`, -inf for what a query cannot see; `row` is member * window + query."""
    dim = tl.arange(0, DIM_BLOCK)
    present = row < GROUP * window
    member, token = row // window, row % window
    at = batch.to(tl.int64) * query_row + (head * GROUP + member) * query_head + token * query_token
    wanted = present[:, None] & (dim < DIM)[None, :]
    q = tl.load(queries + at[:, None] + dim[None, :], mask=wanted, other=0.0)
    stored = (entry >= 0) & (entry < n)
    segment = (batch * heads + head).to(tl.int64)
    place = tl.load(positions + segment * n + entry, mask=stored, other=-1)
    stored = place >= 0
    at = batch.to(tl.int64) * key_row + head.to(tl.int64) * key_head + entry.to(tl.int64) * key_token
    whole = stored[:, None] & (dim < DIM)[None, :]
    k = tl.load(keys + at[:, None] + dim[None, :], mask=whole, other=0.0)
    time = tl.load(query_positions + batch * window + token, mask=present, other=-1)
    logits = dot(q, tl.trans(k), None, PRECISION) * scale
    return tl.where(stored[None, :] & (place[None, :] <= time[:, None]), logits, float("-inf"))


@jit
def sum_rows(
    queries, keys, positions, query_positions, counted, sums, scale, heads, window, n, reach,
    query_row, query_head, query_token, key_row, key_head, key_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (splits, tiles of rows, segments), the first pass: each query's maximum and three sums over some entries."""
    split, tile, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = segment // heads, segment % heads
    row = tile * ROWS + tl.arange(0, ROWS)
    count = tl.load(counted + segment)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    pooled = tl.zeros([ROWS], tl.float32)
    for first in range(split * BLOCK, n, tl.num_programs(0) * BLOCK):
        entry = first + tl.arange(0, BLOCK)
        logits = _logits(
            queries, keys, positions, query_positions, scale, row, entry, batch, head, heads, window, n,
            query_row, query_head, query_token, key_row, key_head, key_token, GROUP, DIM, DIM_BLOCK, PRECISION,
        )  # fmt: skip
        new = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(highest - base)
        near = tl.minimum(entry + reach, count - 1) - tl.maximum(entry - reach, 0) + 1
        older = tl.where(entry < count, 1.0, 0.0)
        total = total * shrink + tl.sum(weight, 1)
        mass = mass * shrink + tl.sum(weight * older[None, :], 1)
        pooled = pooled * shrink + tl.sum(weight * (older * near.to(tl.float32))[None, :], 1)
        highest = new
    rows = tl.num_programs(1) * ROWS
    place = (segment.to(tl.int64) * tl.num_programs(0) + split) * 4 * rows + row
    tl.store(sums + place, highest)
    tl.store(sums + place + rows, total)
    tl.store(sums + place + 2 * rows, mass)
    tl.store(sums + place + 3 * rows, pooled)


@jit
def finish_rows(sums, scales, splits, ROWS: tl.constexpr):
    """Grid (tiles of rows, segments): each query's maximum, 1 / denominator and pooling scale, merged over splits."""
    tile, segment = tl.program_id(0), tl.program_id(1)
    rows = tl.num_programs(0) * ROWS
    row = tile * ROWS + tl.arange(0, ROWS)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    pooled = tl.zeros([ROWS], tl.float32)
    for split in range(0, splits):
        place = (segment.to(tl.int64) * splits + split) * 4 * rows + row
        own = tl.load(sums + place)
        new = tl.maximum(highest, own)
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink, grow = tl.exp2(highest - base), tl.exp2(own - base)
        total = total * shrink + tl.load(sums + place + rows) * grow
        mass = mass * shrink + tl.load(sums + place + 2 * rows) * grow
        pooled = pooled * shrink + tl.load(sums + place + 3 * rows) * grow
        highest = new
    place = segment.to(tl.int64) * 3 * rows + row
    tl.store(scales + place, tl.where(highest == float("-inf"), 0.0, highest))
    tl.store(scales + place + rows, tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0))
    tl.store(scales + place + 2 * rows, tl.where(pooled > 0.0, mass / tl.where(pooled > 0.0, pooled, 1.0), 0.0))


@jit
def take_worst(
    queries, keys, positions, query_positions, counted, present, scales, worst, mean, padded,
    scale, heads, window, n, reach, query_row, query_head, query_token, key_row, key_head, key_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of entries, segments), the second pass: the worst case, and the mean if `mean` is not None.

    Tiles overlap by `2 * reach`; a program writes the entries whose neighbours it has.
    """
    segment = tl.program_id(1)
    batch, head = segment // heads, segment % heads
    lane = tl.arange(0, BLOCK)
    entry = tl.program_id(0) * (BLOCK - 2 * reach) - reach + lane
    count = tl.load(counted + segment)
    older = (entry >= 0) & (entry < count)
    band = tl.where(tl.abs(lane[:, None] - lane[None, :]) <= reach, 1.0, 0.0).to(tl.bfloat16)
    highest = tl.zeros([BLOCK], tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    for tile in range(0, tl.cdiv(GROUP * window, ROWS)):
        row = tile * ROWS + tl.arange(0, ROWS)
        logits = _logits(
            queries, keys, positions, query_positions, scale, row, entry, batch, head, heads, window, n,
            query_row, query_head, query_token, key_row, key_head, key_token, GROUP, DIM, DIM_BLOCK, PRECISION,
        )  # fmt: skip
        place = segment.to(tl.int64) * 3 * padded + row
        base, inverse = tl.load(scales + place), tl.load(scales + place + padded)
        attention = tl.exp2(logits - base[:, None]) * inverse[:, None]
        if mean is not None:
            summed += tl.sum(attention, 0)
        attention = tl.where(older[None, :], attention, 0.0)
        # Three bf16 numbers hold a fp32 one, and the band is exact: tensor cores sum what fp32 would.
        pooled = tl.zeros([ROWS, BLOCK], tl.float32)
        for _ in tl.static_range(3):
            part = attention.to(tl.bfloat16)
            pooled = dot(part, band, pooled, BAND)
            attention -= part.to(tl.float32)
        highest = tl.maximum(highest, tl.max(pooled * tl.load(scales + place + 2 * padded)[:, None], 0))
    own = (lane >= reach) & (lane < BLOCK - reach) & (entry < n)
    into = segment.to(tl.int64) * n + entry
    tl.store(worst + into, tl.where(older, highest, 0.0), mask=own)
    if mean is not None:
        queries_seen = tl.maximum(tl.load(present + batch), 1).to(tl.float32) * GROUP
        tl.store(mean + into, summed / queries_seen, mask=own)


def power(n: int) -> int:
    """The next power of two, as Triton requires of a tile's side; at least 16, as its products require."""
    return max(16, 1 << max(0, n - 1).bit_length())


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """With its last dimension contiguous, as the kernels read it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launch(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, query_positions: torch.Tensor,
    limit: torch.Tensor, scaling: float, kernel: int, mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    queries, keys = dense(queries), dense(keys)
    (batch, heads, n, dim), (_, num_heads, window, _) = keys.shape, queries.shape
    group, segments, reach = num_heads // heads, batch * heads, kernel // 2
    sizes = tile_sizes(dim, keys.element_size())
    tiles = -(-group * window // sizes.rows)
    splits = max(1, min(SPLITS, n // (4 * BLOCK)))
    positions = positions.int().contiguous()
    query_positions = query_positions.int().contiguous()
    counted = ((positions >= 0) & (positions < limit.view(-1, 1, 1))).sum(2, dtype=torch.int32)
    present = (query_positions >= 0).sum(1, dtype=torch.int32)
    worst = keys.new_zeros(batch, heads, n, dtype=torch.float32)
    means = torch.zeros_like(worst) if mean else worst.new_zeros(0)
    if n == 0 or segments == 0:
        return worst, means
    sums = worst.new_empty(segments, splits, 4, tiles * sizes.rows)
    scales = worst.new_empty(segments, 3, tiles * sizes.rows)
    numbers = (scaling * LOG2E, heads, window, n, reach, *queries.stride()[:3], *keys.stride()[:3])
    options = {
        "GROUP": group, "DIM": dim, "DIM_BLOCK": power(dim), "BLOCK": BLOCK, "PRECISION": dot_precision(keys.dtype),
        **sizes.options, **LAUNCH_OPTIONS,
    }  # fmt: skip
    inputs = (queries, keys, positions, query_positions, counted)
    with launching_on(keys):
        sum_rows[(splits, tiles, segments)](*inputs, sums, *numbers, ROWS=sizes.rows, **options)
        finish_rows[(tiles, segments)](sums, scales, splits, ROWS=sizes.rows, **LAUNCH_OPTIONS)
        take_worst[(-(-n // (BLOCK - 2 * reach)), segments)](
            *inputs, present, scales, worst, means if mean else None, tiles * sizes.rows, *numbers,
            ROWS=sizes.pooled_rows, BAND=dot_precision(torch.bfloat16), **options,
        )  # fmt: skip
    return worst, means


@dataclass(frozen=True)
class TileSizes:
    """Queries of a tile in the first pass and in the second, which needs more registers for each; warps and stages."""

    rows: int
    pooled_rows: int
    options: dict[str, int]


def tile_sizes(dim: int, itemsize: int) -> TileSizes:
    """Tile sizes by head dimension and bytes per number; those that compile without spills."""
    if itemsize == 4:  # multiplied without tensor cores, in registers
        return TileSizes(16, 16, {"num_warps": 8, "num_stages": 1})
    return TileSizes(64, 32, {"num_warps": 4, "num_stages": 2 if dim <= 128 else 1})


@torch.library.custom_op("tenure::window_risk", mutates_args=())
def _window_risk(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, query_positions: torch.Tensor,
    limit: torch.Tensor, scaling: float, kernel: int, mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    run = _launch if chosen_kernels(keys.device) == "triton" else naive.window_risk
    return run(queries, keys, positions, query_positions, limit, scaling, kernel, mean)


@_window_risk.register_fake
def _(queries, keys, positions, query_positions, limit, scaling, kernel, mean):
    worst = keys.new_empty(keys.shape[:3], dtype=torch.float32)
    return worst, torch.empty_like(worst) if mean else worst.new_empty(0)


def window_risk(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, query_positions: torch.Tensor,
    limit: torch.Tensor, scaling: float, kernel: int, mean: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The worst case of a window's pooled attention (DefensiveKV, section 4), in two passes over the keys.

    Args:
        queries: `(batch, num_heads, window, head_dim)`, post-RoPE; keys: `(batch, num_kv_heads, n, head_dim)`; both
            fp16, bf16 or fp32.
        positions: integers `(batch, num_kv_heads, n)`, ascending; -1 after a head's last entry.
        query_positions: integers `(batch, window)`, -1 for no query.
        limit: integers `(batch,)`: entries at positions from here on are the window's own. They are attended to, but
            not counted: they have no worst case and are 0 in the pooling.
        scaling: factor of the logits.
        kernel: width of the pooling, odd, at most 33.
        mean: compute the mean too.

    Returns:
        The worst case, fp32 `(batch, num_kv_heads, n)`, 0 where nothing is counted: the maximum over the heads of the
        group and the queries of their pooled and renormalised attention. And the mean of their attention, over the
        queries that exist and the heads of the group, of all entries; None unless requested.
    Raises:
        ValueError: unsupported shapes or dtypes.
    """
    _check(queries, keys)
    if kernel < 1 or kernel % 2 == 0 or kernel > MAX_KERNEL:
        raise ValueError(f"window risk got a pooling of {kernel}; accepted: odd widths up to {MAX_KERNEL}")
    shapes = tuple(positions.shape), tuple(query_positions.shape), tuple(limit.shape)
    if shapes != (keys.shape[:3], (keys.shape[0], queries.shape[2]), keys.shape[:1]):
        raise ValueError(
            f"window risk got positions {shapes[0]} and {shapes[1]} and a limit {shapes[2]} for keys "
            f"{tuple(keys.shape)} and queries {tuple(queries.shape)}; accepted: (batch, num_kv_heads, n), (batch, "
            "window) and (batch,)"
        )
    worst, means = _window_risk(queries, keys, positions, query_positions, limit, float(scaling), kernel, mean)
    return worst, means if mean else None


def _check(queries: torch.Tensor, keys: torch.Tensor) -> None:
    if queries.dtype != keys.dtype or keys.dtype not in DTYPES:
        raise ValueError(
            f"window risk got queries {queries.dtype} and keys {keys.dtype}; accepted: one of "
            f"{', '.join(map(str, DTYPES))} for both"
        )
    heads = keys.shape[1]
    if keys.ndim != 4 or queries.shape[1] % heads or queries.shape[::3] != keys.shape[::3]:
        raise ValueError(
            f"window risk got queries {tuple(queries.shape)} and keys {tuple(keys.shape)}; accepted: (batch, "
            "num_heads, window, dim) and (batch, num_kv_heads, n, dim), with a multiple of num_kv_heads heads"
        )
    if keys.shape[3] > MAX_DIM:
        raise ValueError(f"window risk got {keys.shape[3]} numbers a head; accepted: at most {MAX_DIM}")
