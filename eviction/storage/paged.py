"""Which pages the segments of a layer have, and where that puts their entries.

The entries of one layer in pages: what `SegmentStore` does with contiguous ranges, on a GPU, in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ...retention.ops.kernel_choice import chosen_kernels
from .segments import SLACK, Places, SegmentStore

if TYPE_CHECKING:
    from ..forward_state import Step



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


class PagedStore(SegmentStore):
    """Like `SegmentStore`, with pages that move between the heads of a layer, and kernels that write them.

    Entry i of segment s stands at the flat index `table[s, i // PAGE] * PAGE + i % PAGE` of the buffers. Page tables,
    the lengths as kernels read them, and the stack of free pages are tensors of this store alone; after a `fork` only
    the buffers are shared, and whoever writes first copies them. The lists on the host say the same, and how many pages
    are free follows from them: nothing is asked of the device but, at an eviction, how much each head has kept.

    Attributes:
        table: int32 `(segments, width)`; device_lengths: int32 `(segments,)`.
        free: int32 `(num_pages,)`, the free pages below `counters[0]`.
        counters: int32 `(2,)`: free pages, and whether an append found too few, which never happens.
    """

    # Each segment's last page and one free page of it may be empty but for an entry.
    spare = 2 * PAGE

    def __init__(self, batch: int, num_kv_heads: int, buffers: dict[str, torch.Tensor]) -> None:
        """A store without entries whose buffers, `(0, ...)`, say what an entry is."""
        self.batch, self.num_kv_heads = batch, num_kv_heads
        self.shared = self.uniform = False
        self._reset(buffers, [0] * (batch * num_kv_heads), 0)

    @classmethod
    def from_dense(
        cls, key: torch.Tensor, value: torch.Tensor, state: dict[str, torch.Tensor], step: Step
    ) -> PagedStore:
        batch, heads = key.shape[:2]
        buffers = {name: tensor.new_empty(0, tensor.shape[3]) for name, tensor in (("key", key), ("value", value))}
        buffers["position"] = key.new_empty(0, dtype=torch.int32)
        store = cls(batch, heads, buffers | {name: tensor.new_empty(0) for name, tensor in state.items()})
        store.append(key, value, state, step)
        return store

    @classmethod
    def of_segments(
        cls, batch: int, num_kv_heads: int, buffers: dict[str, torch.Tensor], lengths: Sequence[int]
    ) -> PagedStore:
        """Entries that stand behind each other, segment by segment, copied into pages."""
        store = cls(batch, num_kv_heads, {name: buffer[:0] for name, buffer in buffers.items()})
        store.buffers = buffers
        store._lay_out(torch.arange(sum(lengths), device=store.table.device), list(lengths))
        return store

    # Pages.

    @property
    def num_pages(self) -> int:
        return self.free.shape[0]

    @property
    def free_pages(self) -> int:
        return self.num_pages - sum(map(pages_of, self.lengths))

    def paged(self, name: str) -> torch.Tensor:
        """A buffer as `(num_pages, PAGE, ...)`, a view."""
        return self.buffers[name].unflatten(0, (self.num_pages, PAGE))

    def _reset(self, buffers: dict[str, torch.Tensor], lengths: list[int], spare: int) -> None:
        """Takes over `buffers`, whose pages belong to the segments one after the other; the last `spare` are free."""
        fresh = fresh_layout(lengths, spare, buffers["key"].device)
        self.table, self.device_lengths, self.free, self.counters = fresh
        self._take(buffers)
        self._note(lengths)

    def _take(self, buffers: dict[str, torch.Tensor]) -> None:
        self.buffers = buffers
        self.key, self.value, self.position = buffers["key"], buffers["value"], buffers["position"]
        self.nbytes = self.capacity * self.entry_bytes

    def _note(self, lengths: list[int]) -> None:
        self.lengths, self._last = lengths, None
        self.rooms = [pages_of(length) * PAGE for length in lengths]

    def _lay_out(self, source: torch.Tensor, lengths: list[int]) -> None:
        """New pages for the entries at `source`, flat indices in the order of the segments; the old ones go."""
        from ..ops.copy_entries import copy_entries

        spare = spare_pages(lengths)
        count = sum(map(pages_of, lengths)) + spare
        old = self.buffers
        self._reset({name: b.new_zeros(count * PAGE, *b.shape[1:]) for name, b in old.items()}, lengths, spare)
        target = self.places().index(range(len(lengths)), lengths)
        copy_entries(list(old.values()), list(self.buffers.values()), source, target)
        self.shared = False

    def _own(self) -> None:
        """Makes the buffers this store's alone before they are written to."""
        if self.shared:
            self._take({name: buffer.clone() for name, buffer in self.buffers.items()})
            self.shared = False

    def _grow(self, lengths: list[int]) -> None:
        """Sees to it that there are pages and room in the table for segments of `lengths` entries."""
        self.table = widened(self.table, max([1, *map(pages_of, lengths)]))
        count, held = sum(map(pages_of, lengths)), self.num_pages
        if count <= held:
            return self._own()
        total = count + spare_pages(lengths)
        self.free = grown_stack(self.free, self.free_pages, total)
        self.counters = self.counters + self.counters.new_tensor([total - held, 0])
        grown = {}
        for name, buffer in self.buffers.items():
            grown[name] = buffer.new_zeros(total * PAGE, *buffer.shape[1:])
            grown[name][: len(buffer)] = buffer
        self._take(grown)
        self.shared = False

    # What changes the entries.

    def append(self, key: torch.Tensor, value: torch.Tensor, state: dict[str, torch.Tensor], step: Step) -> None:
        from ..ops.page_table import append_entries, write_state

        added = [count for count in step.counts for _ in range(self.num_kv_heads)]
        lengths = [length + more for length, more in zip(self.lengths, added, strict=True)]
        self._grow(lengths)
        ranks = step.ranks
        plan = append_entries(
            key.detach(), value.detach(), step.positions, ranks, step.added(self.num_kv_heads), self.paged("key"),
            self.paged("value"), self.paged("position"), self.table, self.device_lengths, self.free, self.counters,
        )  # fmt: skip
        for name, new in state.items():
            write_state(new.detach(), ranks, plan, self.table, self.paged(name))
        self._note(lengths)
        if step.valid is None and step.q_len == 1:
            self._last = plan

    def fill(self, name: str, values: torch.Tensor) -> None:
        from ..ops.page_table import write_state

        assert self._last is not None, "one token was appended last"
        new = values.view(self.batch, self.num_kv_heads, 1)
        write_state(new, values.new_zeros(self.batch, 1, dtype=torch.int32), self._last, self.table, self.paged(name))

    def set_lengths(self, lengths: list[int]) -> None:
        if lengths != self.lengths:
            self._release(torch.tensor(lengths, dtype=torch.int32, device=self.table.device))
        self._note(lengths)

    def _release(self, shorter: torch.Tensor) -> None:
        from ..ops.page_table import release_pages

        release_pages(self.device_lengths, shorter, self.table, self.free, self.counters, PAGE)

    def compact(self, keep: torch.Tensor) -> None:
        from ..ops.page_table import move_entries

        keep = keep.reshape(len(self.lengths), -1)
        if not keep.shape[1]:
            return
        self._own()
        for name in self.buffers:
            move_entries(keep, self.device_lengths, self.table, self.paged(name))
        kept = keep.sum(1, dtype=torch.int32)
        self._release(kept)
        self._note(kept.tolist())
        if self.free_pages > spare_pages(self.lengths):
            self._lay_out(self.places().index(range(len(self.lengths)), self.lengths), self.lengths)

    def select_rows(self, rows: Sequence[int]) -> None:
        heads = self.num_kv_heads
        order = [row * heads + head for row in rows for head in range(heads)]
        lengths = [self.lengths[segment] for segment in order]
        source = self.places().index(order, lengths)
        self.batch = len(rows)
        self._lay_out(source, lengths)

    def fork(self) -> PagedStore:
        other = PagedStore(self.batch, self.num_kv_heads, {name: b[:0] for name, b in self.buffers.items()})
        other._take(dict(self.buffers))
        other._note(self.lengths)
        for name in ("table", "device_lengths", "free", "counters"):
            setattr(other, name, getattr(self, name).clone())
        self.shared = other.shared = True
        return other

    # What reads them.

    def places(self) -> Places:
        return PagedPlaces(self.table.clone())

    def dense_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        within = torch.arange(max(self.lengths, default=0), device=self.table.device)
        valid = within < self.device_lengths.unsqueeze(1)
        page = self.table[:, within // PAGE].long()
        index = torch.where(valid, page * PAGE + within % PAGE, 0)
        shape = (self.batch, self.num_kv_heads, -1)
        return index.view(shape), valid.view(shape)

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of the keys and values of each segment, `(1, 1, lengths[s], dim)`."""
        places = self.places()
        for segment, length in enumerate(self.lengths):
            slots = places.index([segment], [length])
            yield self.key[slots][None, None], self.value[slots][None, None]

    def attend(self, query: torch.Tensor, scaling: float | None, step: Step) -> torch.Tensor:
        """Attention of the step's queries over the pages; see `ragged_attention`."""
        from ..ops.paged_attention import ragged_decode

        hidden = None if step.valid is None else step.hidden
        factor = float(query.shape[-1] ** -0.5) if scaling is None else scaling
        key, value = self.paged("key"), self.paged("value")
        return ragged_decode(query, key, value, self.table, self.device_lengths, factor, hidden)

    def faults(self) -> Iterator[str]:
        """What is wrong: every page is owned once or free, host and device agree, positions ascend."""
        count = self.batch * self.num_kv_heads
        if not len(self.lengths) == len(self.table) == len(self.device_lengths) == count:
            yield "one segment a row and head is needed"
        if self.device_lengths.tolist() != self.lengths:
            yield "the device counts other entries than the host"
        if self.counters.tolist() != [self.free_pages, 0]:
            yield "free pages are counted wrong"
        owned = [page for n, row in zip(self.lengths, self.table.tolist(), strict=True) for page in row[: pages_of(n)]]
        if sorted(owned + self.free[: self.free_pages].tolist()) != list(range(self.num_pages)):
            yield "owned and free pages are not all that there are"
        if any(len(buffer) != self.num_pages * PAGE for buffer in self.buffers.values()):
            yield "buffers do not have one slot for each entry of a page"
        yield from self._position_faults()


def store_class(device: torch.device, dtype: torch.dtype, *dims: int) -> type[SegmentStore]:
    """`PagedStore` where its kernels run (see `kernel_choice`) and take such keys and values, else `SegmentStore`.

    Args:
        dtype, dims: of keys and values.
    """
    if chosen_kernels(device) == "reference":
        return SegmentStore
    from ..ops.paged_attention import DTYPES, MAX_DIM

    return PagedStore if dtype in DTYPES and max(dims) <= MAX_DIM else SegmentStore
