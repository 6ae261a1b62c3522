"""The kernels of pages: append, compaction and release; see `pages`."""

from __future__ import annotations

from ...retention.ops.triton_language import jit, tl


@jit
def plan_append(lengths, added, counters, plan, segments, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: where new entries begin, and which free pages they take; `lengths` then count them.

    `plan[0, s]` is the old length, or -1 for all if there are too few pages; `plan[1, s]` where in `free` the first new
    page of the segment stands, the following ones below it.
    """
    lane = tl.arange(0, BLOCK)
    wanted = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, segments, BLOCK):
        mask = first + lane < segments
        old = tl.load(lengths + first + lane, mask=mask, other=0)
        new = old + tl.load(added + first + lane, mask=mask, other=0)
        wanted += (new + PAGE - 1) // PAGE - (old + PAGE - 1) // PAGE
    top = tl.load(counters)
    total = tl.sum(wanted, 0)
    enough = total <= top
    next_page = top - 1
    for first in range(0, segments, BLOCK):
        mask = first + lane < segments
        old = tl.load(lengths + first + lane, mask=mask, other=0)
        new = old + tl.load(added + first + lane, mask=mask, other=0)
        pages = (new + PAGE - 1) // PAGE - (old + PAGE - 1) // PAGE
        before = tl.cumsum(pages, 0) - pages
        tl.store(plan + first + lane, tl.where(enough, old, -1), mask=mask)
        tl.store(plan + segments + first + lane, next_page - before, mask=mask)
        tl.store(lengths + first + lane, tl.where(enough, new, old), mask=mask)
        next_page -= tl.sum(pages, 0)
    tl.store(counters, tl.where(enough, top - total, top))
    tl.store(counters + 1, tl.where(enough, tl.load(counters + 1), 1))


@jit
def _place(rank, plan, table, segment, row, column, n, width, PAGE: tl.constexpr):
    """Entry number, page and whether it is written, of some new tokens of a segment."""
    mask = column < n
    place = tl.load(rank + row * n + column, mask=mask, other=-1)
    start = tl.load(plan + segment)
    place = tl.where(start < 0, -1, place)
    mask = mask & (place >= 0)
    entry = start + place
    page = tl.load(table + segment.to(tl.int64) * width + entry // PAGE, mask=mask, other=0)
    return entry, page, mask


@jit
def write_new(
    key, value, position, rank, plan, table, free, key_pages, value_pages, position_pages, segments, heads, n, width,
    key_row, key_head, key_token, value_row, value_head, value_token,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (segments, blocks of new tokens): takes the pages that `plan_append` chose, and writes the entries."""
    segment = tl.program_id(0)
    row, head = segment // heads, segment % heads
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry, page, mask = _place(rank, plan, table, segment, row, column, n, width, PAGE)
    slot = entry // PAGE
    owned = (tl.load(plan + segment) + PAGE - 1) // PAGE
    fresh = mask & (slot >= owned)
    taken = tl.load(free + tl.load(plan + segments + segment) - (slot - owned), mask=fresh, other=0)
    page = tl.where(fresh, taken, page)
    # A fresh page is filled from its first slot on: the program that writes there enters it.
    tl.store(table + segment.to(tl.int64) * width + slot, page, mask=fresh & (entry % PAGE == 0))
    target = page.to(tl.int64) * PAGE + entry % PAGE
    tl.store(position_pages + target, tl.load(position + row * n + column, mask=mask, other=0), mask=mask)
    wide = row.to(tl.int64)
    dim = tl.arange(0, KEY_BLOCK)[None, :]
    both = mask[:, None] & (dim < KEY_DIM)
    source = key + wide * key_row + head * key_head + column[:, None].to(tl.int64) * key_token + dim
    tl.store(key_pages + target[:, None] * KEY_DIM + dim, tl.load(source, mask=both, other=0.0), mask=both)
    dim = tl.arange(0, VALUE_BLOCK)[None, :]
    both = mask[:, None] & (dim < VALUE_DIM)
    source = value + wide * value_row + head * value_head + column[:, None].to(tl.int64) * value_token + dim
    tl.store(value_pages + target[:, None] * VALUE_DIM + dim, tl.load(source, mask=both, other=0.0), mask=both)


@jit
def write_numbers(numbers, rank, plan, table, pages, heads, n, width, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (segments, blocks of new tokens): one number of each new entry, after `write_new`."""
    segment = tl.program_id(0)
    row = segment // heads
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry, page, mask = _place(rank, plan, table, segment, row, column, n, width, PAGE)
    new = tl.load(numbers + segment.to(tl.int64) * n + column, mask=mask, other=0.0)
    tl.store(pages + page.to(tl.int64) * PAGE + entry % PAGE, new, mask=mask)


@jit
def move_kept(
    keep, lengths, table, pages, n, width, DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (segments, parts of an entry): moves the survivors to the front, in their order.

    An entry never moves back, and a block is read as a whole before any of it is written: nothing is overwritten that
    is still to be read. Other programs move other numbers of the entries.
    """
    segment = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    length = tl.load(lengths + segment)
    kept = 0
    for first in range(0, length, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        stays = tl.load(keep + segment * n + entry, mask=entry < length, other=0) != 0
        target = kept + tl.cumsum(stays.to(tl.int32), 0) - 1
        kept += tl.sum(stays.to(tl.int32), 0)
        moves = stays & (target != entry)
        source = tl.load(table + segment * width + entry // PAGE, mask=moves, other=0).to(tl.int64)
        into = tl.load(table + segment * width + target // PAGE, mask=moves, other=0).to(tl.int64)
        both = moves[:, None] & (dim < DIM)
        data = tl.load(pages + (source * PAGE + entry % PAGE)[:, None] * DIM + dim, mask=both)
        tl.debug_barrier()
        tl.store(pages + (into * PAGE + target % PAGE)[:, None] * DIM + dim, data, mask=both)


@jit
def plan_release(lengths, shorter, counters, plan, segments, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: where in `free` each segment puts its pages; `lengths` become the shorter ones.

    `plan` gets three numbers a segment: that place, the first page to give back, and their count.
    """
    lane = tl.arange(0, BLOCK)
    top = tl.load(counters)
    for first in range(0, segments, BLOCK):
        mask = first + lane < segments
        old = tl.load(lengths + first + lane, mask=mask, other=0)
        new = tl.minimum(tl.load(shorter + first + lane, mask=mask, other=0), old)
        kept = (new + PAGE - 1) // PAGE
        pages = (old + PAGE - 1) // PAGE - kept
        tl.store(plan + first + lane, top + tl.cumsum(pages, 0) - pages, mask=mask)
        tl.store(plan + segments + first + lane, kept, mask=mask)
        tl.store(plan + 2 * segments + first + lane, pages, mask=mask)
        tl.store(lengths + first + lane, new, mask=mask)
        top += tl.sum(pages, 0)
    tl.store(counters, top)


@jit
def give_back(plan, table, free, segments, width, BLOCK: tl.constexpr):
    """Grid (segments,): puts the pages that `plan_release` counted onto the stack."""
    segment = tl.program_id(0)
    into, first = tl.load(plan + segment), tl.load(plan + segments + segment)
    count = tl.load(plan + 2 * segments + segment)
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        page = tl.load(table + segment.to(tl.int64) * width + first + lane, mask=lane < count, other=0)
        tl.store(free + into + lane, page, mask=lane < count)
