"""The kernels of ragged decode: a piece of a segment, and the merge of its pieces; see `decode`."""

from __future__ import annotations

from ...retention.ops.triton_language import dot, jit, tl


@jit
def _pieces(lengths, segments, PROGRAMS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Lengths of all segments, pieces of each, and a piece's entries."""
    lane = tl.arange(0, SEGMENTS)
    length = tl.load(lengths + lane, mask=lane < segments, other=0)
    piece = tl.cdiv(tl.sum(length, 0), PROGRAMS)
    piece = tl.maximum(tl.cdiv(piece, BLOCK), 1) * BLOCK
    return lane, length, tl.cdiv(length, piece), piece


@jit
def attend_piece(
    query, key_pages, value_pages, table, lengths, hidden, partial, log_sum, scale, segments, heads, q_len, width,
    query_row, query_head, query_token,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (PROGRAMS + segments, tiles of rows): one piece of one segment, for some rows.

    Writes the softmax of the piece times its values, and the base-2 logarithm of its denominator.
    """
    program, tile = tl.program_id(0), tl.program_id(1)
    lane, length, pieces, piece = _pieces(lengths, segments, PROGRAMS, SEGMENTS, BLOCK)
    segment = tl.sum((tl.cumsum(pieces, 0) <= program).to(tl.int32), 0)
    if segment >= segments:
        return
    start = (program - tl.sum(tl.where(lane < segment, pieces, 0), 0)) * piece
    own = tl.sum(tl.where(lane == segment, length, 0), 0)
    stop = tl.minimum(start + piece, own)
    batch, head = segment // heads, segment % heads

    row = tile * ROWS + tl.arange(0, ROWS)
    present = row < q_len * GROUP
    token, member = row // GROUP, row % GROUP
    unseen = q_len - 1 - token  # the newest entries are the new tokens' own
    if hidden is not None:
        unseen = tl.load(hidden + batch * q_len + token, mask=present, other=-1)
    limit = tl.where(present & (unseen >= 0), own - unseen, 0)
    key_dim, value_dim = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    at = batch.to(tl.int64) * query_row + (head * GROUP + member) * query_head + token * query_token
    wanted = present[:, None] & (key_dim < KEY_DIM)[None, :]
    q = tl.load(query + at[:, None] + key_dim[None, :], mask=wanted, other=0.0)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    pages = table + segment.to(tl.int64) * width
    for first in range(start, stop, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        stored = entry < stop
        page = tl.load(pages + entry // PAGE, mask=stored, other=0).to(tl.int64)
        slot = page * PAGE + entry % PAGE
        # Free slots may hold anything, NaN too: nothing of them is read.
        whole = stored[:, None] & (key_dim < KEY_DIM)[None, :]
        k = tl.load(key_pages + slot[:, None] * KEY_DIM + key_dim[None, :], mask=whole, other=0.0)
        logits = dot(q, tl.trans(k), None, PRECISION) * scale
        logits = tl.where(entry[None, :] < tl.minimum(limit, stop)[:, None], logits, float("-inf"))
        new = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
        weight = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(highest - base)
        whole = stored[:, None] & (value_dim < VALUE_DIM)[None, :]
        v = tl.load(value_pages + slot[:, None] * VALUE_DIM + value_dim[None, :], mask=whole, other=0.0)
        result = dot(weight.to(v.dtype), v, result * shrink[:, None], PRECISION)
        total = total * shrink + tl.sum(weight, 1)
        highest = new
    place = (program.to(tl.int64) * tl.num_programs(1) + tile) * ROWS + tl.arange(0, ROWS)
    some = tl.where(total > 0.0, total, 1.0)
    logs = tl.where(total > 0.0, highest + tl.log2(some), float("-inf"))
    tl.store(log_sum + place, logs, mask=present)
    into = partial + place[:, None] * VALUE_BLOCK + value_dim[None, :]
    tl.store(into, result / some[:, None], mask=present[:, None])


@jit
def merge_pieces(
    partial, log_sum, lengths, out, segments, heads, q_len, tiles,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr, SEGMENTS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Grid (segments, rows): merges the pieces of a segment for one row; zeros if it has seen nothing."""
    segment, row = tl.program_id(0), tl.program_id(1)
    lane, _, pieces, _ = _pieces(lengths, segments, PROGRAMS, SEGMENTS, BLOCK)
    before = tl.sum(tl.where(lane < segment, pieces, 0), 0)
    count = tl.sum(tl.where(lane == segment, pieces, 0), 0)
    dim = tl.arange(0, VALUE_BLOCK)
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    result = tl.zeros([VALUE_BLOCK], tl.float32)
    for first in range(0, count, MERGED):
        index = first + tl.arange(0, MERGED)
        program = (before + index).to(tl.int64)
        place = (program * tiles + row // ROWS) * ROWS + row % ROWS
        logs = tl.load(log_sum + place, mask=index < count, other=float("-inf"))
        parts = tl.load(
            partial + place[:, None] * VALUE_BLOCK + dim[None, :], mask=(index < count)[:, None], other=0.0
        )
        new = tl.maximum(highest, tl.max(logs, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(logs - base)
        shrink = tl.exp2(highest - base)
        result = result * shrink + tl.sum(parts * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        highest = new
    result = result / tl.where(total > 0.0, total, 1.0)
    batch, head = segment // heads, segment % heads
    at = (batch.to(tl.int64) * q_len + row // GROUP) * heads * GROUP + head * GROUP + row % GROUP
    tl.store(out + at * VALUE_DIM + dim, result.to(out.dtype.element_ty), mask=dim < VALUE_DIM)
