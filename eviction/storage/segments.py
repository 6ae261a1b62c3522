"""Where the entries of a store stood at one time, for whoever wants to find them in the buffers of then.

Where the entries of new segments are copied from, as flat indices into the old buffers; see `SegmentStore`.

Flat storage of one layer's entries: a contiguous segment for every (row, head), each with its own length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from ..forward_state import Step


class Places(Protocol):
    """Where the entries of a store stood at one time."""

    def index(self, segments: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Flat indices of the first `lengths[i]` entries of each of `segments`, int64, one segment after the other."""
        ...


@dataclass(frozen=True)
class SegmentPlaces:
    """Where segments began."""

    starts: list[int]
    device: torch.device

    def index(self, segments: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        parts = [torch.arange(self.starts[s], self.starts[s] + n) for s, n in zip(segments, lengths, strict=True)]
        return torch.cat(parts).to(self.device)


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


SLACK = 0.06  # free room added when a segment is laid out anew, as a share of the layer's mean segment


class SegmentStore:
    """Keys, values, positions and per-entry state of one layer, stored without holes between entries of a head.

    Segment `s = row * num_kv_heads + head` owns the flat range `[starts[s], starts[s] + rooms[s])`. Its entries, in the
    order of their positions, are the first `lengths[s]` of that range; the rest of its room is free. The rooms
    partition `[0, capacity)`, so `free + entries == capacity`.

    Attributes:
        batch, num_kv_heads: rows and heads.
        key, value: `(capacity, head_dim)` and `(capacity, value_dim)`, the model's dtype.
        position: `(capacity,)` int32: index of the entry's token among the real tokens of its row.
        buffers: these three and the per-entry state by name, fp32 `(capacity,)`, e.g. `log_beta`.
        starts, lengths, rooms: one int a segment; the lists are replaced, never written to.
        nbytes: allocated bytes, free room included.
        uniform: all lengths and all rooms are equal.
        shared: another `SegmentStore` may hold the same buffers (after `fork`): they must not be written to.
    """

    spare = 1  # entries a segment that the storage may have room for beyond `SLACK`

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        buffers: dict[str, torch.Tensor],
        lengths: list[int],
        rooms: list[int],
    ) -> None:
        self.batch, self.num_kv_heads = batch, num_kv_heads
        self.shared = False
        self._adopt(buffers, lengths, rooms)

    @classmethod
    def from_dense(
        cls, key: torch.Tensor, value: torch.Tensor, state: dict[str, torch.Tensor], step: Step
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
        flat = {name: _own(tensor.detach()) for name, tensor in dense.items()}
        store = cls(batch, heads, flat, [n] * (batch * heads), [n] * (batch * heads))
        if step.valid is not None:
            store.compact(step.valid.unsqueeze(1).expand(batch, heads, n))
        return store

    def _adopt(self, buffers: dict[str, torch.Tensor], lengths: list[int], rooms: list[int]) -> None:
        """Makes `buffers` the storage; whatever was held before is released unless a fork still holds it."""
        self.buffers = buffers
        self.key, self.value, self.position = buffers["key"], buffers["value"], buffers["position"]
        self.rooms, self.starts = rooms, [0, *accumulate(rooms)][: len(rooms)]
        self.nbytes = self.capacity * self.entry_bytes
        self.set_lengths(lengths)

    def set_lengths(self, lengths: list[int]) -> None:
        """Shortens segments to their first `lengths[s]` entries; the rest becomes free room."""
        self.lengths = lengths
        self.uniform = len(set(lengths)) <= 1 and len(set(self.rooms)) <= 1
        self._free = min((room - n for room, n in zip(self.rooms, lengths, strict=True)), default=0)
        self._next = self._last = None

    def _next_slots(self) -> torch.Tensor:
        """Flat index of the first free slot of each segment, int64 `(batch * num_kv_heads,)`."""
        if self._next is None:
            ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
            self._next = torch.tensor(ends, device=self.key.device)
        return self._next

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

    def append(self, key: torch.Tensor, value: torch.Tensor, state: dict[str, torch.Tensor], step: Step) -> None:
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
        if self.shared or n > self._free:
            # The free room is used up, or it belongs to a fork as well: lay the segments out anew.
            self._relay(lengths)
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
        # Slots past a segment's length are its own free room: no entry of any segment is overwritten.
        self.position.index_copy_(0, slots, step.flat_positions(heads))
        for name, tensor in new.items():
            tensor = tensor.detach() if tensor.requires_grad else tensor
            rows = tensor.reshape(-1, *tensor.shape[3:]) if chosen is None else tensor[chosen]
            self.buffers[name].index_copy_(0, slots, rows)
        if step.valid is not None:
            self.set_lengths(lengths)
            return
        self.lengths, self._free = lengths, self._free - n
        self._last = slots
        self._next = slots + 1 if n == 1 else None

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
        index, valid = self.dense_index()
        slots = index[valid]
        for name, values in states.items():
            assert values.shape == index.shape and values.dtype == self.buffers[name].dtype, "one number an entry"
            self.buffers[name] = self.buffers[name].index_copy(0, slots, values[valid])

    def _relay(self, wanted: list[int]) -> None:
        """Copies the entries into new buffers where segment `s` has room for `wanted[s]` entries and some slack."""
        slack = _slack(wanted)
        self.take(self.starts, self.lengths, [length + slack for length in wanted])

    def take(self, starts: Sequence[int], lengths: Sequence[int], rooms: Sequence[int]) -> None:
        """Lays the storage out anew: new segment `s` gets the entries of the flat range `starts[s] + [0, lengths[s])`.

        The old buffers stay whole until all are copied, so ranges may overlap or repeat (beams).
        """
        source = sources_of_ranges(starts, lengths, rooms, self.key.device)
        self._gather(source, list(lengths), list(rooms))

    def compact(self, keep: torch.Tensor) -> None:
        """Keeps the entries where `keep` is True and returns the others' memory.

        Args:
            keep: bool `(batch, num_kv_heads, n)`, n >= the longest segment; index i is the segment's i-th entry. Must
                be False beyond a segment's length.
        """
        keep = keep.reshape(len(self.lengths), -1)
        counts = keep.sum(1)
        lengths = counts.tolist()
        slack = _slack(lengths)
        rooms = [length + slack for length in lengths]
        self._gather(sources_of_kept(keep, counts, self.starts, rooms), lengths, rooms)

    def _gather(self, source: torch.Tensor, lengths: list[int], rooms: list[int]) -> None:
        if self.capacity == 0:
            buffers = {name: b.new_zeros(len(source), *b.shape[1:]) for name, b in self.buffers.items()}
        else:
            buffers = {name: buffer.index_select(0, source) for name, buffer in self.buffers.items()}
        self._adopt(buffers, lengths, rooms)
        self.shared = False  # the new buffers are ours alone

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row `i` becomes a copy of the former row `rows[i]`; rows may repeat or be left out."""
        heads = self.num_kv_heads
        order = [row * heads + head for row in rows for head in range(heads)]
        lengths = [self.lengths[s] for s in order]
        slack = _slack(lengths)
        self.batch = len(rows)
        self.take([self.starts[s] for s in order], lengths, [length + slack for length in lengths])

    def fork(self) -> SegmentStore:
        """A copy that shares the buffers; whichever side writes first takes its own."""
        other = SegmentStore(self.batch, self.num_kv_heads, dict(self.buffers), self.lengths, self.rooms)
        self.shared = other.shared = True
        return other

    def places(self) -> Places:
        """Where the entries stand now, for whoever wants to find them later in the buffers of now."""
        return SegmentPlaces(self.starts, self.key.device)

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
            index: that of `dense_index`, for a caller who has it already.
        """
        if self.uniform and self.lengths:
            boxed = buffer.unflatten(0, (self.batch, self.num_kv_heads, self.rooms[0]))
            return boxed.narrow(2, 0, self.lengths[0])
        return buffer[self.dense_index()[0] if index is None else index]

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each segment, `(1, 1, lengths[s], dim)` views of the storage."""
        sizes = [size for n, room in zip(self.lengths, self.rooms, strict=True) for size in (n, room - n)]
        keys = self.key.view(1, 1, *self.key.shape).split_with_sizes(sizes, 2)
        values = self.value.view(1, 1, *self.value.shape).split_with_sizes(sizes, 2)
        return zip(keys[::2], values[::2], strict=True)

    def check(self) -> None:
        """Raises AssertionError unless there is nothing to say about `faults`."""
        for fault in self.faults():
            raise AssertionError(fault)

    def faults(self) -> Iterator[str]:
        """What is wrong: ranges must partition the buffers, positions must ascend. Read no further than the first."""
        count = self.batch * self.num_kv_heads
        if not len(self.starts) == len(self.lengths) == len(self.rooms) == count:
            yield "one range a segment is needed"
        if self.starts != [0, *accumulate(self.rooms)][:count]:
            yield "rooms do not follow each other without a gap"
        if sum(self.rooms) != self.capacity:
            yield "free and used entries are not all that there are"
        if not all(0 <= n <= room for n, room in zip(self.lengths, self.rooms, strict=True)):
            yield "entries do not fit their room"
        if self._free != min((r - n for r, n in zip(self.rooms, self.lengths, strict=True)), default=0):
            yield "free room is counted wrong"
        if self.uniform != (len(set(self.lengths)) <= 1 and len(set(self.rooms)) <= 1):
            yield "segments are uniform, or not, and it is not known"
        ends = [start + n for start, n in zip(self.starts, self.lengths, strict=True)]
        if self._next is not None and self._next.tolist() != ends:
            yield "the next entry does not go behind the last"
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


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """`(batch, heads, n, ...)` as flat `(batch * heads * n, ...)` in a storage of exactly that size."""
    flat = tensor.contiguous().flatten(0, 2)
    return flat if flat.untyped_storage().nbytes() == flat.nbytes else flat.clone()


def _slack(lengths: Sequence[int]) -> int:
    """Free slots for each segment: so many appends pass before the layer is laid out anew."""
    return max(1, int(SLACK * sum(lengths) / max(1, len(lengths))))
