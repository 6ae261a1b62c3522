"""The kernels of defensive scoring: two passes over the keys, and a merge between them; see `defensive`."""

from __future__ import annotations

from ...retention.ops.triton_language import dot, jit, tl


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
