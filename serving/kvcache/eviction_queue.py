"""Who may be evicted from a tier, and who is first: heaps with lazy deletion, one a group and one over the groups."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import count
from typing import TYPE_CHECKING

from .base import Tier
from .eviction_policy import EvictionPolicy, Rank
from .radix_tree import AgentGroup, AgentIndex, Node

if TYPE_CHECKING:
    from collections.abc import Callable


Entry = tuple[Rank, int, Node]


class EvictionQueue:
    """The evictable nodes of one tier in an `EvictionPolicy`.

    Each group has a heap of its nodes by `EvictionPolicy.local`; a heap over the groups holds, for each, a rank that is
    not above that of its first node: exact after every event that lowers it, corrected when it comes to the top after
    one that raised it. A node that is offered, used or evicted costs O(log n) amortised; a new value of a group
    O(log n) whatever the number of its nodes. The group of nobody, whose value falls with time, is compared at every
    choice.

    Args:
        tier: whose candidates.
        order: the order.
        groups: of the nodes.
        now: the clock, seconds.
    """

    def __init__(self, tier: Tier, order: EvictionPolicy, groups: AgentIndex, now: Callable[[], float]) -> None:
        self.tier, self.order, self._now = tier, order, now
        self._nobody = groups.nobody
        self._nodes: dict[AgentGroup, list[Entry]] = {}
        self._groups: list[tuple[Rank, int, AgentGroup]] = []
        self._latest: dict[AgentGroup, tuple[Rank, int]] = {}
        self._numbers = count(1)
        self._entries = 0
        self.live = 0

    def __len__(self) -> int:
        return self.live

    def update(self, node: Node) -> None:
        """Takes note of everything about `node`: whether it may go, its place, its group."""
        if not node.evictable(self.tier):
            self.withdraw(node)
            return
        self.live += node.stamps[self.tier] == 0
        number = node.stamps[self.tier] = next(self._numbers)
        group = node.group if self.order.uses_agents else self._nobody
        heapq.heappush(self._nodes.setdefault(group, []), (self.order.local(node, self.tier), number, node))
        self._entries += 1
        self._note(group)
        if self._entries > 4 * self.live + 256:
            self._rebuild()

    def withdraw(self, node: Node) -> None:
        """`node` may not be evicted (any more); its entry is left to be found stale."""
        self.live -= node.stamps[self.tier] != 0
        node.stamps[self.tier] = 0

    def revalue(self, groups: Iterable[AgentGroup]) -> None:
        """The values of `groups` are new."""
        nodes, note = self._nodes, self._note
        for group in groups:
            if group in nodes:
                note(group)

    def first(self) -> Node | None:
        """The next victim; it stays a candidate."""
        entry = self._first()
        return None if entry is None else entry[1]

    def first_rank(self) -> Rank | None:
        """The rank of the next victim."""
        entry = self._first()
        return None if entry is None else entry[0]

    def has_loose(self, nbytes: int) -> bool:
        """Whether what belongs to no agent's fixed prompt and may go makes up that many bytes."""
        for _, number, node in self._nodes.get(self._nobody, ()) if nbytes > 0 else ():
            if node.stamps[self.tier] == number and not node.fixed:
                nbytes -= node.held[self.tier]
                if nbytes <= 0:
                    break
        return nbytes <= 0

    def first_with_another_copy(self) -> Node | None:
        """The first of the groups' firsts that some other tier has as well; takes time in proportion to the groups."""
        tops = (entry[2] for group in list(self._nodes) if (entry := self._top(group)) is not None)
        return min((node for node in tops if node.has_spare), key=self.rank, default=None)

    def rank(self, node: Node) -> Rank:
        """The rank of `node`, candidate or not."""
        group = node.group if self.order.uses_agents else self._nobody
        return self.order.rank(self._value(group), self.order.local(node, self.tier))

    def _first(self) -> tuple[Rank, Node] | None:
        best = self._first_of_agents()
        top = self._top(self._nobody)
        if top is not None:
            rank = self.order.rank(self._value(self._nobody), top[0])
            if best is None or rank <= best[0]:
                return rank, top[2]
        return best

    def _first_of_agents(self) -> tuple[Rank, Node] | None:
        groups = self._groups
        while groups:
            rank, number, group = groups[0]
            top = self._top(group) if self._latest.get(group) == (rank, number) else None
            if top is None:
                heapq.heappop(groups)  # stale, or its group is empty
                continue
            true = self.order.rank(group.value, top[0])
            if true == rank:
                return rank, top[2]
            number = next(self._numbers)
            self._latest[group] = true, number
            heapq.heapreplace(groups, (true, number, group))
        return None

    def _value(self, group: AgentGroup) -> float:
        return self.order.nobody(self._now()) if group is self._nobody else group.value

    def _top(self, group: AgentGroup) -> Entry | None:
        """The first valid entry of a group; stale ones before it are dropped, and an empty heap with them."""
        heap = self._nodes.get(group)
        if heap is None:
            return None
        while heap and heap[0][2].stamps[self.tier] != heap[0][1]:
            heapq.heappop(heap)
            self._entries -= 1
        if heap:
            return heap[0]
        del self._nodes[group]
        self._latest.pop(group, None)
        return None

    def _note(self, group: AgentGroup) -> None:
        """Enters the rank of a group's first node unless one at or below it is entered already."""
        top = None if group is self._nobody else self._top(group)
        if top is None:
            return
        rank = self.order.rank(group.value, top[0])
        latest = self._latest.get(group)
        if latest is None or rank < latest[0]:
            number = next(self._numbers)
            self._latest[group] = rank, number
            heapq.heappush(self._groups, (rank, number, group))
            if len(self._groups) > 4 * len(self._latest) + 64:  # most are stale
                self._groups = [(rank, number, g) for g, (rank, number) in self._latest.items()]
                heapq.heapify(self._groups)

    def _rebuild(self) -> None:
        """Drops all stale entries; paid for by the updates that left them."""
        for group in tuple(self._nodes):
            heap = [entry for entry in self._nodes[group] if entry[2].stamps[self.tier] == entry[1]]
            heapq.heapify(heap)
            self._nodes[group] = heap
            self._top(group)
        self._entries = sum(map(len, self._nodes.values()))

    def check(self, nodes: Iterable[Node]) -> None:
        """Raises AssertionError unless exactly the evictable among all `nodes` are candidates, and the first is first.

        The order must be one whose `local` does not depend on time.
        """
        evictable = [node for node in nodes if node.evictable(self.tier)]
        entered = {id(e[2]) for heap in self._nodes.values() for e in heap if e[2].stamps[self.tier] == e[1]}
        assert entered == {id(node) for node in evictable}, "the candidates are the evictable nodes"
        assert self.live == len(evictable), "candidates are counted"
        if evictable:
            clock, now = self._now, self._now()
            self._now = lambda: now  # on a clock that runs, ranks change while they are compared
            try:
                lowest = min(map(self.rank, evictable))
                assert self.first_rank() == lowest, "the first candidate has the lowest rank"
            finally:
                self._now = clock
