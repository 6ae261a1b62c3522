"""Contiguous storage of one layer: every (row, head) is a segment with its own number of entries (`SegmentStore`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from ..forward_state import ForwardStep
from ..ops.write_entries import EntryWriter

T = TypeVar("T")


@dataclass(frozen=True)
class StorageConfig:
    """Free memory that stores allocate so that appending is amortised; tested bounds depend on it.

    Attributes:
        slack: free slots added when segments are re-allocated, as a share of the layer's mean segment; for pages, free
            pages as a share of the allocated ones.
        page_size: entries per page of a `PagedStore`, one of `ops.page_table.PAGE_SIZES`.
        table_growth: factor by which a page table becomes wider than needed when it grows.
    """

    slack: float = 0.06
    page_size: int = 16
    table_growth: float = 1.25


class EntryLocations(Protocol):
    """Locations of a store's entries at one time, valid in the buffers of that time."""

    def index(self, segments: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Flat indices of the first `lengths[i]` entries of each of `segments`, int64, one segment after the other."""
        ...


@dataclass(frozen=True)
class SegmentLocations:
    """The start of every segment."""

    starts: list[int]
    device: torch.device

    def index(self, segments: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        parts = [
            torch.arange(self.starts[s], self.starts[s] + n, device="cpu")
            for s, n in zip(segments, lengths, strict=True)
        ]
        return torch.cat(parts).to(self.device)


def sources_of_ranges(
    starts: Sequence[int], lengths: Sequence[int], reserved: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Source indices of new segments: `s`, with `reserved[s]` slots, gets the flat range `starts[s] + [0, lengths[s])`.

    Returns:
        int64 `(sum(reserved),)`. Free slots get a copy of some entry: cheaper than leaving them out, and never read.
    """
    shape = torch.tensor([list(starts), list(lengths), list(reserved)], device=device)
    old_start, length, slots = shape.unbind(0)
    new_start = slots.cumsum(0) - slots
    within = torch.arange(sum(reserved), device=device) - new_start.repeat_interleave(slots)
    last = (length - 1).clamp(min=0).repeat_interleave(slots)
    return old_start.repeat_interleave(slots) + torch.minimum(within, last)


def sources_of_kept(
    keep: torch.Tensor, counts: torch.Tensor, starts: Sequence[int], reserved: Sequence[int]
) -> torch.Tensor:
    """Source indices of new segments: `s`, with `reserved[s]` slots, gets the kept entries of the old segment `s`.

    Args:
        keep: bool `(segments, n)`: index i is the i-th entry of the segment that begins at `starts[s]`.
        counts: int64 `(segments,)`, `keep.sum(1)`; none exceeds the reserved slots.

    Returns:
        int64 `(sum(reserved),)`; free slots get entry 0 of the buffers.
    """
    device = keep.device
    segment, index = keep.nonzero(as_tuple=True)  # segment by segment, positions ascending
    old_start = torch.tensor(list(starts), device=device)
    new_start = torch.tensor([0, *accumulate(reserved)][:-1], device=device)
    rank = torch.arange(len(segment), device=device) - (counts.cumsum(0) - counts)[segment]
    source = torch.zeros(sum(reserved), dtype=torch.long, device=device)
    source[new_start[segment] + rank] = old_start[segment] + index
    return source


class SegmentStore:
    """Keys, values, positions and per-entry state of one layer, stored without holes between entries of a head.

    Segment `s = row * num_kv_heads + head` owns the flat range `[starts[s], starts[s] + reserved[s])`. Its entries, in
    the order of their positions, are the first `lengths[s]` slots of that range; the other slots are free. The ranges
    partition `[0, capacity)`, so `free + entries == capacity`.

    Attributes:
        batch, num_kv_heads: rows and heads.
        key, value: `(capacity, head_dim)` and `(capacity, value_dim)`, the model's dtype.
        position: `(capacity,)` int32: index of the entry's token among the real tokens of its row.
        buffers: these three and the per-entry state by name, fp32 `(capacity,)`, e.g. `log_beta`.
        starts, lengths, reserved: one int per segment; the lists are replaced, never written to.
        nbytes: allocated bytes, free slots included.
        kernels: those found for the present buffers, by what they were asked for; kept here as looking one up takes as
            long as a small layer's attention.
        uniform: all lengths are equal, and all reserved sizes.
        shared: another `SegmentStore` may hold the same buffers (after `fork`): they must not be written to.
    """

    config: ClassVar[StorageConfig] = StorageConfig()
    spare = 1  # entries per segment that may be allocated in addition to `config.slack`

    def __init__(
        self, batch: int, num_kv_heads: int, buffers: dict[str, torch.Tensor], lengths: list[int], reserved: list[int]
    ) -> None:
        self.batch, self.num_kv_heads = batch, num_kv_heads
        self.shared = False
        self._set_buffers(buffers, lengths, reserved)

    @classmethod
    def from_dense(
        cls, key: torch.Tensor, value: torch.Tensor, state: dict[str, torch.Tensor], step: ForwardStep
    ) -> SegmentStore:
        """Stores a first forward's entries; padding is left out.

        Args:
            key, value: `(batch, num_kv_heads, q_len, dim)`. A contiguous tensor that fills its storage is adopted
                without a copy: the caller must not write to it afterwards.
            state: named fp32 `(batch, num_kv_heads, q_len)` tensors; these names are stored from now on.
            step: the running forward.
        """
        batch, heads, n = key.shape[:3]
        position = step.positions.unsqueeze(1).expand(batch, heads, n)
        dense = {"key": key, "value": value, "position": position, **state}
        flat = {name: _flattened(tensor.detach()) for name, tensor in dense.items()}
        store = cls(batch, heads, flat, [n] * (batch * heads), [n] * (batch * heads))
        if step.valid is not None:
            store.compact(step.valid.unsqueeze(1).expand(batch, heads, n))
        return store

    def _set_buffers(self, buffers: dict[str, torch.Tensor], lengths: list[int], reserved: list[int]) -> None:
        """Makes `buffers` the storage; the former ones are released unless a fork still holds them."""
        self.buffers = buffers
        self.key, self.value, self.position = buffers["key"], buffers["value"], buffers["position"]
        self.reserved, self.starts = reserved, [0, *accumulate(reserved)][: len(reserved)]
        self._first: torch.Tensor | None = None  # `starts` as a tensor, once it was needed
        self._memo: dict[Hashable, Any] = {}
        self.kernels: dict[Hashable, Any] = {}
        self.nbytes = self.capacity * self.entry_bytes
        self.set_lengths(lengths)

    def set_lengths(self, lengths: list[int]) -> None:
        """Shortens segments to their first `lengths[s]` entries; the other slots become free."""
        self.lengths = lengths
        self.uniform = len(set(lengths)) <= 1 and len(set(self.reserved)) <= 1
        self._free = min((slots - n for slots, n in zip(self.reserved, lengths, strict=True)), default=0)
        self._next = self._last = None
        self._writer: EntryWriter | None = None

    def _entry_writer(self) -> EntryWriter | None:
        """The writer of single tokens, which moves the next slots on; None where torch writes."""
        if self._writer is None:
            self._writer = EntryWriter.find(self._next_slots(), self.key, self.value, self.position)
        return self._writer

    def _next_slots(self) -> torch.Tensor:
        """Flat index of the first free slot of each segment, int64 `(batch * num_kv_heads,)`."""
        if self._next is None:
            ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
            self._next = torch.tensor(ends, device=self.key.device)
        return self._next

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat index of each segment's first entry, and the one after its last, int64 `(batch * num_kv_heads,)`."""
        if self._first is None:
            self._first = torch.tensor(self.starts, device=self.key.device)
        return self._first, self._next_slots()

    @property
    def capacity(self) -> int:
        return self.key.shape[0]

    @property
    def entries(self) -> int:
        return sum(self.lengths)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry: key, value, position and state."""
        return sum(buffer.element_size() * math.prod(buffer.shape[1:]) for buffer in self.buffers.values())

    def row_entries(self, row: int) -> int:
        return sum(self.lengths[row * self.num_kv_heads : (row + 1) * self.num_kv_heads])

    def append(self, key: torch.Tensor, value: torch.Tensor, state: dict[str, torch.Tensor], step: ForwardStep) -> None:
        """Appends a forward's new entries to every segment; padding is left out.

        Args:
            key, value, state, step: as in `from_dense`. A name missing from `state` must be given to `fill` before
                anything else happens to the store.
        """
        batch, heads, n = key.shape[:3]
        if step.valid is None:
            lengths = [length + n for length in self.lengths]
        else:
            added = [count for count in step.counts for _ in range(heads)]
            lengths = [length + more for length, more in zip(self.lengths, added, strict=True)]
        if self.shared or n > self._free or is_frozen(self.key):
            # The free slots are used up, or a fork may use them as well, or none may be written to.
            self._reallocate(lengths)
        if n == 1 and step.valid is None and (writer := self._entry_writer()) is not None:
            writer.write(key, value, step.flat_positions(heads))
            self.lengths, self._free, self._last = lengths, self._free - 1, writer.last_slots
            for name, numbers in state.items():
                self.fill(name, numbers.detach().flatten())
            return
        slots = self._next_slots()
        new = {"key": key, "value": value, **state}
        if step.valid is not None:
            chosen = step.valid.unsqueeze(1).expand(batch, heads, n)
            rank = step.valid.cumsum(1) - 1
            slots = (slots.view(batch, heads, 1) + rank.unsqueeze(1))[chosen]
        elif n > 1:
            chosen, slots = None, (slots.unsqueeze(1) + torch.arange(n, device=slots.device)).flatten()
        else:
            chosen = None
        # Slots past a segment's length are free and its own: no entry of any segment is overwritten.
        self.position.index_copy_(0, slots, step.flat_positions(heads))
        for name, tensor in new.items():
            tensor = tensor.detach() if tensor.requires_grad else tensor
            rows = tensor.flatten(0, 2) if chosen is None else tensor[chosen]
            self.buffers[name].index_copy_(0, slots, rows)
        if step.valid is not None:
            self.set_lengths(lengths)
            return
        self.lengths, self._free = lengths, self._free - n
        self._last, self._next = (slots, slots + 1) if n == 1 else (None, None)
        self._writer = None

    def fill(self, name: str, values: torch.Tensor) -> None:
        """Sets a state of the entries that an unpadded `append` of one token added.

        Args:
            values: fp32 `(batch * num_kv_heads,)`.
        """
        assert self._last is not None, "one token was appended last"
        self.buffers[name].index_copy_(0, self._last, values)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Gives every entry new values of some states. The old buffers are replaced, not written to.

        Args:
            states: fp32 `(batch, num_kv_heads, n)` by name, n the longest segment; arbitrary beyond a segment's length.
        """
        shape = self.batch, self.num_kv_heads, max(self.lengths, default=0)
        for name, values in states.items():
            assert values.shape == shape and values.dtype == self.buffers[name].dtype, "one number an entry"
        if self.uniform and self.lengths:
            for name, values in states.items():
                self.buffers[name] = self.buffers[name].clone()
                self.dense(self.buffers[name]).copy_(values)
            return
        index, valid = self.dense_index()
        slots = index[valid]
        for name, values in states.items():
            self.buffers[name] = self.buffers[name].index_copy(0, slots, values[valid])

    def _reallocate(self, lengths: list[int]) -> None:
        """Copies the entries into new buffers with slots for `lengths[s]` entries in segment `s`, and some slack."""
        slack = self._slack(lengths)
        self._gather_ranges(self.starts, self.lengths, [length + slack for length in lengths])

    def _gather_ranges(self, starts: Sequence[int], lengths: Sequence[int], reserved: Sequence[int]) -> None:
        """Makes segments of the flat ranges `starts[s] + [0, lengths[s])`, which may overlap or repeat (beams)."""
        source = sources_of_ranges(starts, lengths, reserved, self.key.device)
        self._gather(source, list(lengths), list(reserved))

    def compact(self, keep: torch.Tensor) -> None:
        """Keeps the entries where `keep` is True and frees the memory of the others.

        Args:
            keep: bool `(batch, num_kv_heads, n)`, n >= the longest segment; index i is the segment's i-th entry. Must
                be False beyond a segment's length.
        """
        keep = keep.reshape(len(self.lengths), -1)
        counts = keep.sum(1)
        lengths = counts.tolist()
        slack = self._slack(lengths)
        reserved = [length + slack for length in lengths]
        self._gather(sources_of_kept(keep, counts, self.starts, reserved), lengths, reserved)

    def _gather(self, source: torch.Tensor, lengths: list[int], reserved: list[int]) -> None:
        if self.capacity == 0:
            buffers = {name: b.new_zeros(len(source), *b.shape[1:]) for name, b in self.buffers.items()}
        else:
            buffers = {name: buffer.index_select(0, source) for name, buffer in self.buffers.items()}
        self._set_buffers(buffers, lengths, reserved)
        self.shared = False  # the new buffers belong to this store alone

    def _slack(self, lengths: Sequence[int]) -> int:
        """Free slots per segment: so many appends can follow before the next re-allocation."""
        return max(1, int(self.config.slack * sum(lengths) / max(1, len(lengths))))

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row `i` becomes a copy of the former row `rows[i]`; rows may repeat or be left out."""
        heads = self.num_kv_heads
        order = [row * heads + head for row in rows for head in range(heads)]
        lengths = [self.lengths[s] for s in order]
        slack = self._slack(lengths)
        self.batch = len(rows)
        self._gather_ranges([self.starts[s] for s in order], lengths, [length + slack for length in lengths])

    def fork(self) -> SegmentStore:
        """A copy that shares the buffers; whichever side writes first copies them."""
        other = SegmentStore(self.batch, self.num_kv_heads, dict(self.buffers), self.lengths, self.reserved)
        other._memo = self._memo
        self.shared = other.shared = True
        return other

    def memoised(self, name: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, a function of the entries: once for forks that share the same entries; else on every call.

        Args:
            name: identifies the function, and whatever it depends on other than keys, values and positions.

        Returns:
            The result, which must not be written to.
        """
        # Buffers that were shared once are never written again (a writer copies them first), so a result holds as long
        # as they do.
        if not self.shared:
            return compute()
        key = name, tuple(self.starts), tuple(self.lengths)
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def clear_memo(self) -> None:
        """Discards what `memoised` holds, for all forks that share these buffers; for measurements."""
        self._memo.clear()

    def locations(self) -> EntryLocations:
        """Locations of the entries now, valid in the buffers as they are now."""
        return SegmentLocations(self.starts, self.key.device)

    def dense_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat index and validity of every entry, both `(batch, num_kv_heads, n)` with n the longest segment."""
        device = self.key.device
        starts, lengths = torch.tensor([self.starts, self.lengths], device=device).unbind(0)
        within = torch.arange(max(self.lengths, default=0), device=device)
        valid = within < lengths.unsqueeze(1)
        index = torch.where(valid, starts.unsqueeze(1) + within, 0)
        shape = (self.batch, self.num_kv_heads, -1)
        return index.view(shape), valid.view(shape)

    def dense(self, buffer: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """`buffer` as `(batch, num_kv_heads, n, ...)`: a view if all segments are equal, else a padded copy.

        Args:
            index: that of `dense_index`, for a caller that has it already.
        """
        if self.uniform and self.lengths:
            boxed = buffer.unflatten(0, (self.batch, self.num_kv_heads, self.reserved[0]))
            return boxed.narrow(2, 0, self.lengths[0])
        return buffer[self.dense_index()[0] if index is None else index]

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each segment, `(1, 1, lengths[s], dim)` views of the storage."""
        sizes = [size for n, slots in zip(self.lengths, self.reserved, strict=True) for size in (n, slots - n)]
        keys = self.key.view(1, 1, *self.key.shape).split_with_sizes(sizes, 2)
        values = self.value.view(1, 1, *self.value.shape).split_with_sizes(sizes, 2)
        return zip(keys[::2], values[::2], strict=True)

    def check(self) -> None:
        """Raises AssertionError with the first of `faults`, if there is one."""
        for fault in self.faults():
            raise AssertionError(fault)

    def faults(self) -> Iterator[str]:
        """Violated invariants: ranges partition the buffers, positions ascend. Read no further than the first."""
        count = self.batch * self.num_kv_heads
        if not len(self.starts) == len(self.lengths) == len(self.reserved) == count:
            yield "the number of segments is not batch * num_kv_heads"
        if self.starts != [0, *accumulate(self.reserved)][:count]:
            yield "segments overlap or leave a gap"
        if sum(self.reserved) != self.capacity:
            yield "free and used slots do not add up to the capacity"
        if not all(0 <= n <= slots for n, slots in zip(self.lengths, self.reserved, strict=True)):
            yield "a segment has more entries than slots"
        if self._free != min((slots - n for slots, n in zip(self.reserved, self.lengths, strict=True)), default=0):
            yield "free slots are counted wrong"
        if self.uniform != (len(set(self.lengths)) <= 1 and len(set(self.reserved)) <= 1):
            yield "the flag for uniform segments is wrong"
        ends = [start + n for start, n in zip(self.starts, self.lengths, strict=True)]
        if self._next is not None and self._next.tolist() != ends:
            yield "the next free slot does not follow the last entry"
        if self._first is not None and self._first.tolist() != self.starts:
            yield "the first slots are not those of the segments"
        for name, buffer in self.buffers.items():
            if buffer.shape[0] != self.capacity:
                yield f"{name} does not have the capacity of the others"
        yield from self._position_faults()

    def _position_faults(self) -> Iterator[str]:
        if self.lengths and self.entries:
            index, valid = self.dense_index()
            position = self.position[index]
            if not bool(((position[..., 1:] > position[..., :-1]) | ~valid[..., 1:]).all()):
                yield "positions do not ascend in every segment"
            if not bool(((position >= 0) | ~valid).all()):
                yield "positions are negative"


def is_frozen(tensor: torch.Tensor) -> bool:
    """Whether torch forbids writing to `tensor`: it was made in inference mode, which has ended."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def _flattened(tensor: torch.Tensor) -> torch.Tensor:
    """`(batch, heads, n, ...)` as flat `(batch * heads * n, ...)` in a storage of exactly that size."""
    flat = tensor.contiguous().flatten(0, 2)
    return flat if flat.untyped_storage().nbytes() == flat.nbytes else flat.clone()
