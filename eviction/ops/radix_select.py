"""Radix selection of the k best entries of each row, by score, position and segment, without reading from the device.

Twin: `naive.select_top`. A key has three words, compared one after the other: the score's bits in an order-preserving
form, the position, and the rank of the segment. Each pass looks at eight bits of one word: it counts the values of
those bits among the entries that agree with the k-th best one so far, and picks the value that the k-th best one has. A
row is final as soon as all entries that still agree are selected, after four passes unless scores are equal; later
passes then return at once. Counts are integers, so the result does not depend on the order in which programs run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...retention.ops.kernel_choice import LAUNCH_OPTIONS, chosen_kernels, launching_on
from ...retention.ops.triton_language import jit, tl
from . import naive
from .naive import top_of_rows

DIGIT = 8  # bits per pass
BINS = 1 << DIGIT
BLOCK = 2048  # entries read by a program at a time
PARTS = 4  # programs per segment, at most

# A row's state: the three words of its threshold, whether it is final, and the number of entries still to select.
STATE, WANTED = 5, 4


@jit
def _word(scores, positions, at, mask, rank, WORD: tl.constexpr):
    """One word of the keys of a row's entries, uint32, and whether there is a candidate."""
    score = tl.load(scores + at, mask=mask, other=float("-inf"))
    candidate = mask & (score > float("-inf"))
    if WORD == 0:
        score = tl.where(score == 0.0, 0.0, score)  # -0 and 0 are equal
        bits = score.to(tl.int32, bitcast=True)
        word = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    elif WORD == 1:
        word = tl.load(positions + at, mask=mask, other=0).to(tl.uint32, bitcast=True)
    else:
        word = tl.zeros_like(score).to(tl.uint32) + rank.to(tl.uint32)
    return word, candidate


@jit
def _threshold(state, row, WORD: tl.constexpr):
    return tl.load(state + row * 5 + WORD).to(tl.uint32, bitcast=True)


@jit
def count_digits(
    scores, positions, bounds, state, histogram, shift, stride, WORD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (segments, parts, rows): counts one digit of the entries that agree with the threshold so far."""
    segment, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tl.load(state + row * 5 + 3) != 0:
        return
    start, stop = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    rank = tl.num_programs(0) - 1 - segment
    base = row.to(tl.int64) * stride
    first, second, third = _threshold(state, row, 0), _threshold(state, row, 1), _threshold(state, row, 2)
    bins = tl.arange(0, 256)
    counted = tl.zeros([256], dtype=tl.int32)
    for block in range(start + part * BLOCK, stop, tl.num_programs(1) * BLOCK):
        column = block + tl.arange(0, BLOCK)
        mask = column < stop
        word, agrees = _word(scores, positions, base + column, mask, rank, 0)
        wanted = first
        if WORD > 0:
            agrees = agrees & (word == first)
            word, _ = _word(scores, positions, base + column, mask, rank, 1)
            wanted = second
        if WORD > 1:
            agrees = agrees & (word == second)
            word, _ = _word(scores, positions, base + column, mask, rank, 2)
            wanted = third
        # Two shifts: one by all 32 bits at once would not be defined.
        agrees = agrees & ((((word ^ wanted) >> shift) >> 8) == 0)
        counted += tl.histogram(((word >> shift) & 255).to(tl.int32), 256, mask=agrees)
    tl.atomic_add(histogram + row * 256 + bins, counted, mask=counted > 0, sem="relaxed")


@jit
def pick_digit(state, histogram, shift, WORD: tl.constexpr):
    """Grid (rows,): fixes one digit of the threshold, and empties the histogram for the next pass."""
    row = tl.program_id(0)
    if tl.load(state + row * 5 + 3) != 0:
        return
    bins = tl.arange(0, 256)
    counted = tl.load(histogram + row * 256 + bins)
    tl.store(histogram + row * 256 + bins, tl.zeros_like(counted))
    wanted = tl.load(state + row * 5 + 4)
    at_least = tl.cumsum(counted, 0, reverse=True)  # entries whose digit is no less
    total = tl.sum(counted, 0)
    digit = tl.max(tl.where(at_least >= wanted, bins, 0), 0)
    own = tl.sum(tl.where(bins == digit, counted, 0), 0)
    better = tl.sum(tl.where(bins > digit, counted, 0), 0)
    few = wanted >= total  # only in the first pass can there be fewer candidates than requested
    none = wanted <= 0
    digit = tl.where(few, 0, digit)
    left = wanted - better
    word = tl.load(state + row * 5 + WORD) | (digit << shift)
    tl.store(state + row * 5 + WORD, tl.where(none, -1, word))  # no score has all bits set
    tl.store(state + row * 5 + 4, left)
    tl.store(state + row * 5 + 3, (few | none | (own == left)).to(tl.int32))


@jit
def mark(scores, positions, bounds, state, keep, counts, stride, BLOCK: tl.constexpr):
    """Grid (segments, rows): marks the entries that are no less than the threshold, and counts them."""
    segment, row = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    rank = tl.num_programs(0) - 1 - segment
    base = row.to(tl.int64) * stride
    first, second, third = _threshold(state, row, 0), _threshold(state, row, 1), _threshold(state, row, 2)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for block in range(start, stop, BLOCK):
        column = block + tl.arange(0, BLOCK)
        mask = column < stop
        score, candidate = _word(scores, positions, base + column, mask, rank, 0)
        place, _ = _word(scores, positions, base + column, mask, rank, 1)
        behind = (place > second) | ((place == second) & (rank.to(tl.uint32) >= third))
        kept = candidate & ((score > first) | ((score == first) & behind))
        tl.store(keep + base + column, kept.to(tl.int8), mask=mask)
        total += kept.to(tl.int32)
    tl.store(counts + row * tl.num_programs(0) + segment, tl.sum(total, 0))


def _launch(
    scores: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n = scores.shape
    segments = bounds.numel() - 1
    state = scores.new_zeros(rows, STATE, dtype=torch.int32)
    state[:, WANTED] = k
    histogram = scores.new_zeros(rows, BINS, dtype=torch.int32)
    keep = scores.new_zeros(rows, n, dtype=torch.bool)
    counts = scores.new_zeros(rows, segments, dtype=torch.int32)
    if rows == 0 or segments == 0:
        return keep, counts
    marks = keep.view(torch.int8)
    options = {"BLOCK": BLOCK, "num_warps": 8, **LAUNCH_OPTIONS}
    parts = max(1, min(PARTS, n // (segments * BLOCK)))
    with launching_on(scores):
        for word in range(3):
            for shift in range(32 - DIGIT if word < 2 else DIGIT, -1, -DIGIT):
                count_digits[(segments, parts, rows)](
                    scores, positions, bounds, state, histogram, shift, n, WORD=word, **options
                )
                pick_digit[(rows,)](state, histogram, shift, WORD=word, num_warps=4, **LAUNCH_OPTIONS)
        mark[(segments, rows)](scores, positions, bounds, state, marks, counts, n, **options)
    return keep, counts


@torch.library.custom_op("tenure::select_top", mutates_args=())
def _select_top(
    scores: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    run = _launch if chosen_kernels(scores.device) == "triton" else naive.select_top
    return run(scores, positions, k, bounds)


@_select_top.register_fake
def _(
    scores: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    counts = scores.new_empty(scores.shape[0], bounds.shape[0] - 1, dtype=torch.int32)
    return torch.empty_like(scores, dtype=torch.bool), counts


def select_top(
    scores: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Marks the `k[i]` highest scores of each row; ties favour the newer entry, then the lower segment.

    No host sync with the Triton kernels; linear in the number of scores.

    Args:
        scores: fp32 `(rows, n)`, the competing segments one after the other; -inf where there is no candidate, +inf
            for protected entries, which rank first; no NaN.
        positions: int32 `(rows, n)`, not negative where there is a candidate and different within a segment.
        k: int32 `(rows,)`: number of entries to keep; a row with fewer candidates keeps them all.
        bounds: int32 `(segments + 1,)`, from 0 to n: segment s has the columns `[bounds[s], bounds[s + 1])`.

    Returns:
        bool `(rows, n)`, and int32 `(rows, segments)`: number of entries kept per segment.
    Raises:
        ValueError: other dtypes, or inconsistent shapes.
    """
    if scores.dtype != torch.float32 or {positions.dtype, k.dtype, bounds.dtype} != {torch.int32}:
        raise ValueError(
            f"got scores {scores.dtype}, positions {positions.dtype}, k {k.dtype} and bounds {bounds.dtype}; accepted: "
            "torch.float32 scores, torch.int32 for the others"
        )
    if scores.ndim != 2 or positions.shape != scores.shape or k.shape != scores.shape[:1] or bounds.ndim != 1:
        raise ValueError(
            f"got scores {tuple(scores.shape)}, positions {tuple(positions.shape)}, k {tuple(k.shape)} and bounds "
            f"{tuple(bounds.shape)}; accepted: (rows, n), (rows, n), (rows,) and (segments + 1,)"
        )
    if scores.shape[1] >= 2**31 or not 1 <= bounds.numel() <= 2**16:
        raise ValueError(
            f"got {scores.shape[1]} scores a row in {bounds.numel() - 1} segments; accepted: fewer than 2^31 in fewer "
            "than 2^16"
        )
    return _select_top(scores.contiguous(), positions.contiguous(), k, bounds.contiguous())


def top_of_each_head(scores: torch.Tensor, positions: torch.Tensor, k: list[int]) -> torch.Tensor:
    """Marks the highest scores of each head separately; ties favour newer entries.

    Args:
        scores: fp32 `(batch, heads, n)`; -inf where there is no candidate; no NaN.
        positions: int64 `(batch, heads, n)`, -1 for none.
        k: number of entries to keep, row by row and head by head.

    Returns:
        bool `(batch, heads, n)`.
    """
    flat = scores.flatten(0, 1)
    if chosen_kernels(scores.device) == "triton":
        return select_with_kernels(flat, positions.flatten(0, 1), k, [scores.shape[2]]).view(scores.shape)
    return top_of_rows(flat, k, lambda: positions.flatten(0, 1)).view(scores.shape)


def select_with_kernels(
    scores: torch.Tensor, positions: torch.Tensor, k: list[int], widths: Sequence[int]
) -> torch.Tensor:
    """`top_of_rows` by `select_top` with its order of ties; `widths`: those of the segments that make up each row."""
    sizes = torch.tensor([0, *widths], device=scores.device)
    wanted = torch.tensor(k, dtype=torch.int32, device=scores.device)
    return select_top(scores, positions.int(), wanted, sizes.cumsum(0, dtype=torch.int32))[0]
