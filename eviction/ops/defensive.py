"""What a window of queries attends to at worst, in two passes over the keys and no tensor of `(group, window, n)`.

Twins: the functions of `eviction.policies.window` and `aggregation`.

Pooling and renormalising need no pass of their own. A query's attention sums over what is counted to `a`, and pooled
to `p = Σ_j a_j c_j` with c_j the counted entries within reach of j, which no query changes. So the first pass over the
keys has all that the second one scales by: the maximum, the denominator, and `a / p`. The second pass reads tiles of
entries that overlap by the reach, and pools by a product with a band of ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...retention.ops.kernel_choice import LAUNCH_OPTIONS, chosen_kernels, dot_precision, launching_on
from . import naive
from .decode import DTYPES, LOG2E, MAX_DIM
from .defensive_kernels import finish_rows, sum_rows, take_worst

BLOCK = 64  # entries of a tile
MAX_KERNEL = 33  # widest pooling: half of a tile is overlap then
SPLITS = 16  # at most so many programs share the entries of a segment in the first pass


def power(n: int) -> int:
    """The next power of two, as Triton wants a tile's side; at least 16, as its products do."""
    return max(16, 1 << max(0, n - 1).bit_length())


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """With its last dimension dense, as the kernels read it."""
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
    """Queries of a tile in the first pass and in the second, which holds more numbers for each; warps and stages."""

    rows: int
    pooled_rows: int
    options: dict[str, int]


def tile_sizes(dim: int, itemsize: int) -> TileSizes:
    """By the numbers of a key and their bytes; those that compile without spills."""
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
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    query_positions: torch.Tensor,
    limit: torch.Tensor,
    scaling: float,
    kernel: int,
    mean: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The worst case of a window's pooled attention (DefensiveKV, section 4), in two passes over the keys.

    Args:
        queries: `(batch, num_heads, window, head_dim)`, post-RoPE; keys: `(batch, num_kv_heads, n, head_dim)`; both
            fp16, bf16 or fp32.
        positions: integers `(batch, num_kv_heads, n)`, ascending; -1 behind a head's last entry.
        query_positions: integers `(batch, window)`, -1 for no query.
        limit: integers `(batch,)`: entries at positions from here on are the window's own. They are attended to, but
            not counted: no worst case, and nothing in the pooling.
        scaling: factor of the logits.
        kernel: width of the pooling, odd, at most 33.
        mean: whether the mean is wanted too.

    Returns:
        The worst case, fp32 `(batch, num_kv_heads, n)`, 0 where nothing is counted: the maximum over the heads of the
        group and the queries of their pooled and renormalised attention. And the mean of their attention, over the
        queries that exist and the heads of the group, of all entries; None if it is not wanted.
    Raises:
        ValueError: shapes or dtypes that the operation does not take.
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
