"""The heap with lazy deletion against a dictionary that is searched in full."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.serving.lazy_heap import STALE_RATIO, STALE_SLACK, LazyHeap

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 8), st.integers(0, 4)),
        st.tuples(st.just("discard"), st.integers(0, 8), st.just(0)),
        st.tuples(st.just("pop"), st.just(0), st.just(0)),
        st.tuples(st.just("until"), st.just(0), st.integers(0, 4)),
    ),
    max_size=80,
)


class NaiveQueue:
    """Priorities in a dictionary; the first is searched for each time."""

    def __init__(self) -> None:
        self.items: dict[int, tuple[int, int]] = {}
        self.pushes = 0

    def push(self, item: int, priority: int) -> None:
        self.pushes += 1
        self.items[item] = priority, self.pushes

    def peek(self) -> int | None:
        return min(self.items, key=lambda item: self.items[item], default=None)

    def pop(self) -> int | None:
        item = self.peek()
        if item is not None:
            del self.items[item]
        return item

    def pop_until(self, priority: int) -> list[int]:
        due = []
        while (item := self.peek()) is not None and self.items[item][0] <= priority:
            due.append(item)
            del self.items[item]
        return due


@given(STEPS)
@settings(max_examples=300, deadline=None)
def test_it_agrees_with_a_searched_dictionary(steps: list[tuple[str, int, int]]):
    heap: LazyHeap[int] = LazyHeap()
    naive, entries = NaiveQueue(), heap.entries
    for what, item, priority in steps:
        if what == "push":
            heap.push(item, priority)
            naive.push(item, priority)
        elif what == "discard":
            assert heap.discard(item) == (naive.items.pop(item, None) is not None)
        elif what == "pop":
            assert heap.pop() == naive.pop()
        else:
            assert list(heap.pop_until(priority)) == naive.pop_until(priority)
        first = naive.peek()
        assert heap.peek() == first
        assert heap.peek_priority() == (None if first is None else naive.items[first][0])
        assert set(heap) == set(naive.items) and len(heap) == len(naive.items)
        assert all(heap.priority(item) == naive.items[item][0] for item in naive.items)
        assert heap.entries is entries, "readers may keep the dictionary"


def test_equal_priorities_come_out_in_the_order_of_their_last_push():
    heap: LazyHeap[str] = LazyHeap()
    for item in "abc":
        heap.push(item, 1.0)
    heap.push("a", 1.0)
    assert [heap.pop() for _ in range(4)] == ["b", "c", "a", None]


def test_items_are_not_ordered():
    heap: LazyHeap[object] = LazyHeap()
    items = [object() for _ in range(5)]
    for item in items:
        heap.push(item, (0.0, 1))
    assert [heap.pop() for _ in items] == items


def test_stale_entries_are_bounded():
    heap: LazyHeap[int] = LazyHeap()
    for time in range(10_000):
        heap.push(time % 7, -time)
        assert len(heap._heap) <= STALE_RATIO * len(heap) + STALE_SLACK
    heap.clear()
    assert heap.peek() is None and not heap and heap.pop() is None


def test_due_items_that_are_pushed_meanwhile_are_yielded():
    heap: LazyHeap[str] = LazyHeap()
    heap.push("a", 1)
    heap.push("z", 9)
    seen = []
    for item in heap.pop_until(3):
        seen.append(item)
        if item == "a":
            heap.push("b", 2)
    assert seen == ["a", "b"] and set(heap) == {"z"}
