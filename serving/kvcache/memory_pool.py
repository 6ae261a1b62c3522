"""Page-locked memory for the host tier: locked in large pieces once, handed out in blocks of any size.

Locking memory is slow and stops the GPU, and PyTorch's allocator of pinned memory rounds every block up to a power of
two. Here a slab of a power of two is locked when it is first needed, and blocks are cut out of it.

The memory of a tier: a capacity in bytes, counted before anything is allocated, and where copies are made.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .base import KVPayload, PhantomPayload, TensorPayload

if TYPE_CHECKING:
    import torch


UNIT = 512  # bytes: where blocks begin and what their sizes are multiples of
SLAB = 2**28  # bytes of a slab, unless a block needs more
APART = 2**48  # between the addresses of two slabs, so that their free ranges never meet


def rounded(nbytes: int) -> int:
    """What a block of `nbytes` takes."""
    return -(-nbytes // UNIT) * UNIT


class PinnedArena:
    """Blocks out of slabs: the smallest free range that is large enough, neighbours joined when they come back.

    A block is free again when the last tensor that shares its storage is gone, whoever held it, so nobody frees a
    block that somebody still reads. Blocks are asked for by one thread at a time and may come back on any.

    Args:
        capacity: bytes that may be handed out at a time, each block in multiples of `UNIT`. Slabs take up to a quarter
            more and the rest of a slab, so that there is room if what is free lies in pieces.
        lock_pages: gives a slab, uint8 `(nbytes,)`.

    Attributes:
        used: bytes that are handed out.
        locked: bytes of all slabs.
    """

    def __init__(self, capacity: int, lock_pages: Callable[[int], torch.Tensor]) -> None:
        self.capacity = rounded(capacity)
        self.used = self.locked = 0
        self._lock_pages = lock_pages
        self._slabs: list[torch.Tensor] = []
        self._sizes: list[tuple[int, int]] = []  # free ranges: bytes, address; ascending
        self._end_of: dict[int, int] = {}  # the same ranges: end by beginning
        self._begin_of: dict[int, int] = {}  # beginning by end
        # What has come back; the collector may bring it at any moment, also while this thread is in here.
        self._returned: deque[tuple[int, int]] = deque()
        self._busy = threading.Lock()

    def block(self, nbytes: int) -> torch.Tensor:
        """Uninitialised memory, uint8 `(nbytes,)`.

        Raises:
            MemoryError: less than that is free, or only in pieces.
        """
        import torch

        size = max(UNIT, rounded(nbytes))
        with self._busy:
            self._take_back()
            address = self._cut(size)
        piece = self._slabs[address // APART].numpy()[address % APART :][:nbytes]
        weakref.finalize(piece, self._returned.append, (address, size)).atexit = False
        return torch.from_numpy(piece)

    def _cut(self, size: int) -> int:
        if size > self.capacity - self.used:
            raise MemoryError(f"{size} bytes are asked for, {self.capacity - self.used} are free")
        place = bisect_left(self._sizes, (size, 0))
        if place == len(self._sizes):
            self._add_slab(size)
            place = bisect_left(self._sizes, (size, 0))
        length, start = self._sizes[place]
        self._remove(start, start + length)
        if length > size:
            self._insert(start + size, start + length)
        self.used += size
        return start

    def _add_slab(self, size: int) -> None:
        if self.locked >= self.capacity * 5 // 4:
            raise MemoryError(f"{size} bytes are asked for, and what is free lies in smaller pieces")
        wanted = min(SLAB, max(self.capacity - self.locked, self.capacity // 8))
        nbytes = 1 << (max(size, wanted) - 1).bit_length()
        self._slabs.append(self._lock_pages(nbytes))
        self.locked += nbytes
        start = (len(self._slabs) - 1) * APART
        self._insert(start, start + nbytes)

    def _take_back(self) -> None:
        while self._returned:
            start, size = self._returned.popleft()
            self.used -= size
            end = start + size
            before, after = self._begin_of.get(start), self._end_of.get(end)
            if before is not None:
                self._remove(before, start)
            if after is not None:
                self._remove(end, after)
            start, end = start if before is None else before, end if after is None else after
            self._insert(start, end)

    def _insert(self, start: int, end: int) -> None:
        insort(self._sizes, (end - start, start))
        self._end_of[start], self._begin_of[end] = end, start

    def _remove(self, start: int, end: int) -> None:
        del self._sizes[bisect_left(self._sizes, (end - start, start))]
        del self._end_of[start], self._begin_of[end]


class Builder(Protocol):
    """A copy in the making, written layer by layer by one thread at a time."""

    def write(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over the contents of one layer, in order; on a GPU the work may still be queued on the stream."""
        ...

    def commit(self) -> KVPayload:
        """The finished copy; every layer has been written."""
        ...

    def abort(self) -> None:
        """Gives back what the unfinished copy has taken. Does not raise."""
        ...


class Pool(ABC):
    """Counts the bytes of one tier's copies, finished and in the making; `used + free == capacity`.

    The tiers call `take` before they begin a copy or adopt one, and `give` once it is dropped or has failed.

    Attributes:
        capacity: bytes.
        used: bytes taken.
        reserved: of these, the bytes of requests that are being computed: nothing of the tree's.
        idle: bytes of copies whose nodes have no user: what eviction could free.
        leaving: bytes that copies under way into a slower tier will free here.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"got a capacity of {capacity} bytes; accepted: 0 (no such tier) or more")
        self.capacity = capacity
        self.used = self.idle = self.leaving = self.reserved = 0

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def charge(self, payload: KVPayload) -> int:
        """Bytes that a copy of `payload` takes here."""
        return payload.nbytes

    def require(self, payload: KVPayload) -> None:  # noqa: B027  # memory holds everything
        """Raises ValueError if the tier cannot hold such a payload, of whatever size."""

    def can_take(self, nbytes: int) -> bool:
        return nbytes <= self.free

    def take(self, nbytes: int) -> None:
        assert self.can_take(nbytes), "room is made before it is taken"
        self.used += nbytes

    def give(self, nbytes: int) -> None:
        self.used -= nbytes
        assert self.used >= 0, "what is given back was taken"

    def reserve(self, nbytes: int) -> None:
        """Takes room for what is computed outside the tree; `unreserve` gives it back."""
        self.take(nbytes)
        self.reserved += nbytes

    def unreserve(self, nbytes: int) -> None:
        self.give(nbytes)
        self.reserved -= nbytes
        assert self.reserved >= 0, "what is given back was reserved"

    @abstractmethod
    def begin(self, payload: KVPayload) -> Builder:
        """Allocates for a copy of `payload`.

        Raises:
            OSError, RuntimeError, MemoryError: there is less memory than the capacity promises.
        """

    def discard(self, payload: KVPayload) -> None:  # noqa: B027  # memory needs nothing
        """Called when a copy leaves the tier, so that what reference counting does not free can be."""

    def close(self) -> None:  # noqa: B027
        """Called once, when the tiers are closed."""


class MemoryPool(Pool):
    """Tensors on a device, or in the host's memory; those of a layer stand together, so that copying it is one copy.

    Args:
        capacity: bytes.
        device: where the tensors are.
        pinned: page-locked, so that a GPU copies at full speed and asynchronously; needs a GPU. Each layer is counted
            as what it takes of an `PinnedArena`.

    Raises:
        ValueError: a negative capacity, or pinned memory where there is no GPU.
    """

    def __init__(self, capacity: int, device: str | torch.device = "cpu", pinned: bool = False) -> None:
        super().__init__(capacity)
        self.device, self.pinned = device, pinned
        self._arena = None
        if pinned:
            try:
                page_locked(1)
            except RuntimeError as error:
                raise ValueError("pinned=True needs a GPU that torch sees; without one, pinned=False") from error
            self._arena = PinnedArena(capacity, page_locked)

    def charge(self, payload: KVPayload) -> int:
        return payload.nbytes if self._arena is None else sum(map(rounded, payload.layers))

    def begin(self, payload: KVPayload) -> Builder:
        return _TensorBuilder(TensorPayload.empty_like(payload, self._memory, self._memory_of_parts))

    def _memory(self, nbytes: int) -> torch.Tensor:
        import torch

        if self._arena is not None:
            return self._arena.block(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _memory_of_parts(self, nbytes: int) -> torch.Tensor:
        """For a copy that is cut or joined: its bytes exist twice then, which a full arena has no room for."""
        import torch

        try:
            return self._memory(nbytes)
        except MemoryError:
            return torch.empty(nbytes, dtype=torch.uint8)  # slower to move, and nothing else


def page_locked(nbytes: int) -> torch.Tensor:
    """Memory that a GPU copies from and to by itself, uint8 `(nbytes,)`."""
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


@dataclass
class _TensorBuilder:
    made: TensorPayload

    def write(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        from ...eviction.storage.packing import copy_all

        targets = self.made.read(layer)
        copy_all(list(targets.values()), [tensors[name] for name in targets])

    def commit(self) -> KVPayload:
        return self.made

    def abort(self) -> None:
        pass  # the memory goes with the tensors


class PhantomPool(Pool):
    """Counts and holds nothing: any tier of the simulator."""

    def begin(self, payload: KVPayload) -> Builder:
        assert isinstance(payload, PhantomPayload), "a pool without memory holds payloads without data"
        return _PhantomBuilder(payload)


@dataclass
class _PhantomBuilder:
    payload: PhantomPayload

    def write(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        pass

    def commit(self) -> KVPayload:
        return self.payload

    def abort(self) -> None:
        pass
