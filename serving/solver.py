"""Distances in a graph of AND and OR joins, kept up to date by touching only what a change reaches.

The distance of a node is 0 at a source; elsewhere it is the smallest (OR) or the largest (AND) over its predecessors of
their distance plus the weight of the edge, and infinity beyond the horizon. Weights are positive, so every finite
distance rests on smaller ones and there is one solution, with cycles too. Changes spread by the algorithm of
Ramalingam and Reps (An incremental algorithm for a generalization of the shortest-path problem, J. Algorithms 21, 1996,
section 4), which takes any batch of changes at once; a node that is waiting to be looked at lies in a heap by the
smaller of its old and its new distance.
"""

from __future__ import annotations

import sys
from heapq import heappop, heappush

import numpy as np

from .joins import INF, EdgeTable


class JoinSolver:
    """Nodes are small integers that `add_node` hands out; edits are cheap and the next read spreads them.

    Args:
        horizon: larger distances are infinite.
        patience: nodes that one read looks at one by one; where a change reaches more, all are solved anew.
    Attributes:
        predecessors, successors: of each node, the other end of each edge and its weight.
        steps_taken: nodes looked at since the solver was made, the measure of its work.
    """

    def __init__(self, horizon: float = INF, patience: int = 300) -> None:
        if not horizon > 0:
            raise ValueError(f"got the horizon {horizon}; accepted: a number above 0")
        self.horizon = min(horizon, sys.float_info.max)  # so that infinity is beyond it
        self.patience = patience
        self.predecessors: list[dict[int, float]] = []
        self.successors: list[dict[int, float]] = []
        self.is_and: list[bool] = []
        self.satisfied: list[set[int]] = []  # predecessors whose edge asks for nothing any more: they count as 0
        self.is_source: list[bool] = []
        self.steps_taken = 0
        self._distance: list[float] = []
        self._joined: list[float] = []  # the join over the predecessors, whether or not the node is a source
        self._deciding: list[int] = []  # predecessors that are the nearest of an OR, or infinitely far from an AND
        self._free: list[int] = []
        self._table: EdgeTable | None = None
        self._stale: set[int] = set()  # edited since the last read
        self._before: dict[int, tuple[float, float]] = {}  # of nodes touched since `drain`, what it saw last

    def add_node(self, is_and: bool = False) -> int:
        if self._free:
            node = self._free.pop()
            self.is_and[node] = is_and
            self._table = None
            return node
        for column, empty in (
            (self.predecessors, {}),
            (self.successors, {}),
            (self.is_and, is_and),
            (self.satisfied, set()),
            (self.is_source, False),
            (self._distance, INF),
            (self._joined, INF),
            (self._deciding, 0),
        ):
            column.append(empty)  # type: ignore[arg-type]
        self._table = None
        return len(self.is_and) - 1

    def remove_node(self, node: int) -> None:
        """Its edges go as well; its number will be given to another node, so take the changes (`drain`) first."""
        for other in list(self.predecessors[node]):
            self.remove_edge(other, node)
        for other in list(self.successors[node]):
            self.remove_edge(node, other)
        self.is_source[node] = False
        self._stale.discard(node)
        self._distance[node] = self._joined[node] = INF
        self._before.pop(node, None)
        self._free.append(node)

    def set_join(self, node: int, is_and: bool) -> None:
        self.is_and[node] = is_and
        self._table = None
        self._stale.add(node)

    def set_edge(self, source: int, target: int, weight: float = 1.0) -> None:
        """Add the edge, or give it another weight, which must be positive."""
        assert weight > 0
        self.predecessors[target][source] = weight
        self.successors[source][target] = weight
        self._table = None
        self._stale.add(target)

    def remove_edge(self, source: int, target: int) -> None:
        del self.predecessors[target][source], self.successors[source][target]
        self.satisfied[target].discard(source)
        self._table = None
        self._stale.add(target)

    def satisfy(self, source: int, target: int, yes: bool = True) -> None:
        """Say that `target` no longer waits for `source`, or that it does again."""
        (self.satisfied[target].add if yes else self.satisfied[target].discard)(source)
        self._stale.add(target)

    def set_source(self, node: int, yes: bool = True) -> None:
        self.is_source[node] = yes
        self._stale.add(node)

    def distance(self, node: int) -> float:
        """0 for a source."""
        if self._stale:
            self._spread()
        return self._distance[node]

    def next_distance(self, node: int) -> float:
        """The join over the predecessors: for a source, the distance of its next turn."""
        if self._stale:
            self._spread()
        return self._joined[node]

    def drain(self) -> list[int]:
        """The nodes whose distance or next distance differs from what it was at the last call."""
        self._spread()
        changed = [n for n, old in self._before.items() if old != (self._distance[n], self._joined[n])]
        self._before.clear()
        return changed

    def solve(self) -> None:
        """Forget all distances and all that was prepared, and find them anew."""
        self._table = None
        self._solve()

    def _solve(self) -> None:
        """All nodes at once; of use to `_spread` as well, since the edges are read only if they have changed."""
        self._stale.clear()
        if self._table is None:
            self._table = EdgeTable(self.predecessors, self.is_and)
        distance, joined, deciding = self._table.solve(self.is_source, self.satisfied, self.horizon)
        changed = (distance != np.array(self._distance)) | (joined != np.array(self._joined))
        for node in np.flatnonzero(changed).tolist():
            self._before.setdefault(node, (self._distance[node], self._joined[node]))
        self._distance, self._joined, self._deciding = distance.tolist(), joined.tolist(), deciding.tolist()

    def _spread(self) -> None:
        if not self._stale:
            return
        heap: list[tuple[float, int]] = []
        distance, joined, before = self._distance, self._joined, self._before
        for node in self._stale:
            before.setdefault(node, (distance[node], joined[node]))
            joined[node] = self._join(node)
            self._enqueue(node, heap)
        self._stale.clear()
        last = self.steps_taken + self.patience
        while heap:
            key, node = heappop(heap)
            wanted = 0.0 if self.is_source[node] else joined[node]
            old = distance[node]
            if wanted == old or key != min(wanted, old):
                continue  # an entry that a later one has overtaken
            if self.steps_taken == last:
                return self._solve()
            self.steps_taken += 1
            # What has come nearer is final. What has gone further is first unknown to all, then looked at again.
            distance[node] = wanted if wanted < old else INF
            self._tell_successors(node, old, heap)
            self._enqueue(node, heap)

    def _enqueue(self, node: int, heap: list[tuple[float, int]]) -> None:
        wanted, old = 0.0 if self.is_source[node] else self._joined[node], self._distance[node]
        if wanted != old:
            heappush(heap, (min(wanted, old), node))

    def _tell_successors(self, node: int, old: float, heap: list[tuple[float, int]]) -> None:
        """The distance of `node` was `old`: bring the joins of its successors up to date."""
        distance, joined, is_and, is_source = self._distance, self._joined, self.is_and, self.is_source
        new, horizon, deciding, before = distance[node], self.horizon, self._deciding, self._before
        for target, weight in self.successors[node].items():
            join, was, now = joined[target], old + weight, new + weight
            if is_and[target]:
                if was <= horizon and now <= horizon and (join == INF or (was < join and now <= join)):
                    continue  # known before and after, and others decide
                after = self._all_of(target, node, was, now)
            elif now < join:
                if now > horizon:
                    continue
                after, deciding[target] = now, 1
            elif was == now:
                continue
            elif now == join:
                deciding[target] += 1
                continue
            elif was == join:  # the nearest has gone further; if others are as near, nothing changes
                deciding[target] -= 1
                if deciding[target]:
                    continue
                after = self._join(target)
            else:
                continue
            if after != join:
                at = distance[target]
                if target not in before:
                    before[target] = at, join
                joined[target] = after
                if after != at and not is_source[target]:
                    heappush(heap, (after if after < at else at, target))

    def _all_of(self, target: int, node: int, was: float, now: float) -> float:
        """The new join of an AND, the way over `node` having changed."""
        join = self._joined[target]
        if node in self.satisfied[target]:
            return join
        was, now = was if was <= self.horizon else INF, now if now <= self.horizon else INF
        self._deciding[target] += (now == INF) - (was == INF)
        if self._deciding[target]:
            return INF
        if now > join:
            return now
        return self._join(target) if was == join != now else join  # only the farthest and the last one known decide

    def _join(self, node: int) -> float:
        predecessors, distance, horizon = self.predecessors[node], self._distance, self.horizon
        if satisfied := self.satisfied[node]:
            ways = [0.0 if p in satisfied else distance[p] + weight for p, weight in predecessors.items()]
        else:
            ways = [distance[p] + weight for p, weight in predecessors.items()]
        if self.is_and[node]:
            self._deciding[node] = sum(way > horizon for way in ways)
            return INF if self._deciding[node] else max(ways, default=INF)
        join = min(ways, default=INF)
        self._deciding[node] = ways.count(join)
        return join if join <= horizon else INF
