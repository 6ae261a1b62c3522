"""The evictable nodes of a tier in the order of their eviction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from itertools import count

from ..lazy_heap import LazyHeap
from .agent_index import AgentGroup, AgentIndex
from .base import Tier
from .eviction_policy import EvictionPolicy, Rank
from .radix_tree import Node

Entry = tuple[Rank, int, Node]  # local rank, number of the entry, node


class EvictionQueue:
    """The evictable nodes of one tier, smallest rank first.

    Each group has a heap of its nodes by `EvictionPolicy.local`; a heap over the groups holds, for each, a lower bound
    of the rank of its first node: exact after an event that lowers the rank, corrected when the group reaches the top
    after one that raised it. Adding, using or evicting a node costs O(log n) amortised; a new value of a group
    O(log n) whatever the number of its nodes. The value of the unowned group falls with time, so that group is compared
    at every choice.

    The heaps of nodes are written out instead of using `LazyHeap`: a node may have changed groups since its entry was
    pushed, and a number kept on the node invalidates the entry without knowing which heap it is in, and without a
    dictionary for each of many small groups.

    Called under the cache's lock.
    """

    def __init__(self, tier: Tier, policy: EvictionPolicy, agent_index: AgentIndex, now: Callable[[], float]) -> None:
        self.tier, self.policy, self._now = tier, policy, now
        self._unowned = agent_index.unowned
        self._nodes: dict[AgentGroup, list[Entry]] = {}
        self._groups: LazyHeap[AgentGroup] = LazyHeap()
        self._numbers = count(1)
        self._num_entries = 0  # of all groups, stale ones included
        self._num_nodes = 0

    def __len__(self) -> int:
        return self._num_nodes

    def update(self, node: Node) -> None:
        """Reads everything about `node` again: whether it is evictable, its rank and its group."""
        if not node.evictable(self.tier):
            self.remove(node)
            return
        self._num_nodes += node.queue_entries[self.tier] == 0
        number = node.queue_entries[self.tier] = next(self._numbers)
        group = node.group if self.policy.uses_agents else self._unowned
        heappush(self._nodes.setdefault(group, []), (self.policy.local(node, self.tier), number, node))
        self._num_entries += 1
        self._lower_bound(group)
        if self._num_entries > 4 * self._num_nodes + 256:  # most are stale
            self._rebuild()

    def remove(self, node: Node) -> None:
        """`node` is not evictable (any more); its entry becomes stale."""
        self._num_nodes -= node.queue_entries[self.tier] != 0
        node.queue_entries[self.tier] = 0

    def groups_changed(self, groups: Iterable[AgentGroup]) -> None:
        nodes, lower_bound = self._nodes, self._lower_bound
        for group in groups:
            if group in nodes:
                lower_bound(group)

    def first(self) -> Node | None:
        """The next victim, which stays in the queue."""
        found = self._first()
        return None if found is None else found[1]

    def first_rank(self) -> Rank | None:
        found = self._first()
        return None if found is None else found[0]

    def first_replicated(self) -> Node | None:
        """The first, among the first nodes of all groups, that another tier has as well; O(number of groups)."""
        tops = (entry[2] for group in list(self._nodes) if (entry := self._top(group)) is not None)
        return min((node for node in tops if node.is_replicated), key=self.rank, default=None)

    def has_unowned(self, nbytes: int) -> bool:
        """Whether the evictable nodes in nobody's fixed prompt have at least `nbytes` in the tier."""
        for _, number, node in self._nodes.get(self._unowned, ()) if nbytes > 0 else ():
            if node.queue_entries[self.tier] == number and not node.fixed:
                nbytes -= node.allocated[self.tier]
                if nbytes <= 0:
                    break
        return nbytes <= 0

    def rank(self, node: Node) -> Rank:
        """The rank of `node`, evictable or not."""
        group = node.group if self.policy.uses_agents else self._unowned
        return self.policy.rank(self._value(group), self.policy.local(node, self.tier))

    def _first(self) -> tuple[Rank, Node] | None:
        best = self._first_owned()
        top = self._top(self._unowned)
        if top is not None:
            rank = self.policy.rank(self._value(self._unowned), top[0])
            if best is None or rank <= best[0]:
                return rank, top[2]
        return best

    def _first_owned(self) -> tuple[Rank, Node] | None:
        groups = self._groups
        while (bound := groups.peek_entry()) is not None:
            group = bound[2]
            top = self._top(group)
            if top is None:
                continue  # the group is empty, and left the heap
            rank = self.policy.rank(group.value, top[0])
            if rank == bound[0]:
                return rank, top[2]
            groups.push(group, rank)
        return None

    def _value(self, group: AgentGroup) -> float:
        return self.policy.unowned_value(self._now()) if group is self._unowned else group.value

    def _top(self, group: AgentGroup) -> Entry | None:
        """The first valid entry of a group; stale ones before it are dropped, and the group if nothing is left."""
        heap = self._nodes.get(group)
        if heap is None:
            return None
        while heap and heap[0][2].queue_entries[self.tier] != heap[0][1]:
            heappop(heap)
            self._num_entries -= 1
        if heap:
            return heap[0]
        del self._nodes[group]
        self._groups.discard(group)
        return None

    def _lower_bound(self, group: AgentGroup) -> None:
        """Lowers the bound of a group to the rank of its first node if that is below it."""
        top = None if group is self._unowned else self._top(group)
        if top is None:
            return
        rank, bound = self.policy.rank(group.value, top[0]), self._groups.entries.get(group)
        if bound is None or rank < bound[0]:
            self._groups.push(group, rank)

    def _rebuild(self) -> None:
        """Drops all stale entries; paid for by the updates that left them."""
        for group in tuple(self._nodes):
            heap = [entry for entry in self._nodes[group] if entry[2].queue_entries[self.tier] == entry[1]]
            heapify(heap)
            self._nodes[group] = heap
            self._top(group)
        self._num_entries = sum(map(len, self._nodes.values()))

    def check(self, nodes: Iterable[Node]) -> None:
        """Raises AssertionError unless the queue has exactly the evictable among all `nodes`, the smallest rank first.

        The policy must be one whose `local` does not depend on time.
        """
        evictable = [node for node in nodes if node.evictable(self.tier)]
        entered = {id(e[2]) for heap in self._nodes.values() for e in heap if e[2].queue_entries[self.tier] == e[1]}
        assert entered == {id(node) for node in evictable}, "the queue has the evictable nodes"
        assert self._num_nodes == len(evictable), "queued nodes are counted"
        if evictable:
            clock, now = self._now, self._now()
            self._now = lambda: now  # on a running clock, ranks would change while they are compared
            try:
                lowest = min(map(self.rank, evictable))
                assert self.first_rank() == lowest, "the first node has the lowest rank"
            finally:
                self._now = clock
