"""Which agents' prompts are wanted on the device, and in which order they are brought there."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

AGEING = 0.1  # seconds that a second in sight is worth in the order of the wishes


@dataclass(eq=False)
class Wish:
    """An agent whose prompt should be on the device.

    Attributes:
        since: when it came into sight. due: when it is expected to be called.
        key: of its place among the wishes, smaller first: when it is due, and the sooner the longer it has been in
            sight, so that nothing starves. (Were it kept from when it came into sight, a branch that was not taken
            would go before the one that was.)
        stamp: of its valid entry in the heap, 0 = in none.
    """

    agent: str
    since: float
    due: float
    key: float
    stamp: int = 0
    failures: int = 0


class Wishes:
    """Wishes by key, and the agents that come into sight with time alone."""

    def __init__(self) -> None:
        self._wishes: dict[str, Wish] = {}
        self._heap: list[tuple[float, int, Wish]] = []
        self._looks: dict[str, float] = {}
        self._later: list[tuple[float, str]] = []
        self._numbers = count(1)

    def want(self, agent: str, now: float, due: float) -> Wish:
        """`agent` is in sight and expected to be called at `due`."""
        self._looks.pop(agent, None)
        wish = self._wishes.get(agent)
        if wish is None:
            wish = self._wishes[agent] = Wish(agent, now, due, due)
        wish.due, wish.key, wish.failures = due, due - AGEING * (now - wish.since), 0
        return wish

    def enter(self, wish: Wish) -> None:
        """It is to be granted, in its turn."""
        wish.stamp = next(self._numbers)
        heapq.heappush(self._heap, (wish.key, wish.stamp, wish))
        if len(self._heap) > 4 * len(self._wishes) + 64:  # most are stale
            self._heap = [(w.key, w.stamp, w) for w in self._wishes.values() if w.stamp]
            heapq.heapify(self._heap)

    def first(self) -> Wish | None:
        """The one whose turn it is; it stays."""
        while self._heap and self._heap[0][2].stamp != self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def holds(self, wish: Wish) -> bool:
        """Whether it is still wished."""
        return self._wishes.get(wish.agent) is wish

    def drop(self, agent: str) -> None:
        """Nothing is to be done for `agent` until there is news of it."""
        wish = self._wishes.pop(agent, None)
        if wish is not None:
            wish.stamp = 0

    def look_at(self, agent: str, time: float) -> None:
        """`agent` is out of sight until then, if nothing changes."""
        if self._looks.get(agent) != time:
            self._looks[agent] = time
            heapq.heappush(self._later, (time, agent))
            if len(self._later) > 4 * len(self._looks) + 64:  # most are stale
                self._later = [(time, agent) for agent, time in self._looks.items()]
                heapq.heapify(self._later)

    def forget(self, agent: str) -> None:
        """`agent` is out of sight."""
        self.drop(agent)
        self._looks.pop(agent, None)

    def due(self, now: float) -> Iterator[str]:
        """The agents to be looked at now, out of the list of these."""
        while self._later and self._later[0][0] <= now:
            time, agent = heapq.heappop(self._later)
            if self._looks.get(agent) == time:
                del self._looks[agent]
                yield agent

    def next_time(self) -> float | None:
        """When an agent is to be looked at next."""
        while self._later and self._looks.get(self._later[0][1]) != self._later[0][0]:
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else None

    def clear(self) -> None:
        for each in (self._wishes, self._heap, self._looks, self._later):
            each.clear()
