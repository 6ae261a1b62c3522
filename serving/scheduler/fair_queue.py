"""Whose request is next: fair shares among clients, among a client's workflows, and age and priority within one.

Virtual token counters (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024, algorithm 2) at two levels:
the client, and in it the workflow, that has been served the fewest tokens goes first. One that comes back from
idleness is lifted to the least of those that wait, so nobody saves up a claim; whoever is owed nothing is forgotten.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import count

from .request_state import Entry

MAX_IDLE = 10_000  # branches that are remembered while nothing of theirs waits


class Branch:
    """One client, or one workflow.

    Attributes:
        served: tokens charged so far, or lifted to.
        floor: the counter of whoever went last; who begins to wait is lifted to it.
        waiting: entries below it; this and what follows for those that can be popped always, and for those aside.
        heaps: of a client, its workflows that wait, by counter. queues: of a workflow, its requests.
    """

    __slots__ = ("children", "floor", "heaps", "queues", "served", "stamps", "waiting")

    def __init__(self) -> None:
        self.served = 0.0
        self.floor = 0.0
        self.waiting = [0, 0]
        self.stamps = [0, 0]
        self.children: dict[str, Branch] = {}
        self.heaps: tuple[list[tuple[float, int, Branch]], ...] = ([], [])
        self.queues: tuple[list[tuple[float, int, int, Entry]], ...] = ([], [])


class FairQueue:
    """Entries by fair share; all operations are O(log n) amortised. Those aside have a place in the same order.

    Args:
        window_s: a request of priority 1 goes before one of priority 0 that has arrived up to so much earlier; as this
            is a bound, nothing starves in a workflow.
    """

    def __init__(self, window_s: float = 10.0) -> None:
        self.window_s = window_s
        self.root = Branch()
        self._numbers = count(1)
        self._queued: dict[Entry, tuple[int, bool]] = {}

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._queued

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._queued)

    def push(self, entry: Entry) -> None:
        """It waits; put aside if it says so."""
        number, aside = next(self._numbers), entry.aside
        self._queued[entry] = number, aside
        entry.order = entry.order or number  # whoever comes back takes its old place
        client, workflow = self._branches(entry)
        key = entry.times.arrived - self.window_s * entry.request.priority
        heapq.heappush(workflow.queues[aside], (key, entry.order, number, entry))
        for parent, branch in ((client, workflow), (self.root, client)):
            if not any(branch.waiting) and not aside:  # whoever is put aside was not idle
                branch.served = max(branch.served, parent.floor)
            branch.waiting[aside] += 1
            if branch.waiting[aside] == 1:
                self._enter(parent, branch, aside)
        self.root.waiting[aside] += 1

    def remove(self, entry: Entry) -> bool:
        """Takes it out, wherever it is; False if it is not there."""
        _, aside = self._queued.pop(entry, (0, None))
        if aside is None:
            return False
        client, workflow = self._branches(entry)
        for branch in (workflow, client, self.root):
            branch.waiting[aside] -= 1
        if not workflow.waiting[aside]:
            workflow.queues[aside].clear()
        return True

    def pop(self, aside: bool = True) -> Entry | None:
        """The one that is next, out of the queue; of those aside only if `aside`."""
        lanes = (False, True) if aside else (False,)
        if not any(self.root.waiting[lane] for lane in lanes):
            return None
        workflow = self._first(self._first(self.root, lanes), lanes)
        heads = []
        for lane in lanes:
            queue = workflow.queues[lane]
            while queue and self._queued.get(queue[0][3]) != (queue[0][2], lane):
                heapq.heappop(queue)
            heads += queue[:1]
        entry = min(heads)[3]
        heapq.heappop(workflow.queues[self._queued[entry][1]])
        self.remove(entry)
        return entry

    def charge(self, entry: Entry, tokens: float) -> None:
        """Whoever `entry` belongs to has had so many tokens computed (less than 0: has been charged too much)."""
        entry.charged += tokens
        client, workflow = self._branches(entry)
        for parent, branch in ((client, workflow), (self.root, client)):
            branch.served += tokens
            for lane in (False, True):
                if branch.waiting[lane]:
                    self._enter(parent, branch, lane)

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
        idle = sorted((b.served, name) for name, b in parent.children.items() if not any(b.waiting))
        for _, name in idle[: max(0, len(idle) - MAX_IDLE)]:
            del parent.children[name]

    def _enter(self, parent: Branch, branch: Branch, lane: bool) -> None:
        heap = parent.heaps[lane]
        branch.stamps[lane] = next(self._numbers)
        heapq.heappush(heap, (branch.served, branch.stamps[lane], branch))
        if len(heap) > 4 * len(parent.children) + 64:  # most are stale
            heap[:] = [(b.served, b.stamps[lane], b) for b in parent.children.values() if b.waiting[lane]]
            heapq.heapify(heap)

    def _first(self, parent: Branch, lanes: Sequence[bool]) -> Branch:
        """The branch that has been served least, of those where somebody waits whom `pop` may take."""
        heads = []
        for lane in lanes:
            heap = parent.heaps[lane]
            while heap and not (heap[0][2].waiting[lane] and heap[0][2].stamps[lane] == heap[0][1]):
                heapq.heappop(heap)
            heads += heap[:1]
        served, _, branch = min(heads)
        parent.floor = max(parent.floor, served)
        return branch

    def check(self) -> None:
        """Raises AssertionError unless the counts of what waits agree."""
        assert sum(self.root.waiting) == len(self._queued), "what waits is counted"
        for lane in (False, True):
            clients = self.root.children.values()
            for client in clients:
                below = sum(branch.waiting[lane] for branch in client.children.values())
                assert client.waiting[lane] == below, "a client's requests are counted"
            assert self.root.waiting[lane] == sum(client.waiting[lane] for client in clients)
