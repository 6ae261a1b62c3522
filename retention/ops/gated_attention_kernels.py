"""Triton kernels of gated attention: forward, and a backward in two passes (FlashAttention-2, Dao 2023, section 3).

The bias `(t-i)·log β_i` is added in fp32. In a tile that no mask cuts, it is `(t-c)·log β_i + (c-i)·log β_i` with c the
tile's last key: both parts have the same sign, so nothing cancels, and the second is one number a column.

Documents and padding are two numbers a token, see `Segments.bounds`: query t attends to keys `start[t] <= i <= t`. Both
backward kernels own what they write, so there are no atomics and every run gives the same bits.

All tensors have a last stride of 1. `stride_xb`, `stride_xh`, `stride_xt` are the strides of batch, head and token.
Logits, `scale` and `lse` are in powers of two.
"""

from __future__ import annotations

from .triton_language import constexpr, dot, jit, tl

LOG2_E = constexpr(1.4426950408889634)


@jit
def _load(base, row0, stride, seq_len, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tile `(ROWS, BLOCK)` from row `row0` on, of a tensor whose rows are tokens; 0 beyond `seq_len` and `WIDTH`."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    base += tl.cast(row0, tl.int64) * stride  # offsets inside a tile fit in 32 bits, those of a long sequence do not
    mask = (rows < seq_len - row0)[:, None]
    if WIDTH != BLOCK:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@jit
def _store(base, row0, stride, seq_len, value, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    base += tl.cast(row0, tl.int64) * stride
    mask = (rows < seq_len - row0)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], value.to(base.dtype.element_ty), mask=mask)


@jit
def _keys_of(start, t, t0, seq_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile of queries: the first keys, the least one rounded down to a tile, the greatest, and where keys end."""
    first = tl.load(start + t, mask=t < seq_len, other=seq_len)
    begin = tl.min(first, 0) // BLOCK_N * BLOCK_N
    return first, begin, tl.max(tl.where(t < seq_len, first, 0), 0), tl.minimum(t0 + BLOCK_M, seq_len)


@jit
def _logits(dots, t, t0, i, i0, first, greatest, log_beta, scale, BLOCK_N: tl.constexpr):
    """Logits `(queries, keys)` of a tile, -inf where the query may not attend."""
    last = i0 + BLOCK_N - 1
    near = (last - i).to(tl.float32) * log_beta
    logits = dots * scale + near[None, :] + (t - last).to(tl.float32)[:, None] * log_beta[None, :]
    if (last > t0) | (i0 < greatest):
        allowed = (i[None, :] <= t[:, None]) & (i[None, :] >= first[:, None])
        logits = tl.where(allowed, logits, float("-inf"))
    return logits


@jit
def forward_kernel(
    query,
    key,
    value,
    log_beta,
    start,
    output,
    lse,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_ob,
    stride_oh,
    stride_ot,
    heads,
    seq_len,
    scale,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and `lse` of one tile of queries of one head. Grid: (query tiles, batch · heads)."""
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest rows first
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    kv = b * (heads // GROUPS) + h // GROUPS
    t = t0 + tl.arange(0, BLOCK_M)
    first, begin, greatest, stop = _keys_of(start + b * seq_len, t, t0, seq_len, BLOCK_M, BLOCK_N)
    key_base = key + b * stride_kb + h // GROUPS * stride_kh
    value_base = value + b * stride_vb + h // GROUPS * stride_vh
    query_base = query + b * stride_qb + h * stride_qh
    queries = _load(query_base, t0, stride_qt, seq_len, BLOCK_M, HEAD_DIM, BLOCK_D)
    decays = log_beta + kv * seq_len
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for i0 in range(begin, stop, BLOCK_N):
        i = i0 + tl.arange(0, BLOCK_N)
        keys = _load(key_base, i0, stride_kt, seq_len, BLOCK_N, HEAD_DIM, BLOCK_D)
        decay = tl.load(decays + i, mask=i < seq_len, other=0.0) * LOG2_E
        dots = dot(queries, tl.trans(keys), None, PRECISION)
        logits = _logits(dots, t, t0, i, i0, first, greatest, decay, scale, BLOCK_N)
        new_top = tl.maximum(top, tl.max(logits, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: -inf minus -inf would be NaN
        weights = tl.exp2(logits - anchor[:, None])
        shrink = tl.exp2(top - anchor)
        total = total * shrink + tl.sum(weights, 1)
        values = _load(value_base, i0, stride_vt, seq_len, BLOCK_N, VALUE_DIM, BLOCK_V)
        acc = dot(weights.to(values.dtype), values, acc * shrink[:, None], PRECISION)
        top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    output_base = output + b * stride_ob + h * stride_oh
    _store(output_base, t0, stride_ot, seq_len, acc / total[:, None], BLOCK_M, VALUE_DIM, BLOCK_V)
    tl.store(lse + row * seq_len + t, tl.where(empty, 0.0, top + tl.log2(total)), mask=t < seq_len)


@jit
def delta_kernel(
    output,
    grad,
    delta,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_gb,
    stride_gh,
    stride_gt,
    heads,
    seq_len,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """`delta[t] = output[t] · grad[t]`, fp32. Grid: (query tiles, batch · heads)."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    t0 = tl.program_id(0) * BLOCK_M
    t = t0 + tl.arange(0, BLOCK_M)
    outputs = _load(output + b * stride_ob + h * stride_oh, t0, stride_ot, seq_len, BLOCK_M, VALUE_DIM, BLOCK_V)
    grads = _load(grad + b * stride_gb + h * stride_gh, t0, stride_gt, seq_len, BLOCK_M, VALUE_DIM, BLOCK_V)
    dots = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + row * seq_len + t, dots, mask=t < seq_len)


@jit
def query_grad_kernel(
    query,
    key,
    value,
    log_beta,
    start,
    grad,
    lse,
    delta,
    query_grad,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_db,
    stride_dh,
    stride_dt,
    heads,
    seq_len,
    scale,
    scaling,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one tile of queries of one head. Grid: (query tiles, batch · heads)."""
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    kv = b * (heads // GROUPS) + h // GROUPS
    t = t0 + tl.arange(0, BLOCK_M)
    first, begin, greatest, stop = _keys_of(start + b * seq_len, t, t0, seq_len, BLOCK_M, BLOCK_N)
    key_base = key + b * stride_kb + h // GROUPS * stride_kh
    value_base = value + b * stride_vb + h // GROUPS * stride_vh
    queries = _load(query + b * stride_qb + h * stride_qh, t0, stride_qt, seq_len, BLOCK_M, HEAD_DIM, BLOCK_D)
    grads = _load(grad + b * stride_gb + h * stride_gh, t0, stride_gt, seq_len, BLOCK_M, VALUE_DIM, BLOCK_V)
    levels = tl.load(lse + row * seq_len + t, mask=t < seq_len, other=0.0)
    deltas = tl.load(delta + row * seq_len + t, mask=t < seq_len, other=0.0)
    decays = log_beta + kv * seq_len
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i0 in range(begin, stop, BLOCK_N):
        i = i0 + tl.arange(0, BLOCK_N)
        keys = _load(key_base, i0, stride_kt, seq_len, BLOCK_N, HEAD_DIM, BLOCK_D)
        values = _load(value_base, i0, stride_vt, seq_len, BLOCK_N, VALUE_DIM, BLOCK_V)
        decay = tl.load(decays + i, mask=i < seq_len, other=0.0) * LOG2_E
        dots = dot(queries, tl.trans(keys), None, PRECISION)
        logits = _logits(dots, t, t0, i, i0, first, greatest, decay, scale, BLOCK_N)
        weights = tl.exp2(logits - levels[:, None])
        slopes = dot(grads, tl.trans(values), None, PRECISION)
        slopes = weights * (slopes - deltas[:, None])
        acc = dot(slopes.to(keys.dtype), keys, acc, PRECISION)
    grad_base = query_grad + b * stride_db + h * stride_dh
    _store(grad_base, t0, stride_dt, seq_len, acc * scaling, BLOCK_M, HEAD_DIM, BLOCK_D)


@jit
def key_grad_kernel(
    query,
    key,
    value,
    log_beta,
    end,
    grad,
    lse,
    delta,
    key_grad,
    value_grad,
    beta_grad,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_db,
    stride_dh,
    stride_dt,
    stride_eb,
    stride_eh,
    stride_et,
    kv_heads,
    seq_len,
    scale,
    scaling,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one tile of keys, their values and log β, over all query heads of the group.

    Strides: `d` of key_grad, `e` of value_grad. Grid: (key tiles, batch · kv_heads).
    """
    i0 = tl.program_id(0) * BLOCK_N  # the keys with the most queries come first
    row = tl.program_id(1).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    i = i0 + tl.arange(0, BLOCK_N)
    keys = _load(key + b * stride_kb + h * stride_kh, i0, stride_kt, seq_len, BLOCK_N, HEAD_DIM, BLOCK_D)
    values = _load(value + b * stride_vb + h * stride_vh, i0, stride_vt, seq_len, BLOCK_N, VALUE_DIM, BLOCK_V)
    decay = tl.load(log_beta + row * seq_len + i, mask=i < seq_len, other=0.0) * LOG2_E
    last = i0 + BLOCK_N - 1
    before = (last - i).to(tl.float32)
    near = before * decay
    ends = tl.load(end + b * seq_len + i, mask=i < seq_len, other=0)
    stop = tl.max(ends, 0)
    begin = i0 // BLOCK_M * BLOCK_M
    # Between these two every query of a tile comes after every key and belongs to the document of all of them.
    whole = tl.min(tl.where(i < seq_len, ends, seq_len), 0)
    key_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    beta_acc = tl.zeros((BLOCK_N,), tl.float32)
    for member in range(GROUPS):
        head = h * GROUPS + member
        query_base = query + b * stride_qb + head * stride_qh
        grad_base = grad + b * stride_gb + head * stride_gh
        lses = lse + (b * kv_heads * GROUPS + head) * seq_len
        deltas = delta + (b * kv_heads * GROUPS + head) * seq_len
        for t0 in range(begin, stop, BLOCK_M):
            t = t0 + tl.arange(0, BLOCK_M)
            queries = _load(query_base, t0, stride_qt, seq_len, BLOCK_M, HEAD_DIM, BLOCK_D)
            dots = dot(keys, tl.trans(queries), None, PRECISION)
            levels = tl.load(lses + t, mask=t < seq_len, other=0.0)
            after = (t - last).to(tl.float32)
            logits = dots * scale + near[:, None] + after[None, :] * decay[:, None] - levels[None, :]
            if (t0 < last) | (t0 + BLOCK_M > whole):
                allowed = (i[:, None] <= t[None, :]) & (t[None, :] < ends[:, None])
                logits = tl.where(allowed, logits, float("-inf"))
            weights = tl.exp2(logits)
            grads = _load(grad_base, t0, stride_gt, seq_len, BLOCK_M, VALUE_DIM, BLOCK_V)
            value_acc = dot(weights.to(grads.dtype), grads, value_acc, PRECISION)
            slopes = dot(values, tl.trans(grads), None, PRECISION)
            slopes = weights * (slopes - tl.load(deltas + t, mask=t < seq_len, other=0.0)[None, :])
            beta_acc += tl.sum(slopes * after[None, :], 1) + before * tl.sum(slopes, 1)
            key_acc = dot(slopes.to(queries.dtype), queries, key_acc, PRECISION)
    key_grad_base = key_grad + b * stride_db + h * stride_dh
    value_grad_base = value_grad + b * stride_eb + h * stride_eh
    _store(key_grad_base, i0, stride_dt, seq_len, key_acc * scaling, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store(value_grad_base, i0, stride_et, seq_len, value_acc, BLOCK_N, VALUE_DIM, BLOCK_V)
    tl.store(beta_grad + row * seq_len + i, beta_acc, mask=i < seq_len)
