"""Kernels on page tables: append entries to segments, compact segments and release pages, all on the device.

A *segment* is the entries of one head of one row. Its entry i is in slot `i % page_size` of page
`table[segment, i // page_size]`. Pages that no segment owns are in `free[:counters[0]]`, a stack. Segments take pages
in the order of their numbers, by a prefix sum, so the same calls give the same pages.

Ownership: table entries below `ceil(length / page_size)` are owned pages; those after them are stale and may name pages
that other segments own now. `owned + counters[0] == num_pages` after every call.
"""

from __future__ import annotations

import torch

from ...retention.ops.kernel_choice import LAUNCH_OPTIONS, chosen_kernels, interpreting, launching_on
from ...retention.ops.triton_language import jit, tl
from . import naive

PAGE_SIZES = (16, 32, 64, 128)  # supported numbers of entries per page

# Tile sizes of the kernels.
SEGMENTS = 1024  # segments planned at a time
COLUMNS = 16  # new tokens written by a program
# Entries moved by a program at a time: many, as each step is a chain of dependent loads. Few in the interpreter, so
# that short segments take several steps.
ENTRIES, FEW_ENTRIES = 512, 64
WIDTH = 16  # numbers of an entry moved by a program
MOVING_WARPS = 8
OWNED = 256  # pages released at a time


@jit
def plan_append(lengths, added, counters, plan, segments, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: computes where new entries begin and which free pages they take, and updates `lengths`.

    `plan[0, s]` is the old length, or -1 for all if there are too few pages; `plan[1, s]` the index in `free` of the
    segment's first new page, the following ones below it.
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
    """Entry number, page and write mask of some new tokens of a segment."""
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
    """Grid (segments, blocks of new tokens): takes the pages that `plan_append` assigned, and writes the entries."""
    segment = tl.program_id(0)
    row, head = segment // heads, segment % heads
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry, page, mask = _place(rank, plan, table, segment, row, column, n, width, PAGE)
    slot = entry // PAGE
    owned = (tl.load(plan + segment) + PAGE - 1) // PAGE
    fresh = mask & (slot >= owned)
    taken = tl.load(free + tl.load(plan + segments + segment) - (slot - owned), mask=fresh, other=0)
    page = tl.where(fresh, taken, page)
    # A fresh page is filled from its first slot on: the program that writes this slot adds it to the table.
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
    """Grid (segments, parts of an entry): moves kept entries to the front, in their order.

    Entries only move forward, and a block is read as a whole before any of it is written, so that nothing is
    overwritten before it is read. Other programs move other numbers of the entries.
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
    """One program: computes where in `free` each segment returns its pages, and updates `lengths`.

    `plan` gets three numbers per segment: that index, the first page to release, and their count.
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
def push_free(plan, table, free, segments, width, BLOCK: tl.constexpr):
    """Grid (segments,): pushes the pages that `plan_release` counted onto the stack of free pages."""
    segment = tl.program_id(0)
    into, first = tl.load(plan + segment), tl.load(plan + segments + segment)
    count = tl.load(plan + 2 * segments + segment)
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        page = tl.load(table + segment.to(tl.int64) * width + first + lane, mask=lane < count, other=0)
        tl.store(free + into + lane, page, mask=lane < count)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _segments(n: int) -> int:
    return min(SEGMENTS, max(16, _power(n)))


@torch.library.custom_op(
    "tenure::append_entries",
    mutates_args=("key_pages", "value_pages", "position_pages", "table", "lengths", "counters"),
)
def append_entries(
    key: torch.Tensor, value: torch.Tensor, position: torch.Tensor, rank: torch.Tensor, added: torch.Tensor,
    key_pages: torch.Tensor, value_pages: torch.Tensor, position_pages: torch.Tensor, table: torch.Tensor,
    lengths: torch.Tensor, free: torch.Tensor, counters: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Appends new entries to all segments, and allocates the pages that they need. No host sync.

    If there are not enough pages for all, nothing is written and `counters[1]` becomes 1. The width of `table` must be
    enough for the new lengths.

    Args:
        key, value: `(batch, num_kv_heads, n, dim)`; segment `row * num_kv_heads + head`.
        position: int32 `(batch, n)`.
        rank: int32 `(batch, n)`: the token's index among the row's new entries; -1 for padding, which is skipped.
        added: int32 `(segments,)`: number of real tokens of its row.
        key_pages, value_pages, position_pages: `(num_pages, page_size, dim)`, the last int32 `(num_pages, page_size)`.
        table: int32 `(segments, width)`; lengths: int32 `(segments,)`.
        free: int32 `(num_pages,)`; counters: int32 `(2,)`: free pages, and 1 if an append has found too few.

    Returns:
        The plan, int32 `(2, segments)`, for `write_state`.
    Raises:
        ValueError: unsupported shapes or dtypes.
    """
    check_pages(key_pages, value_pages, position_pages, table, lengths, free, counters)
    if (key.dtype, value.dtype) != (key_pages.dtype, value_pages.dtype) or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"got keys {key.dtype} {tuple(key.shape)} and values {value.dtype} {tuple(value.shape)} for pages of "
            f"{key_pages.dtype} and {value_pages.dtype}; accepted: (batch, num_kv_heads, n, dim) of the pages' dtypes"
        )
    batch, heads, n = key.shape[:3]
    dims = (key.shape[3], value.shape[3]), (key_pages.shape[2], value_pages.shape[2])
    if dims[0] != dims[1] or batch * heads != lengths.shape[0]:
        raise ValueError(
            f"got {batch} rows of {heads} heads with {dims[0]} numbers for {lengths.shape[0]} segments with {dims[1]}; "
            "accepted: batch * num_kv_heads segments, and as many numbers as the pages have"
        )
    _check(
        "append", position=(position, torch.int32, (batch, n)), rank=(rank, torch.int32, (batch, n)),
        added=(added, torch.int32, lengths.shape),
    )  # fmt: skip
    plan = lengths.new_empty(2, lengths.shape[0])
    if chosen_kernels(key_pages.device) == "reference":
        pages = key_pages, value_pages, position_pages
        naive.append_entries(key, value, position, rank, added, *pages, table, lengths, free, counters, plan)
        return plan
    key, value = _rows(key), _rows(value)
    (key_dim, value_dim), segments, page = dims[0], lengths.shape[0], key_pages.shape[1]
    block = min(COLUMNS, _power(n))
    with launching_on(key_pages):
        plan_append[(1,)](
            lengths, added.contiguous(), counters, plan, segments, PAGE=page, BLOCK=_segments(segments),
            **LAUNCH_OPTIONS,
        )  # fmt: skip
        if segments and n:
            write_new[(segments, -(-n // block))](
                key, value, position.contiguous(), rank.contiguous(), plan, table, free, key_pages, value_pages,
                position_pages, segments, heads, n, table.shape[1], *key.stride()[:3], *value.stride()[:3],
                KEY_DIM=key_dim, VALUE_DIM=value_dim, KEY_BLOCK=_power(key_dim), VALUE_BLOCK=_power(value_dim),
                PAGE=page, BLOCK=block, **LAUNCH_OPTIONS,
            )  # fmt: skip
    return plan


@append_entries.register_fake
def _(
    key, value, position, rank, added, key_pages, value_pages, position_pages, table, lengths, free, counters
):  # fmt: skip
    return lengths.new_empty(2, lengths.shape[0])


@torch.library.custom_op("tenure::write_state", mutates_args=("pages",))
def write_state(
    state: torch.Tensor, rank: torch.Tensor, plan: torch.Tensor, table: torch.Tensor, pages: torch.Tensor
) -> None:
    """Writes one number of each entry that `append_entries` has just appended.

    Args:
        state: `(batch, num_kv_heads, n)`, the dtype of `pages`.
        rank, table: as given to `append_entries`; plan: what it returned.
        pages: `(num_pages, page_size)`, contiguous.

    Raises:
        ValueError: unsupported shapes or dtypes.
    """
    segments, (batch, heads, n) = table.shape[0], state.shape
    _check(
        "a state", state=(state, pages.dtype, (batch, segments // max(batch, 1), n)),
        rank=(rank, torch.int32, (batch, n)), plan=(plan, torch.int32, (2, segments)),
        table=(table, torch.int32, table.shape[:2]), pages=(pages, pages.dtype, pages.shape[:2]),
    )  # fmt: skip
    _check_layout(pages.shape[1], table, pages)
    if chosen_kernels(pages.device) == "reference":
        return naive.write_state(state, rank, plan, table, pages)
    block = min(64, _power(n))
    if not segments or not n:
        return None
    with launching_on(pages):
        write_numbers[(segments, -(-n // block))](
            state.contiguous(), rank.contiguous(), plan.contiguous(), table, pages, heads, n, table.shape[1],
            PAGE=pages.shape[1], BLOCK=block, **LAUNCH_OPTIONS,
        )  # fmt: skip


@torch.library.custom_op("tenure::move_entries", mutates_args=("pages",))
def move_entries(keep: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, pages: torch.Tensor) -> None:
    """Moves the entries to keep to the front of their segments, in their order; lengths are unchanged.

    Args:
        keep: bool `(segments, n)`, n at least the longest segment; values beyond a segment's length are not read.
        pages: `(num_pages, page_size, ...)`, of any dtype, contiguous.

    Raises:
        ValueError: unsupported shapes or dtypes.
    """
    segments = table.shape[0]
    _check(
        "compaction", keep=(keep, torch.bool, (segments, *keep.shape[1:2])),
        lengths=(lengths, torch.int32, (segments,)), table=(table, torch.int32, table.shape[:2]),
    )  # fmt: skip
    _check_layout(pages.shape[1], lengths, table, pages)
    if chosen_kernels(pages.device) == "reference":
        return naive.move_entries(keep, lengths, table, pages)
    dim = pages[0, 0].numel()
    part = min(WIDTH, _power(dim))
    entries = FEW_ENTRIES if interpreting() else ENTRIES
    if not segments:
        return None
    with launching_on(pages):
        move_kept[(segments, -(-dim // part))](
            keep.contiguous().view(torch.int8), lengths, table, pages, keep.shape[1], table.shape[1], DIM=dim,
            WIDTH=part, PAGE=pages.shape[1], BLOCK=entries, num_warps=MOVING_WARPS, **LAUNCH_OPTIONS,
        )  # fmt: skip


@torch.library.custom_op("tenure::release_pages", mutates_args=("lengths", "free", "counters"))
def release_pages(
    lengths: torch.Tensor, shorter: torch.Tensor, table: torch.Tensor, free: torch.Tensor, counters: torch.Tensor,
    page_size: int,
) -> None:  # fmt: skip
    """Shortens segments to their first `shorter` entries; pages without entries become free. No host sync.

    Args:
        lengths, table, free, counters: as in `append_entries`.
        shorter: int32 `(segments,)`; a number above the segment's length changes nothing.

    Raises:
        ValueError: unsupported shapes or dtypes.
    """
    segments = table.shape[0]
    _check(
        "release", lengths=(lengths, torch.int32, (segments,)), shorter=(shorter, torch.int32, (segments,)),
        table=(table, torch.int32, table.shape[:2]), free=(free, torch.int32, free.shape[:1]),
        counters=(counters, torch.int32, (2,)),
    )  # fmt: skip
    _check_layout(page_size, lengths, table, free, counters)
    if chosen_kernels(lengths.device) == "reference":
        return naive.release_pages(lengths, shorter, table, free, counters, page_size)
    if not segments:
        return None
    plan, block = lengths.new_empty(3, segments), _segments(segments)
    with launching_on(lengths):
        plan_release[(1,)](
            lengths, shorter.contiguous(), counters, plan, segments, PAGE=page_size, BLOCK=block, **LAUNCH_OPTIONS
        )
        push_free[(segments,)](plan, table, free, segments, table.shape[1], BLOCK=OWNED, **LAUNCH_OPTIONS)


for _op in (write_state, move_entries, release_pages):
    _op.register_fake(lambda *arguments: None)


def check_pages(
    key_pages: torch.Tensor, value_pages: torch.Tensor, position_pages: torch.Tensor, table: torch.Tensor,
    lengths: torch.Tensor, free: torch.Tensor, counters: torch.Tensor,
) -> None:  # fmt: skip
    """Raises ValueError for pages that the kernels do not support."""
    count, size = key_pages.shape[:2]
    if value_pages.shape[:2] != (count, size) or position_pages.shape != (count, size) or free.shape != (count,):
        raise ValueError(
            f"got pages {tuple(key_pages.shape)}, {tuple(value_pages.shape)} and {tuple(position_pages.shape)} with "
            f"{tuple(free.shape)} in the stack; accepted: as many of each, of one size"
        )
    integers = {"positions": position_pages, "table": table, "lengths": lengths, "free": free, "counters": counters}
    wrong = {name: str(tensor.dtype) for name, tensor in integers.items() if tensor.dtype != torch.int32}
    if wrong or table.ndim != 2 or lengths.shape != table.shape[:1] or counters.shape != (2,):
        raise ValueError(
            f"got {wrong or 'int32'}, a table {tuple(table.shape)}, lengths {tuple(lengths.shape)} and counters "
            f"{tuple(counters.shape)}; accepted: torch.int32, (segments, width), (segments,) and (2,)"
        )
    _check_layout(size, key_pages, value_pages, *integers.values())


def _check(operation: str, **tensors: tuple[torch.Tensor, torch.dtype, tuple[int, ...]]) -> None:
    """Raises ValueError for a tensor whose dtype or shape is not the given one."""
    wrong = {name: one for name, one in tensors.items() if (one[0].dtype, tuple(one[0].shape)) != (one[1], one[2])}
    if wrong:
        given = ", ".join(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, (tensor, *_) in wrong.items())
        accepted = ", ".join(f"{name} {dtype} {tuple(shape)}" for name, (_, dtype, shape) in wrong.items())
        raise ValueError(f"{operation} got {given}; accepted: {accepted}")


def _check_layout(page_size: int, *tensors: torch.Tensor) -> None:
    if page_size not in PAGE_SIZES:
        raise ValueError(f"got a page size of {page_size}; accepted: {', '.join(map(str, PAGE_SIZES))}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("got pages, tables or counters with gaps; accepted: contiguous tensors")


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """With its last dimension contiguous, as the kernel reads it; keys and values are usually views of a projection."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
