"""The forward kernel of gated attention (FlashAttention-2, Dao 2023, section 3), and functions its backward shares.

The bias `(t-i)·log β_i` is added in fp32. In a tile that no mask cuts, it is `(t-c)·log β_i + (c-i)·log β_i` with c the
tile's last key: both parts have the same sign, so nothing cancels, and the second is one number a column.

Documents and padding are two numbers a token, see `Segments.bounds`: query t attends to keys `start[t] <= i <= t`. The
queries are the last `q_len` of `seq_len` tokens; the others were read before. Of a query, `t` is the place among all
tokens, `seq_len - q_len` more than its row in memory.

All tensors have a last stride of 1. `stride_xb`, `stride_xh`, `stride_xt` are the strides of batch, head and token.
Logits, `scale` and `lse` are in powers of two.
"""

from __future__ import annotations

from .triton_language import constexpr, dot, jit, tl

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
def capped(logits, SOFTCAP: tl.constexpr):
    """`SOFTCAP · tanh(logits / SOFTCAP)`, both in powers of two; 0 for no cap."""
    if SOFTCAP > 0.0:
        logits = SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp2(logits * (2.0 * LOG2_E / SOFTCAP))))
    return logits


@jit
def uncapped_slopes(slopes, logits, SOFTCAP: tl.constexpr):
    """Gradients of logits before the cap, from those after it; `logits` are capped ones without their bias."""
    if SOFTCAP > 0.0:
        tanh = logits * (1.0 / SOFTCAP)
        slopes = slopes * (1.0 - tanh * tanh)
    return slopes


@jit
def tile_logits(products, t, t0, i, i0, first, greatest, bias, BLOCK_N: tl.constexpr, DECAYS: tl.constexpr):
    """Logits `(queries, keys)` of a tile, -inf where the query may not attend.

    `products` are the scaled products of queries and keys, capped; `bias` as in `forward_kernel`.
    """
    last = i0 + BLOCK_N - 1
    if DECAYS:
        near = (last - i).to(tl.float32) * bias
        logits = products + near[None, :] + (t - last).to(tl.float32)[:, None] * bias[None, :]
    else:
        logits = products + bias[None, :]
    if (last > t0) | (i0 < greatest):
        allowed = (i[None, :] <= t[:, None]) & (i[None, :] >= first[:, None])
        logits = tl.where(allowed, logits, float("-inf"))
    return logits


@jit
def forward_kernel(
    query, key, value, log_beta, start, output, lse, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot, heads, q_len, seq_len, scale,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, DECAYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Output and `lse` of one tile of queries of one head. Grid: (query tiles, batch · heads).

    Args:
        log_beta: fp32 `(batch, kv_heads, seq_len)`, times `t - i` the bias of a logit; without DECAYS the bias itself.
        start: `(batch, seq_len)`.
        SOFTCAP: cap on logits in powers of two; 0 for none.
    """
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest rows first
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    kv = b * (heads // GROUPS) + h // GROUPS
    past = seq_len - q_len
    t = past + t0 + tl.arange(0, BLOCK_M)
    first, begin, greatest, stop = keys_of(start + b * seq_len, t, past + t0, seq_len, BLOCK_M, BLOCK_N)
    key_base = key + b * stride_kb + h // GROUPS * stride_kh
    value_base = value + b * stride_vb + h // GROUPS * stride_vh
    query_base = query + b * stride_qb + h * stride_qh
    queries = load_tile(query_base, t0, stride_qt, q_len, BLOCK_M, HEAD_DIM, BLOCK_D)
    decays = log_beta + kv * seq_len
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for i0 in range(begin, stop, BLOCK_N):
        i = i0 + tl.arange(0, BLOCK_N)
        keys = load_tile(key_base, i0, stride_kt, seq_len, BLOCK_N, HEAD_DIM, BLOCK_D)
        decay = tl.load(decays + i, mask=i < seq_len, other=0.0) * LOG2_E
        products = capped(dot(queries, tl.trans(keys), None, PRECISION) * scale, SOFTCAP)
        logits = tile_logits(products, t, past + t0, i, i0, first, greatest, decay, BLOCK_N, DECAYS)
        new_top = tl.maximum(top, tl.max(logits, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: -inf minus -inf would be NaN
        weights = tl.exp2(logits - anchor[:, None])
        shrink = tl.exp2(top - anchor)
        total = total * shrink + tl.sum(weights, 1)
        values = load_tile(value_base, i0, stride_vt, seq_len, BLOCK_N, VALUE_DIM, BLOCK_V)
        acc = dot(weights.to(values.dtype), values, acc * shrink[:, None], PRECISION)
        top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    output_base = output + b * stride_ob + h * stride_oh
    store_tile(output_base, t0, stride_ot, q_len, acc / total[:, None], BLOCK_M, VALUE_DIM, BLOCK_V)
    tl.store(lse + row * q_len + t - past, tl.where(empty, 0.0, top + tl.log2(total)), mask=t < seq_len)
