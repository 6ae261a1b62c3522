"""Functions that the kernels of gated attention share: tiles, the keys of a tile of queries, and its logits.

The queries are the last `q_len` of `seq_len` tokens; the others were read before. Of a query, `t` is the place among
all tokens, `seq_len - q_len` more than its row in memory.

All tensors have a last stride of 1. `stride_xb`, `stride_xh`, `stride_xt` are the strides of batch, head and token.
Logits, `scale` and `lse` are in powers of two.
"""

from __future__ import annotations

from .triton_language import constexpr, jit, tl

LOG2_E = constexpr(1.4426950408889634)


@jit
def load_tile(base, row0, stride, length, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tile `(ROWS, BLOCK)` from row `row0` on, of a tensor whose rows are tokens; 0 beyond `length` and `WIDTH`."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    base += tl.cast(row0, tl.int64) * stride  # offsets inside a tile fit in 32 bits, those of a long sequence do not
    mask = (rows < length - row0)[:, None]
    if WIDTH != BLOCK:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@jit
def store_tile(base, row0, stride, length, value, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    base += tl.cast(row0, tl.int64) * stride
    mask = (rows < length - row0)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], value.to(base.dtype.element_ty), mask=mask)


@jit
def keys_of(start, t, t0, seq_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile of queries: the first keys, the least one rounded down to a tile, the greatest, and where keys end."""
    first = tl.load(start + t, mask=t < seq_len, other=seq_len)
    begin = tl.min(first, 0) // BLOCK_N * BLOCK_N
    return first, begin, tl.max(tl.where(t < seq_len, first, 0), 0), tl.minimum(t0 + BLOCK_M, seq_len)


@jit
def tile_logits(dots, t, t0, i, i0, first, greatest, bias, scale, BLOCK_N: tl.constexpr, DECAYS: tl.constexpr):
    """Logits `(queries, keys)` of a tile, -inf where the query may not attend; `bias` as in `forward_kernel`."""
    last = i0 + BLOCK_N - 1
    if DECAYS:
        near = (last - i).to(tl.float32) * bias
        logits = dots * scale + near[None, :] + (t - last).to(tl.float32)[:, None] * bias[None, :]
    else:
        logits = dots * scale + bias[None, :]
    if (last > t0) | (i0 < greatest):
        allowed = (i[None, :] <= t[:, None]) & (i[None, :] >= first[:, None])
        logits = tl.where(allowed, logits, float("-inf"))
    return logits
