"""Free ranges of an address space: best fit, and neighbouring ranges are joined."""

from __future__ import annotations

from bisect import bisect_left, insort


class FreeRanges:
    """Disjoint ranges `[start, end)`, no two of which touch. Not synchronised.

    Attributes:
        total: length of all ranges.
    """

    def __init__(self) -> None:
        self.total = 0
        self._sizes: list[tuple[int, int]] = []  # length, start; ascending
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}

    @property
    def longest(self) -> int:
        """Length of the longest range; 0 if there is none."""
        return self._sizes[-1][0] if self._sizes else 0

    def add(self, start: int, end: int) -> None:
        """Adds a range that no other overlaps, and joins it with those that touch it."""
        before, after = self._start_of.get(start), self._end_of.get(end)
        if before is not None:
            self._remove(before, start)
            start = before
        if after is not None:
            self._remove(end, after)
            end = after
        insort(self._sizes, (end - start, start))
        self._end_of[start], self._start_of[end] = end, start
        self.total += end - start

    def take(self, size: int) -> int | None:
        """Takes `size` from the beginning of the shortest range that has it; its start, or None if none is as long."""
        place = bisect_left(self._sizes, (size, 0))
        if place == len(self._sizes):
            return None
        length, start = self._sizes[place]
        self._remove(start, start + length)
        if length > size:
            self.add(start + size, start + length)
        return start

    def _remove(self, start: int, end: int) -> None:
        del self._sizes[bisect_left(self._sizes, (end - start, start))]
        del self._end_of[start], self._start_of[end]
        self.total -= end - start
