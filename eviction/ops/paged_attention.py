"""Attention of a few new queries over paged segments of different lengths: split-K, without reading from the device.

A segment's entries are divided among programs in pieces of equal length, and the number of pieces is computed from the
lengths on the device: `piece = ceil(entries of all segments / programs)`, in whole blocks. So a head that keeps ten
times as many entries gets ten times as many programs, and no program reads more than another. The grid depends only on
shapes; every program finds its piece by a prefix sum over the segments. Partial results carry the logarithm of their
softmax denominator and are merged in the order of the pieces.

The query heads that share a key/value head, and the new tokens, are the rows of one tile: an entry is read once for
all of them. All lengths, tables and hidden counts are in device memory, so a CUDA graph can be replayed as they grow.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from ...retention.ops.gated_attention_kernels import LOG2_E, capped
from ...retention.ops.kernel_choice import LAUNCH_OPTIONS, chosen_kernels, dot_precision, launching_on
from ...retention.ops.softmax import ORDINARY, Softmax
from ...retention.ops.triton_language import constexpr, dot, jit, tl
from . import naive
from .page_table import PAGE_SIZES

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_DIM = 256
MAX_SEGMENTS = 4096
LOG2E = math.log2(math.e)
LN2 = constexpr(0.6931471805599453)

# Tile sizes of the kernels.
ROWS = 64  # rows of a tile, at most
MERGED = 16  # partial results merged at a time
WAVES = 2  # programs per multiprocessor
PROGRAMS = 4  # programs without a GPU, in the interpreter


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
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid (PROGRAMS + segments, tiles of rows): one piece of one segment, for some rows.

    Writes the softmax of the piece times its values, and the base-2 logarithm of its denominator. `scale` and SOFTCAP,
    0 for no cap, are of logits in powers of two.
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
        # Free slots may contain anything, NaN included: they are never read.
        whole = stored[:, None] & (key_dim < KEY_DIM)[None, :]
        k = tl.load(key_pages + slot[:, None] * KEY_DIM + key_dim[None, :], mask=whole, other=0.0)
        logits = capped(dot(q, tl.trans(k), None, PRECISION) * scale, SOFTCAP)
        logits = tl.where(entry[None, :] < tl.minimum(limit, stop)[:, None], logits, float("-inf"))
        new = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no entry yet
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
    partial, log_sum, lengths, sinks, out, log_total, segments, heads, q_len, tiles,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr, SEGMENTS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Grid (segments, rows): merges the pieces of a segment for one row; zeros if it has seen no entry.

    `log_total` gets the logarithm of the softmax denominator, -inf if it has seen none. `sinks`, a logit of each query
    head or None, are in the denominator.
    """
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
        parts = tl.load(partial + place[:, None] * VALUE_BLOCK + dim[None, :], mask=(index < count)[:, None], other=0.0)
        new = tl.maximum(highest, tl.max(logs, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(logs - base)
        shrink = tl.exp2(highest - base)
        result = result * shrink + tl.sum(parts * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        highest = new
    batch, head = segment // heads, segment % heads
    if sinks is not None:
        sink = tl.load(sinks + head * GROUP + row % GROUP + tl.arange(0, 1)).to(tl.float32) * LOG2_E
        new = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - new)
        result = result * shrink
        total = total * shrink + tl.exp2(sink - new)
        highest = new
    some = tl.where(total > 0.0, total, 1.0)
    result = result / some
    logs = tl.where(total > 0.0, (highest + tl.log2(some)) * LN2, float("-inf"))
    at = (batch.to(tl.int64) * q_len + row // GROUP) * heads * GROUP + head * GROUP + row % GROUP
    tl.store(out + at * VALUE_DIM + dim, result.to(out.dtype.element_ty), mask=dim < VALUE_DIM)
    tl.store(log_total + at + tl.arange(0, 1), logs)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _power(n: int, least: int = 16) -> int:
    return max(least, 1 << max(0, n - 1).bit_length())


def tile_sizes(group: int, q_len: int, key_dim: int, value_dim: int, itemsize: int) -> dict[str, int]:
    """Rows of a tile, entries of a block, and warps and stages of `attend_piece`, by the shapes."""
    if itemsize == 4:  # multiplied without tensor cores, in registers
        return {"ROWS": 16, "BLOCK": 16, "num_warps": 4, "num_stages": 2}
    wide = max(key_dim, value_dim) * itemsize > 256
    rows = min(ROWS // 2 if wide else ROWS, _power(group * q_len))
    return {"ROWS": rows, "BLOCK": 32 if wide else 64, "num_warps": 4, "num_stages": 2 if wide else 3}


def _launch(
    query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, table: torch.Tensor,
    lengths: torch.Tensor, hidden: torch.Tensor | None, scaling: float, sinks: torch.Tensor | None, softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, num_heads, q_len, key_dim = query.shape
    segments, page = lengths.shape[0], key_pages.shape[1]
    heads, value_dim = segments // batch, value_pages.shape[2]
    group = num_heads // heads
    sizes = tile_sizes(group, q_len, key_dim, value_dim, query.element_size())
    tiles = -(-group * q_len // sizes["ROWS"])
    programs = WAVES * _multiprocessors(query.device.index) if query.is_cuda else PROGRAMS
    programs = max(1, programs // tiles)
    value_block, lanes = _power(value_dim), _power(segments)
    out = query.new_empty(batch, q_len, num_heads, value_dim)
    log_total = query.new_empty(batch, q_len, num_heads, dtype=torch.float32)
    log_sum = query.new_empty(programs + segments, tiles, sizes["ROWS"], dtype=torch.float32)
    partial = query.new_empty(*log_sum.shape, value_block, dtype=torch.float32)
    shared = {"GROUP": group, "VALUE_DIM": value_dim, "VALUE_BLOCK": value_block, "PROGRAMS": programs}
    with launching_on(query):
        attend_piece[(programs + segments, tiles)](
            query, key_pages, value_pages, table, lengths, hidden, partial, log_sum, scaling * LOG2E, segments, heads,
            q_len, table.shape[1], *query.stride()[:3], KEY_DIM=key_dim, KEY_BLOCK=_power(key_dim), PAGE=page,
            SEGMENTS=lanes, PRECISION=dot_precision(query.dtype), SOFTCAP=softcap * LOG2E, **sizes, **shared,
            **LAUNCH_OPTIONS,
        )  # fmt: skip
        merge_pieces[(segments, group * q_len)](
            partial, log_sum, lengths, sinks, out, log_total, segments, heads, q_len, tiles, ROWS=sizes["ROWS"],
            BLOCK=sizes["BLOCK"], SEGMENTS=lanes, MERGED=MERGED, **shared, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return out, log_total


@torch.library.custom_op("tenure::ragged_decode", mutates_args=())
def _ragged_decode(
    query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, table: torch.Tensor,
    lengths: torch.Tensor, hidden: torch.Tensor | None, scaling: float, sinks: torch.Tensor | None, softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    run = _launch if chosen_kernels(query.device) == "triton" else naive.ragged_decode
    return run(query, key_pages, value_pages, table, lengths, hidden, scaling, sinks, softcap)


@_ragged_decode.register_fake
def _(query, key_pages, value_pages, table, lengths, hidden, scaling, sinks, softcap):
    batch, num_heads, q_len, _ = query.shape
    rows = batch, q_len, num_heads
    return query.new_empty(*rows, value_pages.shape[2]), query.new_empty(rows, dtype=torch.float32)


def ragged_decode(
    query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor,
    scaling: float, hidden: torch.Tensor | None = None, softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """Attention of the newest tokens, whose entries have been appended, over everything in their segments.

    Designed for up to 16 tokens per call; more are split into tiles that read the entries again. fp32 inputs are
    multiplied in fp32; the softmax is always in fp32.

    Args:
        query: `(batch, num_heads, q_len, head_dim)`, post-RoPE, fp16, bf16 or fp32.
        key_pages, value_pages: `(num_pages, page_size, dim)` of the same dtype; page sizes 16, 32, 64 or 128.
        table: int32 `(batch * num_kv_heads, width)`: pages of each segment, in order; read up to its length.
        lengths: int32 `(batch * num_kv_heads,)`: entries of each segment, 0 included.
        scaling: factor of the logits.
        hidden: int32 `(batch, q_len)`: number of the newest entries that a token must not see, those of later tokens;
            -1 for padding. None: no padding, `q_len - 1 - i` for token i.
        softmax: the model's own variant of it.

    Returns:
        `(batch, q_len, num_heads, value_dim)`; zeros for padding and where a segment has no entries to see.
    Raises:
        ValueError: unsupported shapes or dtypes.
    """
    return ragged_decode_part(query, key_pages, value_pages, table, lengths, scaling, hidden, softmax)[0]


def ragged_decode_part(
    query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor,
    scaling: float, hidden: torch.Tensor | None = None, softmax: Softmax = ORDINARY,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `ragged_decode`, for segments that are one part of a context; see `storage.partial_attention`.

    Returns:
        The result, and the natural logarithm of its softmax denominator, fp32 `(batch, q_len, num_heads)`, sinks
        included; without them -inf where a token sees no entries.
    """
    _check(query, key_pages, value_pages, table, lengths, hidden)
    sinks, num_heads = None if softmax.sinks is None else softmax.sinks.detach().contiguous(), query.shape[1]
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"ragged decode got sinks {tuple(sinks.shape)}; accepted: ({num_heads},), one a query head")
    softcap = softmax.softcap or 0.0
    return _ragged_decode(query, key_pages, value_pages, table, lengths, hidden, float(scaling), sinks, softcap)


def _check(
    query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, table: torch.Tensor,
    lengths: torch.Tensor, hidden: torch.Tensor | None,
) -> None:  # fmt: skip
    dtypes = {query.dtype, key_pages.dtype, value_pages.dtype}
    if len(dtypes) > 1 or query.dtype not in DTYPES:
        raise ValueError(
            f"ragged decode got queries, keys and values of {', '.join(sorted(map(str, dtypes)))}; accepted: one of "
            f"{', '.join(map(str, DTYPES))} for all"
        )
    dims, size = (query.shape[-1], key_pages.shape[-1], value_pages.shape[-1]), key_pages.shape[1]
    if dims[0] != dims[1] or max(dims) > MAX_DIM or size not in PAGE_SIZES or value_pages.shape[1] != size:
        raise ValueError(
            f"ragged decode got head dimensions {dims} (query, key, value) and pages of {size} entries; accepted: "
            f"equal dimensions of query and key, up to {MAX_DIM}, and pages of {', '.join(map(str, PAGE_SIZES))}"
        )
    batch, num_heads, q_len, _ = query.shape
    segments = lengths.shape[0]
    if not 0 < segments <= MAX_SEGMENTS or segments % batch or num_heads % (segments // batch) or q_len < 1:
        raise ValueError(
            f"ragged decode got queries {tuple(query.shape)} for {segments} segments; accepted: up to {MAX_SEGMENTS} "
            "segments, batch * num_kv_heads, and a multiple of num_kv_heads query heads"
        )
    integers = [one for one in (table, lengths, hidden) if one is not None]
    shapes = tuple(table.shape[:1]) == (segments,) and (hidden is None or hidden.shape == (batch, q_len))
    if not shapes or any(one.dtype != torch.int32 or not one.is_contiguous() for one in integers):
        raise ValueError(
            f"ragged decode got table {table.dtype} {tuple(table.shape)}, lengths {lengths.dtype} "
            f"{tuple(lengths.shape)} and hidden {None if hidden is None else (hidden.dtype, tuple(hidden.shape))}; "
            f"accepted: contiguous torch.int32, ({segments}, width), ({segments},) and ({batch}, {q_len})"
        )
    if not (key_pages.is_contiguous() and value_pages.is_contiguous()):
        raise ValueError("ragged decode got pages with gaps; accepted: contiguous tensors")
