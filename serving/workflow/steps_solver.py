"""The least solution of a graph of AND and OR joins from nothing: by arrays, and by the bare definition.

Distances in a graph of AND and OR joins, kept up to date by touching only what a change reaches.

The distance of a node is 0 at a source; elsewhere it is the smallest (OR) or the largest (AND) over its predecessors of
their distance plus the weight of the edge, and infinity beyond the horizon. Weights are positive, so every finite
distance rests on smaller ones and there is one solution, with cycles too. Changes spread by the algorithm of
Ramalingam and Reps (An incremental algorithm for a generalization of the shortest-path problem, J. Algorithms 21, 1996,
section 4), which takes any batch of changes at once; a node that is waiting to be looked at lies in a heap by the
smaller of its old and its new distance.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import chain
from typing import NamedTuple

import numpy as np

INF = math.inf


class Solution(NamedTuple):
    """Of each node, float64 `(nodes,)` except `deciding`, int64.

    Attributes:
        distance: 0 for a source, elsewhere `joined`.
        joined: the join over the predecessors.
        deciding: how many predecessors are the nearest of an OR, or infinitely far from an AND.
    """

    distance: np.ndarray
    joined: np.ndarray
    deciding: np.ndarray


class _Side:
    """The edges into the nodes of one kind of join, sorted by their target."""

    def __init__(self, nodes: list[int], predecessors: Sequence[dict[int, float]]) -> None:
        self.nodes = np.array(nodes, dtype=np.int64)
        self.counts = np.array([len(predecessors[node]) for node in nodes], dtype=np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self.start_of = dict(zip(nodes, self.starts.tolist(), strict=True))
        total = int(self.counts.sum())
        rows = [predecessors[node] for node in nodes]
        self.sources = np.fromiter(chain.from_iterable(rows), np.int64, total)
        self.weights = np.fromiter(chain.from_iterable(row.values() for row in rows), np.float64, total)


class EdgeTable:
    """A snapshot of the edges and of the kinds of joins; use a fresh one after either has changed."""

    def __init__(self, predecessors: Sequence[dict[int, float]], is_and: Sequence[bool]) -> None:
        self.predecessors = predecessors
        joins = [node for node, row in enumerate(predecessors) if row]
        self.any_of = _Side([node for node in joins if not is_and[node]], predecessors)
        self.all_of = _Side([node for node in joins if is_and[node]], predecessors)

    def solve(self, is_source: Sequence[bool], satisfied: Sequence[set[int]], horizon: float) -> Solution:
        """Round after round over all edges, from infinity down, until nothing changes."""
        source = np.array(is_source, dtype=bool)
        distance, joined = np.where(source, 0.0, INF), np.full(len(source), INF)
        sides = [
            (side, reduce, self._free(side, satisfied))
            for side, reduce in ((self.any_of, np.minimum), (self.all_of, np.maximum))
            if len(side.nodes)
        ]

        def ways(side: _Side, free: np.ndarray) -> np.ndarray:
            found = distance[side.sources] + side.weights
            found[free] = 0.0
            found[found > horizon] = INF
            return found

        while True:
            for side, reduce, free in sides:
                joined[side.nodes] = reduce.reduceat(ways(side, free), side.starts)
            after = np.where(source, 0.0, joined)
            if np.array_equal(after, distance):
                break
            distance = after
        deciding = np.zeros(len(source), dtype=np.int64)
        for side, _, free in sides:
            decides = ways(side, free) == (INF if side is self.all_of else np.repeat(joined[side.nodes], side.counts))
            deciding[side.nodes] = np.add.reduceat(decides, side.starts, dtype=np.int64)
        return Solution(distance, joined, deciding)

    def _free(self, side: _Side, satisfied: Sequence[set[int]]) -> np.ndarray:
        """Where in `side` the edges lie that ask for nothing any more."""
        places = []
        for node, predecessors in enumerate(satisfied):
            if predecessors and node in side.start_of:
                order = {p: place for place, p in enumerate(self.predecessors[node])}
                places += [side.start_of[node] + order[p] for p in predecessors]
        return np.array(places, dtype=np.int64)


def solve_naively(
    predecessors: Sequence[dict[int, float]],
    is_and: Sequence[bool],
    is_source: Sequence[bool],
    satisfied: Sequence[set[int]],
    horizon: float = INF,
) -> tuple[list[float], list[float]]:
    """Distances and joins by applying the definition to every node until nothing changes; the twin to test against."""
    distance = [0.0 if source else INF for source in is_source]
    while True:
        joined = []
        for node, row in enumerate(predecessors):
            ways = [0.0 if p in satisfied[node] else distance[p] + weight for p, weight in row.items()]
            join = (max(ways) if is_and[node] else min(ways)) if ways else INF
            joined.append(join if join <= horizon else INF)
        after = [0.0 if source else join for source, join in zip(is_source, joined, strict=True)]
        if after == distance:
            return distance, joined
        distance = after


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
