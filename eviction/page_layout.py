"""Which pages the segments of a layer have, and where that puts their entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from .store import SLACK

PAGE = 16  # entries of a page
WIDTH_SLACK = 1.25  # how much wider a page table is made than it must be


def fresh_layout(
    lengths: Sequence[int], spare: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Table, lengths, stack of free pages and counters, see `PagedStore`: each segment's pages behind the last one's.

    Args:
        spare: how many pages are free; they come last.
    """
    owned = [pages_of(length) for length in lengths]
    count, width = sum(owned) + spare, max([1, *owned])
    first = torch.tensor([[0, *accumulate(owned)][:-1], owned, list(lengths)], dtype=torch.int32, device=device)
    column = torch.arange(width, dtype=torch.int32, device=device)
    table = torch.where(column < first[1].unsqueeze(1), first[0].unsqueeze(1) + column, 0)
    order = torch.arange(count - 1, -1, -1, dtype=torch.int32, device=device)
    free = torch.cat([order[:spare], order.new_zeros(count - spare)])
    return table, first[2].clone(), free, torch.tensor([spare, 0], dtype=torch.int32, device=device)


def widened(table: torch.Tensor, width: int) -> torch.Tensor:
    """A table for segments of up to `width` pages; the same one if it is wide enough."""
    have = table.shape[1]
    return table if width <= have else torch.nn.functional.pad(table, (0, int(width * WIDTH_SLACK) - have))


def grown_stack(free: torch.Tensor, left: int, total: int) -> torch.Tensor:
    """The stack of free pages, `left` until now, when there are `total` pages: the old free ones are taken first."""
    held = free.shape[0]
    new = torch.arange(total - 1, held - 1, -1, dtype=torch.int32, device=free.device)
    return torch.cat([new, free[:left], free.new_zeros(held - left)])


@dataclass(frozen=True)
class PagedPlaces:
    """Which pages segments had; see `store.Places`."""

    table: torch.Tensor

    def index(self, segments: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        device = self.table.device
        count, segment = torch.tensor([list(lengths), list(segments)], device=device).view(2, -1).unbind(0)
        total = sum(lengths)
        owner = segment.repeat_interleave(count, output_size=total)
        first = (count.cumsum(0) - count).repeat_interleave(count, output_size=total)
        within = torch.arange(total, device=device) - first
        return self.table[owner, within // PAGE].long() * PAGE + within % PAGE


def pages_of(length: int) -> int:
    return -(-length // PAGE)


def spare_pages(lengths: Sequence[int]) -> int:
    """Free pages that a layout has: one a segment, or `SLACK` of the owned ones, so that appends rarely lay it out."""
    return max(len(lengths), int(SLACK * sum(map(pages_of, lengths))))
