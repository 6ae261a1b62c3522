"""A priority queue whose items can be re-prioritised and removed in place: a binary heap with lazy deletion."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)
STALE_RATIO, STALE_SLACK = 4, 64  # a heap is rebuilt beyond STALE_RATIO * live + STALE_SLACK entries


class LazyHeap(Generic[Item]):
    """Items by priority, smallest first; equal priorities in the order of their last `push`.

    `push` and `pop` cost O(log n) amortised, `discard` O(1). A replaced or discarded item leaves a stale entry, which
    is skipped when it surfaces; when stale entries dominate, the heap is rebuilt, so memory stays O(live items).

    Items are compared by hash and equality only, never ordered. Not synchronised.

    Attributes:
        entries: the live items, each with its (priority, number of the push, item). The same dictionary for the life of
            the heap, so a reader may keep it; only the heap writes to it.
    """

    __slots__ = ("_heap", "_pushes", "entries")

    def __init__(self) -> None:
        self.entries: dict[Item, tuple[Any, int, Item]] = {}
        self._heap: list[tuple[Any, int, Item]] = []
        self._pushes = 0

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, item: object) -> bool:
        return item in self.entries

    def __iter__(self) -> Iterator[Item]:
        """The items in no particular order; not to be changed meanwhile."""
        return iter(self.entries)

    def priority(self, item: Item) -> Any | None:
        """The priority of `item`; None if it is not queued."""
        entry = self.entries.get(item)
        return None if entry is None else entry[0]

    def push(self, item: Item, priority: Any) -> None:
        """Adds `item`, or gives it another priority; either way it comes last among equal priorities.

        Args:
            priority: a number or a tuple that is comparable with the others, without NaN.
        """
        heap, entries = self._heap, self.entries
        number = self._pushes = self._pushes + 1
        old = entries.get(item)
        entry = entries[item] = priority, number, item
        if old is not None and heap[0] is old:  # one sift instead of two
            heapreplace(heap, entry)
            return
        heappush(heap, entry)
        if len(heap) > STALE_RATIO * len(entries) + STALE_SLACK:
            self._heap = list(entries.values())
            heapify(self._heap)

    def discard(self, item: Item) -> bool:
        """Removes `item`; False if it was not queued."""
        return self.entries.pop(item, None) is not None

    def peek(self) -> Item | None:
        """The first item, which stays; None if the heap is empty."""
        heap, entries = self._heap, self.entries
        while heap:
            item = heap[0][2]
            if entries.get(item) is heap[0]:
                return item
            heappop(heap)
        return None

    def peek_priority(self) -> Any | None:
        """The priority of the first item; None if the heap is empty."""
        first = self.peek_entry()
        return None if first is None else first[0]

    def peek_entry(self) -> tuple[Any, int, Item] | None:
        """The entry of the first item, as in `entries`; None if the heap is empty."""
        heap, entries = self._heap, self.entries
        while heap:
            first = heap[0]
            if entries.get(first[2]) is first:
                return first
            heappop(heap)
        return None

    def pop(self) -> Item | None:
        """Removes and returns the first item; None if the heap is empty."""
        item = self.peek()
        if item is not None:
            heappop(self._heap)
            del self.entries[item]
        return item

    def pop_until(self, priority: Any) -> Iterator[Item]:
        """Removes and yields the items whose priority is at most `priority`, smallest first, e.g. timers that are due.

        Items that are pushed while it runs are yielded too if they are due.
        """
        while (first := self.peek_priority()) is not None and first <= priority:
            item = self.pop()
            assert item is not None
            yield item

    def clear(self) -> None:
        self.entries.clear()
        self._heap.clear()
