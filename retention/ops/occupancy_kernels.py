"""Triton kernels of occupancy `S_t = Σ_{i≤t} exp((t-i)·log β_i)` and of its gradient.

Only a tile of the queries-by-keys terms exists at a time. Tiles whose terms all lie below `exp(-30)` are skipped:
next to the self term 1 they are below the resolution of fp32. Every program owns what it writes: no atomics.

Positions are compared and subtracted in fp32, exact up to 2^24 tokens. Exponents are in powers of two.
"""

from __future__ import annotations

from .triton_language import constexpr, jit, tl

LOG2_E = constexpr(1.4426950408889634)
NEGLIGIBLE = constexpr(-43.28085122666891)  # -30 · log2(e)
TINY = constexpr(1e-30)


@jit
def forward_kernel(
    log_beta, index, start, output, batch, heads, seq_len, samples, CHOSEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Occupancy of one row at one tile of queries. Grid: (layers · batch · heads, query tiles).

    Args:
        log_beta: `(layers, batch, heads, seq_len)`.
        index: `(batch, samples)` rising, the queries' columns, if CHOSEN; else the queries are all columns.
        output: `(layers, batch, heads, samples)`.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // heads % batch
    s = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = tl.load(index + b * samples + s, mask=s < samples, other=-1) if CHOSEN else tl.where(s < samples, s, -1)
    first = tl.load(start + b * seq_len + t, mask=t >= 0, other=seq_len)
    earliest = tl.min(tl.where(t >= 0, t, seq_len), 0)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for i0 in range(tl.min(first, 0) // BLOCK_N * BLOCK_N, tl.max(t, 0) + 1, BLOCK_N):
        i = i0 + tl.arange(0, BLOCK_N)
        decay = tl.load(log_beta + row * seq_len + i, mask=i < seq_len, other=0.0) * LOG2_E
        if tl.max(tl.maximum(earliest - i, 0).to(tl.float32) * decay, 0) > NEGLIGIBLE:
            terms = tl.exp2((t.to(tl.float32)[:, None] - i.to(tl.float32)[None, :]) * decay[None, :])
            counts = (i[None, :] <= t[:, None]) & (i[None, :] >= first[:, None])
            total += tl.sum(tl.where(counts, terms, 0.0), 1)
    tl.store(output + row * samples + s, total, mask=s < samples)


@jit
def backward_kernel(
    log_beta, index, end, grad, beta_grad, batch, heads, seq_len, samples, CHOSEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of one row at one tile of keys: `Σ_t grad_t · (t-i) · exp((t-i)·log β_i)`. Grid: (rows, key tiles).

    Args:
        grad: of the output of `forward_kernel`.
        beta_grad: `(layers, batch, heads, seq_len)`.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // heads % batch
    i0 = tl.program_id(1) * BLOCK_N
    i = i0 + tl.arange(0, BLOCK_N)
    decay = tl.load(log_beta + row * seq_len + i, mask=i < seq_len, other=-1.0) * LOG2_E
    ends = tl.load(end + b * seq_len + i, mask=i < seq_len, other=0)
    # The last query to which any key of the tile still counts, if documents did not end.
    reach = tl.max(i.to(tl.float32) + NEGLIGIBLE / tl.minimum(decay, -TINY), 0) + 1.0
    stop = tl.minimum(tl.max(ends, 0).to(tl.float32), reach).to(tl.int32)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for s0 in range(0 if CHOSEN else i0 // BLOCK_M * BLOCK_M, samples if CHOSEN else stop, BLOCK_M):
        s = s0 + tl.arange(0, BLOCK_M)
        t = tl.load(index + b * samples + s, mask=s < samples, other=-1) if CHOSEN else s
        if (tl.max(t, 0) >= i0) & (tl.min(tl.where(s < samples, t, seq_len), 0) < stop):
            weight = tl.load(grad + row * samples + s, mask=s < samples, other=0.0)
            distance = t.to(tl.float32)[None, :] - i.to(tl.float32)[:, None]
            terms = distance * tl.exp2(distance * decay[:, None]) * weight[None, :]
            counts = (i[:, None] <= t[None, :]) & (t[None, :] < ends[:, None])
            acc += tl.sum(tl.where(counts, terms, 0.0), 1)
    tl.store(beta_grad + row * seq_len + i, acc, mask=i < seq_len)
