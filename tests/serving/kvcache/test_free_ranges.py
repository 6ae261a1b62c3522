"""Free ranges against a set of addresses."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.serving.kvcache.free_ranges import FreeRanges

SPACE = 40


def runs_of(addresses: set[int]) -> list[tuple[int, int]]:
    """The longest ranges `[start, end)` that the addresses consist of, ascending."""
    starts = sorted(each for each in addresses if each - 1 not in addresses)
    ends = sorted(each + 1 for each in addresses if each + 1 not in addresses)
    return list(zip(starts, ends, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, SPACE), max_size=60), st.integers(0, 2**32))
def test_they_hold_what_a_set_of_addresses_holds(sizes, seed):
    """Taken from the shortest range that is long enough; what is given back in any order is joined again."""
    ranges, free, taken = FreeRanges(), set(range(SPACE)), []
    ranges.add(0, SPACE)
    choose = random.Random(seed)
    for size in sizes:
        if taken and choose.random() < 0.5:
            start, end = taken.pop(choose.randrange(len(taken)))
            ranges.add(start, end)
            free |= set(range(start, end))
        else:
            fitting = [(end - start, start) for start, end in runs_of(free) if end - start >= size]
            start = ranges.take(size)
            assert start == (min(fitting)[1] if fitting else None)
            if start is not None:
                free -= set(range(start, start + size))
                taken.append((start, start + size))
        assert ranges.total == len(free)
        assert ranges.longest == max((end - start for start, end in runs_of(free)), default=0)
    for start, end in taken:
        ranges.add(start, end)
    assert (ranges.total, ranges.longest, ranges.take(SPACE), ranges.total) == (SPACE, SPACE, 0, 0)
