"""Paged storage of one layer on a GPU: pages move between the segments of a layer in place (`PagedStore`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch

from ...retention.ops.kernel_choice import chosen_kernels
from ...retention.ops.softmax import ORDINARY, Softmax
from ..forward_state import ForwardStep
from ..ops.copy_entries import copy_entries
from ..ops.page_table import append_entries, move_entries, release_pages, write_state
from ..ops.paged_attention import DTYPES, MAX_DIM, ragged_decode
from .segment_store import EntryLocations, SegmentStore, StorageConfig

T = TypeVar("T")
PAGE = StorageConfig.page_size


def fresh_layout(
    lengths: Sequence[int], spare: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Table, lengths, stack of free pages and counters (see `PagedStore`) with pages in the order of the segments.

    Args:
        spare: number of free pages; they come last.
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
    if width <= have:
        return table
    return torch.nn.functional.pad(table, (0, int(width * StorageConfig.table_growth) - have))


def grown_stack(free: torch.Tensor, left: int, total: int) -> torch.Tensor:
    """The stack of `left` free pages after growing to `total` pages; the old free pages are taken first."""
    before = free.shape[0]
    new = torch.arange(total - 1, before - 1, -1, dtype=torch.int32, device=free.device)
    return torch.cat([new, free[:left], free.new_zeros(before - left)])


@dataclass(frozen=True)
class PagedLocations:
    """The page table at one time; see `segments.EntryLocations`."""

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
    """Free pages to allocate: one per segment, or `StorageConfig.slack` of the owned ones if that is more."""
    return max(len(lengths), int(StorageConfig.slack * sum(map(pages_of, lengths))))


class PagedStore(SegmentStore):
    """A `SegmentStore` whose segments are lists of pages, written by kernels.

    Entry i of segment s is at the flat index `table[s, i // PAGE] * PAGE + i % PAGE` of the buffers. Page tables, the
    lengths as kernels read them, and the stack of free pages belong to this store alone; after a `fork` only the
    buffers are shared, and whichever side writes first copies them. The host keeps the same lengths in lists, and the
    number of free pages follows from them: the device is read only at an eviction, for the entries each head has kept.

    Attributes:
        table: int32 `(segments, width)`; device_lengths: int32 `(segments,)`.
        free: int32 `(num_pages,)`, the free pages below `counters[0]`.
        counters: int32 `(2,)`: free pages, and whether an append found too few, which would be a bug.
    """

    # Of each segment, the last page may have a single entry, and one page may be free.
    spare = 2 * PAGE

    def __init__(self, batch: int, num_kv_heads: int, buffers: dict[str, torch.Tensor]) -> None:
        """A store without entries; `buffers`, `(0, ...)`, give the dtypes and shapes of an entry."""
        self.batch, self.num_kv_heads = batch, num_kv_heads
        self.shared = self.uniform = False
        self._reset(buffers, [0] * (batch * num_kv_heads), 0)

    @classmethod
    def from_dense(
        cls, key: torch.Tensor, value: torch.Tensor, state: dict[str, torch.Tensor], step: ForwardStep
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
        """Copies entries that are stored contiguously, segment by segment, into pages."""
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
        """Adopts `buffers`, whose pages belong to the segments in order; the last `spare` are free."""
        fresh = fresh_layout(lengths, spare, buffers["key"].device)
        self.table, self.device_lengths, self.free, self.counters = fresh
        self._set_pages(buffers)
        self._set_counts(lengths)

    def _set_pages(self, buffers: dict[str, torch.Tensor]) -> None:
        self.buffers = buffers
        self.key, self.value, self.position = buffers["key"], buffers["value"], buffers["position"]
        self.nbytes = self.capacity * self.entry_bytes

    def _set_counts(self, lengths: list[int]) -> None:
        self.lengths, self._last = lengths, None
        self.reserved = [pages_of(length) * PAGE for length in lengths]

    def _lay_out(self, source: torch.Tensor, lengths: list[int]) -> None:
        """Copies the entries at `source`, flat indices segment by segment, into new pages; frees the old ones."""
        spare = spare_pages(lengths)
        count = sum(map(pages_of, lengths)) + spare
        old = self.buffers
        self._reset({name: b.new_zeros(count * PAGE, *b.shape[1:]) for name, b in old.items()}, lengths, spare)
        target = self.locations().index(range(len(lengths)), lengths)
        copy_entries(list(old.values()), list(self.buffers.values()), source, target)
        self.shared = False

    def _unshare(self) -> None:
        """Copies shared buffers before they are written to."""
        if self.shared:
            self._set_pages({name: buffer.clone() for name, buffer in self.buffers.items()})
            self.shared = False

    def _grow(self, lengths: list[int]) -> None:
        """Allocates pages and columns of the table for segments of `lengths` entries."""
        self.table = widened(self.table, max([1, *map(pages_of, lengths)]))
        count, before = sum(map(pages_of, lengths)), self.num_pages
        if count <= before:
            return self._unshare()
        total = count + spare_pages(lengths)
        self.free = grown_stack(self.free, self.free_pages, total)
        self.counters = self.counters + self.counters.new_tensor([total - before, 0])
        grown = {}
        for name, buffer in self.buffers.items():
            grown[name] = buffer.new_zeros(total * PAGE, *buffer.shape[1:])
            grown[name][: len(buffer)] = buffer
        self._set_pages(grown)
        self.shared = False

    # Operations that change entries.

    def append(self, key: torch.Tensor, value: torch.Tensor, state: dict[str, torch.Tensor], step: ForwardStep) -> None:
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
        self._set_counts(lengths)
        if step.valid is None and step.q_len == 1:
            self._last = plan

    def fill(self, name: str, values: torch.Tensor) -> None:
        assert self._last is not None, "one token was appended last"
        new = values.view(self.batch, self.num_kv_heads, 1)
        write_state(new, values.new_zeros(self.batch, 1, dtype=torch.int32), self._last, self.table, self.paged(name))

    def set_lengths(self, lengths: list[int]) -> None:
        if lengths != self.lengths:
            self._release(torch.tensor(lengths, dtype=torch.int32, device=self.table.device))
        self._set_counts(lengths)

    def _release(self, shorter: torch.Tensor) -> None:
        release_pages(self.device_lengths, shorter, self.table, self.free, self.counters, PAGE)

    def compact(self, keep: torch.Tensor) -> None:
        keep = keep.reshape(len(self.lengths), -1)
        if not keep.shape[1]:
            return
        self._unshare()
        for name in self.buffers:
            move_entries(keep, self.device_lengths, self.table, self.paged(name))
        kept = keep.sum(1, dtype=torch.int32)
        self._release(kept)
        self._set_counts(kept.tolist())
        if self.free_pages > spare_pages(self.lengths):
            self._lay_out(self.locations().index(range(len(self.lengths)), self.lengths), self.lengths)

    def select_rows(self, rows: Sequence[int]) -> None:
        heads = self.num_kv_heads
        order = [row * heads + head for row in rows for head in range(heads)]
        lengths = [self.lengths[segment] for segment in order]
        source = self.locations().index(order, lengths)
        self.batch = len(rows)
        self._lay_out(source, lengths)

    def fork(self) -> PagedStore:
        other = PagedStore(self.batch, self.num_kv_heads, {name: b[:0] for name, b in self.buffers.items()})
        other._set_pages(dict(self.buffers))
        other._set_counts(self.lengths)
        for name in ("table", "device_lengths", "free", "counters"):
            setattr(other, name, getattr(self, name).clone())
        self.shared = other.shared = True
        return other

    # Operations that read entries.

    def locations(self) -> EntryLocations:
        return PagedLocations(self.table.clone())

    def dense_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        within = torch.arange(max(self.lengths, default=0), device=self.table.device)
        valid = within < self.device_lengths.unsqueeze(1)
        page = self.table[:, within // PAGE].long()
        index = torch.where(valid, page * PAGE + within % PAGE, 0)
        shape = (self.batch, self.num_kv_heads, -1)
        return index.view(shape), valid.view(shape)

    def memoised(self, name: Hashable, compute: Callable[[], T]) -> T:
        return compute()  # whether forks have the same entries is known to the page tables on the device only

    def clear_memo(self) -> None:
        pass

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of the keys and values of each segment, `(1, 1, lengths[s], dim)`."""
        locations = self.locations()
        for segment, length in enumerate(self.lengths):
            slots = locations.index([segment], [length])
            yield self.key[slots][None, None], self.value[slots][None, None]

    def attend(
        self, query: torch.Tensor, scaling: float | None, step: ForwardStep, softmax: Softmax = ORDINARY
    ) -> torch.Tensor:
        """Attention of the step's queries over the pages; see `ragged_attention`."""
        newer = None if step.valid is None else step.newer_tokens
        factor = float(query.shape[-1] ** -0.5) if scaling is None else scaling
        key, value = self.paged("key"), self.paged("value")
        return ragged_decode(query, key, value, self.table, self.device_lengths, factor, newer, softmax)

    def faults(self) -> Iterator[str]:
        """Violated invariants: every page is owned once or free, host and device agree, positions ascend."""
        count = self.batch * self.num_kv_heads
        if not len(self.lengths) == len(self.table) == len(self.device_lengths) == count:
            yield "the number of segments is not batch * num_kv_heads"
        if self.device_lengths.tolist() != self.lengths:
            yield "lengths on device and host differ"
        if self.counters.tolist() != [self.free_pages, 0]:
            yield "free pages are counted wrong"
        owned = [page for n, row in zip(self.lengths, self.table.tolist(), strict=True) for page in row[: pages_of(n)]]
        if sorted(owned + self.free[: self.free_pages].tolist()) != list(range(self.num_pages)):
            yield "a page is owned twice, or neither owned nor free"
        if any(len(buffer) != self.num_pages * PAGE for buffer in self.buffers.values()):
            yield "a buffer does not have page_size slots for each page"
        yield from self._position_faults()


def store_class(device: torch.device, dtype: torch.dtype, *dims: int) -> type[SegmentStore]:
    """`PagedStore` where its kernels run (see `kernel_choice`) and support keys and values of that kind.

    Else `SegmentStore`.

    Args:
        dtype, dims: of keys and values.
    """
    if chosen_kernels(device) == "reference":
        return SegmentStore
    return PagedStore if dtype in DTYPES and max(dims) <= MAX_DIM else SegmentStore


def store_of(batch: int, num_kv_heads: int, buffers: dict[str, torch.Tensor], lengths: list[int]) -> SegmentStore:
    """A store of entries given contiguously, segment by segment; it may adopt the buffers.

    Args:
        buffers: `key`, `value`, `position` and states, each `(sum(lengths), ...)`.
        lengths: entries of each segment, `batch * num_kv_heads` numbers.
    """
    key, value = buffers["key"], buffers["value"]
    if store_class(key.device, key.dtype, key.shape[1], value.shape[1]) is PagedStore:
        return PagedStore.of_segments(batch, num_kv_heads, buffers, lengths)
    return SegmentStore(batch, num_kv_heads, buffers, lengths, lengths)
