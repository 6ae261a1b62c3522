"""Whose request is next: fair shares among clients, among a client's workflows, and age and priority within one.

Virtual token counters (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024, algorithm 2) at two levels:
the client, and in it the workflow, that has been served the fewest tokens goes first. One that comes back from
idleness is lifted to the least of those that wait, so nobody saves up a claim; whoever is owed nothing is forgotten.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count

from .entry import Entry

MAX_IDLE = 10_000  # branches that are remembered while nothing of theirs waits


class Branch:
    """One client, or one workflow.

    Attributes:
        served: tokens charged so far, or lifted to.
        waiting: entries below it.
        floor: the counter of whoever went last; who begins to wait is lifted to it.
        heap: of a client, its workflows that wait, by counter. queue: of a workflow, its requests.
    """

    __slots__ = ("children", "floor", "heap", "queue", "served", "stamp", "waiting")

    def __init__(self) -> None:
        self.served = 0.0
        self.floor = 0.0
        self.waiting = 0
        self.stamp = 0
        self.children: dict[str, Branch] = {}
        self.heap: list[tuple[float, int, Branch]] = []
        self.queue: list[tuple[float, int, int, Entry]] = []


class FairQueue:
    """Entries by fair share; all operations are O(log n) amortised.

    Args:
        window_s: a request of priority 1 goes before one of priority 0 that has arrived up to so much earlier; as this
            is a bound, nothing starves in a workflow.
    """

    def __init__(self, window_s: float = 10.0) -> None:
        self.window_s = window_s
        self.root = Branch()
        self._numbers = count(1)
        self._queued: dict[Entry, int] = {}

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._queued

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._queued)

    def push(self, entry: Entry) -> None:
        number = self._queued[entry] = next(self._numbers)
        entry.order = entry.order or number  # whoever comes back takes its old place
        client, workflow = self._branches(entry)
        key = entry.times.arrived - self.window_s * entry.request.priority
        heapq.heappush(workflow.queue, (key, entry.order, number, entry))
        for parent, branch in ((client, workflow), (self.root, client)):
            branch.waiting += 1
            if branch.waiting == 1:
                branch.served = max(branch.served, parent.floor)
                self._enter(parent, branch)
        self.root.waiting += 1

    def remove(self, entry: Entry) -> bool:
        """Takes it out, wherever it is; False if it is not there."""
        if self._queued.pop(entry, None) is None:
            return False
        client, workflow = self._branches(entry)
        for branch in (workflow, client, self.root):
            branch.waiting -= 1
        if not workflow.waiting:
            workflow.queue.clear()
        return True

    def pop(self) -> Entry | None:
        """The one that is next, out of the queue."""
        if not self._queued:
            return None
        client = self._first(self.root)
        workflow = self._first(client)
        while True:
            _, _, number, entry = heapq.heappop(workflow.queue)
            if self._queued.get(entry) == number:
                self.remove(entry)
                return entry

    def charge(self, entry: Entry, tokens: float) -> None:
        """Whoever `entry` belongs to has had so many tokens computed (less than 0: has been charged too much)."""
        entry.charged += tokens
        client, workflow = self._branches(entry)
        for parent, branch in ((client, workflow), (self.root, client)):
            branch.served += tokens
            if branch.waiting:
                self._enter(parent, branch)

    def _branches(self, entry: Entry) -> tuple[Branch, Branch]:
        name, part = entry.path
        client = self._child(self.root, name)
        return client, self._child(client, part)

    def _child(self, parent: Branch, name: str) -> Branch:
        branch = parent.children.get(name)
        if branch is None:
            if len(parent.children) >= 2 * MAX_IDLE:
                self._forget(parent)
            branch = parent.children[name] = Branch()
            branch.served = parent.floor
        return branch

    def _forget(self, parent: Branch) -> None:
        """Drops the idle branches, those that have been served most being kept to the last: they owe something."""
        idle = sorted((b.served, name) for name, b in parent.children.items() if not b.waiting)
        for _, name in idle[: max(0, len(idle) - MAX_IDLE)]:
            del parent.children[name]

    def _enter(self, parent: Branch, branch: Branch) -> None:
        branch.stamp = next(self._numbers)
        heapq.heappush(parent.heap, (branch.served, branch.stamp, branch))
        if len(parent.heap) > 4 * len(parent.children) + 64:  # most are stale
            parent.heap = [(b.served, b.stamp, b) for b in parent.children.values() if b.waiting]
            heapq.heapify(parent.heap)

    def _first(self, parent: Branch) -> Branch:
        """The waiting branch that has been served least."""
        while True:
            served, stamp, branch = parent.heap[0]
            if branch.waiting and branch.stamp == stamp:
                parent.floor = max(parent.floor, served)
                return branch
            heapq.heappop(parent.heap)

    def check(self) -> None:
        """Raises AssertionError unless the counts of what waits agree."""
        assert self.root.waiting == len(self._queued), "what waits is counted"
        for client in self.root.children.values():
            assert client.waiting == sum(b.waiting for b in client.children.values()), "a client's requests are counted"
        assert self.root.waiting == sum(client.waiting for client in self.root.children.values())
