"""Page-locked memory for the host tier: locked in large pieces once, handed out in blocks of any size.

Locking memory is slow and stops the GPU, and PyTorch's allocator of pinned memory rounds every block up to a power of
two. Here a slab of a power of two is locked when it is first needed, and blocks are cut out of it.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

UNIT = 512  # bytes: where blocks begin and what their sizes are multiples of
SLAB = 2**28  # bytes of a slab, unless a block needs more
APART = 2**48  # between the addresses of two slabs, so that their free ranges never meet


def rounded(nbytes: int) -> int:
    """What a block of `nbytes` takes."""
    return -(-nbytes // UNIT) * UNIT


class Arena:
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
