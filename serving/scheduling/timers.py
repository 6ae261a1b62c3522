"""What has to be looked at when its time comes."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count

from .entry import Entry, State


class Timers:
    """Entries by time; whoever sets one decides, when it is due, whether it still means anything."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Entry]] = []
        self._numbers = count()
        self._ended = 0

    def set(self, time: float, entry: Entry) -> None:
        heapq.heappush(self._heap, (time, next(self._numbers), entry))

    def ended(self) -> None:
        """One more entry is over; when most of the heap is of such, they are dropped."""
        self._ended += 1
        if 2 * self._ended > len(self._heap) + 64:
            self._heap = [each for each in self._heap if each[2].state is not State.ENDED]
            heapq.heapify(self._heap)
            self._ended = 0

    def due(self, now: float) -> Iterator[Entry]:
        """The entries whose time has come, out of the heap; not those that are over."""
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)[2]
            if entry.state is not State.ENDED:
                yield entry

    def next_time(self) -> float | None:
        while self._heap and self._heap[0][2].state is State.ENDED:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
