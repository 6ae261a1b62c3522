"""Where the entries of new segments are copied from, as flat indices into the old buffers; see `SegmentStore`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch


def sources_of_ranges(
    starts: Sequence[int], lengths: Sequence[int], rooms: Sequence[int], device: torch.device
) -> torch.Tensor:
    """New segment `s`, with `rooms[s]` slots, gets the entries of the flat range `starts[s] + [0, lengths[s])`.

    Returns:
        int64 `(sum(rooms),)`. Free slots get a copy of some entry: cheaper than leaving them out, and never read.
    """
    shape = torch.tensor([list(starts), list(lengths), list(rooms)], device=device)
    old_start, length, room = shape.unbind(0)
    new_start = room.cumsum(0) - room
    within = torch.arange(sum(rooms), device=device) - new_start.repeat_interleave(room)
    last = (length - 1).clamp(min=0).repeat_interleave(room)
    return old_start.repeat_interleave(room) + torch.minimum(within, last)


def sources_of_kept(
    keep: torch.Tensor, counts: torch.Tensor, starts: Sequence[int], rooms: Sequence[int]
) -> torch.Tensor:
    """New segment `s`, with `rooms[s]` slots, gets the entries of the old segment `s` that are kept.

    Args:
        keep: bool `(segments, n)`: index i is the i-th entry of the segment that begins at `starts[s]`.
        counts: int64 `(segments,)`, `keep.sum(1)`; none exceeds its room.

    Returns:
        int64 `(sum(rooms),)`; free slots get entry 0 of the buffers.
    """
    device = keep.device
    segment, index = keep.nonzero(as_tuple=True)  # segment by segment, positions ascending
    old_start = torch.tensor(list(starts), device=device)
    new_start = torch.tensor([0, *accumulate(rooms)][:-1], device=device)
    rank = torch.arange(len(segment), device=device) - (counts.cumsum(0) - counts)[segment]
    source = torch.zeros(sum(rooms), dtype=torch.long, device=device)
    source[new_start[segment] + rank] = old_start[segment] + index
    return source
