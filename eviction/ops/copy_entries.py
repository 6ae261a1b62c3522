"""Copies entries of a layer between slots, all its buffers in one launch.

A prompt that moves between the pages and a tier consists of keys, values, positions and states of hundreds of pages:
copied one by one, the launches would take longer than the link to the host. Here a program copies some entries of every
buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...retention.ops.kernel_choice import LAUNCH_OPTIONS, chosen_kernels, launching_on
from ...retention.ops.triton_language import jit, tl
from . import naive

WORDS_OF_TILE = 2048  # words copied by a program at a time
MAX_COLUMNS = 128  # words of an entry per tile
WORDS = {4: torch.int32, 2: torch.int16}


@jit
def move_words(
    sources, targets, source_slots, target_slots, count, WIDTHS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Grid (blocks of entries,): entry `source_slots[n]` of each source becomes entry `target_slots[n]` of its target.

    `WIDTHS`: words of an entry in each of them. Slots that are None are 0, 1, 2, …
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = row < count
    apart = row.to(tl.int64)
    into = apart
    if source_slots is not None:
        apart = tl.load(source_slots + row, mask=present, other=0).to(tl.int64)
    if target_slots is not None:
        into = tl.load(target_slots + row, mask=present, other=0).to(tl.int64)
    for i in tl.static_range(len(WIDTHS)):
        for first in range(0, WIDTHS[i], COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = present[:, None] & (column < WIDTHS[i])[None, :]
            words = tl.load(sources[i] + apart[:, None] * WIDTHS[i] + column[None, :], mask=inside, other=0)
            tl.store(targets[i] + into[:, None] * WIDTHS[i] + column[None, :], words, mask=inside)


def tile_sizes(widths: Sequence[int]) -> dict[str, int]:
    """Entries and words per tile for entries of these widths, in words."""
    columns = min(MAX_COLUMNS, 1 << (max(widths) - 1).bit_length())
    return {"ROWS": WORDS_OF_TILE // columns, "COLUMNS": columns}


def _launch(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], source_slots: torch.Tensor | None,
    target_slots: torch.Tensor | None, count: int,
) -> None:  # fmt: skip
    sizes = [one.element_size() * one[0].numel() for one in targets]
    word = 4 if all(size % 4 == 0 for size in sizes) else 2
    widths = tuple(size // word for size in sizes)
    tile = tile_sizes(widths)
    words = [tuple(one.view(-1).view(WORDS[word]) for one in tensors) for tensors in (sources, targets)]
    slots = [None if one is None else one.contiguous() for one in (source_slots, target_slots)]
    with launching_on(targets[0]):
        move_words[(-(-count // tile["ROWS"]),)](
            *words, *slots, count, WIDTHS=widths, num_warps=4, **tile, **LAUNCH_OPTIONS
        )


@torch.library.custom_op("tenure::copy_entries", mutates_args=("targets",))
def _copy_entries(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], source_slots: torch.Tensor | None,
    target_slots: torch.Tensor | None, count: int,
) -> None:  # fmt: skip
    if count == 0:
        return
    run = _launch if chosen_kernels(targets[0].device) == "triton" else naive.copy_entries
    run(sources, targets, source_slots, target_slots, count)


@_copy_entries.register_fake
def _(sources, targets, source_slots, target_slots, count):
    return None


def copy_entries(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], source_slots: torch.Tensor | None,
    target_slots: torch.Tensor | None,
) -> None:  # fmt: skip
    """Copies the entries at `source_slots` of every source to `target_slots` of the corresponding target.

    No host sync; runs on the current stream. Sources must not share memory with targets.

    Args:
        sources, targets: each `(slots, ...)`, contiguous, on one device; pairwise of one dtype, of 2 bytes or more, and
            of one shape after the slots.
        source_slots, target_slots: integers `(count,)`, the latter all different; None for the slots `[0, count)`. Not
            both None.

    Raises:
        ValueError: other shapes or dtypes.
    """
    slots = [one for one in (source_slots, target_slots) if one is not None]
    if not slots or any(one.ndim != 1 or len(one) != len(slots[0]) for one in slots):
        raise ValueError(f"got slots {[tuple(one.shape) for one in slots]}; accepted: one or two (count,), not none")
    for source, target in zip(sources, targets, strict=True):
        alike = source.dtype == target.dtype and source.shape[1:] == target.shape[1:]
        if not alike or source.element_size() % 2 or not (source.is_contiguous() and target.is_contiguous()):
            raise ValueError(
                f"got entries {source.dtype} {tuple(source.shape)} for {target.dtype} {tuple(target.shape)}; accepted: "
                "contiguous ones of one dtype, of 2 bytes or more, and of one shape"
            )
    _copy_entries(list(sources), list(targets), source_slots, target_slots, len(slots[0]))
