"""The backward of gated attention in two passes (FlashAttention-2, Dao 2023, section 3), after a dot product a query.

One kernel owns tiles of queries, the other tiles of keys, which their documents' queries attend to: `i <= t < end[i]`.
Both own what they write, so there are no atomics and every run gives the same bits.
"""

from __future__ import annotations

from .gated_attention_kernels import LOG2_E, capped, keys_of, load_tile, store_tile, tile_logits, uncapped_slopes
from .triton_language import dot, jit, tl


@jit
def delta_kernel(
    output, grad, delta, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, heads, q_len,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`delta[t] = output[t] · grad[t]`, fp32. Grid: (query tiles, batch · heads)."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    t0 = tl.program_id(0) * BLOCK_M
    t = t0 + tl.arange(0, BLOCK_M)
    outputs = load_tile(output + b * stride_ob + h * stride_oh, t0, stride_ot, q_len, BLOCK_M, VALUE_DIM, BLOCK_V)
    grads = load_tile(grad + b * stride_gb + h * stride_gh, t0, stride_gt, q_len, BLOCK_M, VALUE_DIM, BLOCK_V)
    dots = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + row * q_len + t, dots, mask=t < q_len)


@jit
def query_grad_kernel(
    query, key, value, log_beta, start, grad, lse, delta, query_grad, stride_qb, stride_qh, stride_qt, stride_kb,
    stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_gb, stride_gh, stride_gt, stride_db, stride_dh,
    stride_dt, heads, q_len, seq_len, scale, scaling, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, DECAYS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head. Grid: (query tiles, batch · heads)."""
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    kv = b * (heads // GROUPS) + h // GROUPS
    past = seq_len - q_len
    t = past + t0 + tl.arange(0, BLOCK_M)
    first, begin, greatest, stop = keys_of(start + b * seq_len, t, past + t0, seq_len, BLOCK_M, BLOCK_N)
    key_base = key + b * stride_kb + h // GROUPS * stride_kh
    value_base = value + b * stride_vb + h // GROUPS * stride_vh
    queries = load_tile(query + b * stride_qb + h * stride_qh, t0, stride_qt, q_len, BLOCK_M, HEAD_DIM, BLOCK_D)
    grads = load_tile(grad + b * stride_gb + h * stride_gh, t0, stride_gt, q_len, BLOCK_M, VALUE_DIM, BLOCK_V)
    levels = tl.load(lse + row * q_len + t - past, mask=t < seq_len, other=0.0)
    deltas = tl.load(delta + row * q_len + t - past, mask=t < seq_len, other=0.0)
    decays = log_beta + kv * seq_len
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i0 in range(begin, stop, BLOCK_N):
        i = i0 + tl.arange(0, BLOCK_N)
        keys = load_tile(key_base, i0, stride_kt, seq_len, BLOCK_N, HEAD_DIM, BLOCK_D)
        values = load_tile(value_base, i0, stride_vt, seq_len, BLOCK_N, VALUE_DIM, BLOCK_V)
        decay = tl.load(decays + i, mask=i < seq_len, other=0.0) * LOG2_E
        products = capped(dot(queries, tl.trans(keys), None, PRECISION) * scale, SOFTCAP)
        logits = tile_logits(products, t, past + t0, i, i0, first, greatest, decay, BLOCK_N, DECAYS)
        weights = tl.exp2(logits - levels[:, None])
        slopes = dot(grads, tl.trans(values), None, PRECISION)
        slopes = uncapped_slopes(weights * (slopes - deltas[:, None]), products, SOFTCAP)
        acc = dot(slopes.to(keys.dtype), keys, acc, PRECISION)
    grad_base = query_grad + b * stride_db + h * stride_dh
    store_tile(grad_base, t0, stride_dt, q_len, acc * scaling, BLOCK_M, HEAD_DIM, BLOCK_D)


@jit
def key_grad_kernel(
    query, key, value, log_beta, end, grad, lse, delta, key_grad, value_grad, beta_grad, stride_qb, stride_qh,
    stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_gb, stride_gh, stride_gt,
    stride_db, stride_dh, stride_dt, stride_eb, stride_eh, stride_et, kv_heads, q_len, seq_len, scale, scaling,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, DECAYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys, their values and log β, over all query heads of the group.

    Strides: `d` of key_grad, `e` of value_grad. Grid: (key tiles, batch · kv_heads).
    """
    i0 = tl.program_id(0) * BLOCK_N  # the keys with the most queries come first
    row = tl.program_id(1).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    i = i0 + tl.arange(0, BLOCK_N)
    keys = load_tile(key + b * stride_kb + h * stride_kh, i0, stride_kt, seq_len, BLOCK_N, HEAD_DIM, BLOCK_D)
    values = load_tile(value + b * stride_vb + h * stride_vh, i0, stride_vt, seq_len, BLOCK_N, VALUE_DIM, BLOCK_V)
    decay = tl.load(log_beta + row * seq_len + i, mask=i < seq_len, other=0.0) * LOG2_E
    past = seq_len - q_len
    last = i0 + BLOCK_N - 1
    before = (last - i).to(tl.float32)
    near = before * decay if DECAYS else decay
    ends = tl.load(end + b * seq_len + i, mask=i < seq_len, other=0)
    stop = tl.max(ends, 0) - past
    begin = tl.maximum(i0 - past, 0) // BLOCK_M * BLOCK_M
    # Between these two every query of a tile comes after every key and belongs to the document of all of them.
    whole = tl.min(tl.where(i < seq_len, ends, seq_len), 0)
    key_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    beta_acc = tl.zeros((BLOCK_N,), tl.float32)
    for member in range(GROUPS):
        head = h * GROUPS + member
        query_base = query + b * stride_qb + head * stride_qh
        grad_base = grad + b * stride_gb + head * stride_gh
        lses = lse + (b * kv_heads * GROUPS + head) * q_len
        deltas = delta + (b * kv_heads * GROUPS + head) * q_len
        for t0 in range(begin, stop, BLOCK_M):
            q = t0 + tl.arange(0, BLOCK_M)
            t = past + q
            queries = load_tile(query_base, t0, stride_qt, q_len, BLOCK_M, HEAD_DIM, BLOCK_D)
            products = capped(dot(keys, tl.trans(queries), None, PRECISION) * scale, SOFTCAP)
            levels = tl.load(lses + q, mask=q < q_len, other=0.0)
            after = (t - last).to(tl.float32)
            logits = products + near[:, None]
            if DECAYS:
                logits += after[None, :] * decay[:, None]
            logits -= levels[None, :]
            if (past + t0 < last) | (past + t0 + BLOCK_M > whole):
                allowed = (i[:, None] <= t[None, :]) & (t[None, :] < ends[:, None])
                logits = tl.where(allowed, logits, float("-inf"))
            weights = tl.exp2(logits)
            grads = load_tile(grad_base, t0, stride_gt, q_len, BLOCK_M, VALUE_DIM, BLOCK_V)
            value_acc = dot(weights.to(grads.dtype), grads, value_acc, PRECISION)
            slopes = dot(values, tl.trans(grads), None, PRECISION)
            slopes = weights * (slopes - tl.load(deltas + q, mask=q < q_len, other=0.0)[None, :])
            if DECAYS:
                beta_acc += tl.sum(slopes * after[None, :], 1) + before * tl.sum(slopes, 1)
            else:
                beta_acc += tl.sum(slopes, 1)
            slopes = uncapped_slopes(slopes, products, SOFTCAP)
            key_acc = dot(slopes.to(queries.dtype), queries, key_acc, PRECISION)
    key_grad_base = key_grad + b * stride_db + h * stride_dh
    value_grad_base = value_grad + b * stride_eb + h * stride_eh
    store_tile(key_grad_base, i0, stride_dt, seq_len, key_acc * scaling, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(value_grad_base, i0, stride_et, seq_len, value_acc, BLOCK_N, VALUE_DIM, BLOCK_V)
    tl.store(beta_grad + row * seq_len + i, beta_acc, mask=i < seq_len)
