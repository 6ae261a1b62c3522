"""Distances in a graph of AND and OR joins: incremental, by arrays, and by the bare definition.

The distance of a node is 0 at a source; elsewhere it is the minimum (OR) or the maximum (AND) over its predecessors of
their distance plus the weight of the edge, and infinity beyond the horizon. Weights are positive, so every finite
distance rests on smaller ones and there is one solution, with cycles too.

`JoinSolver` keeps the distances up to date and touches only the nodes that a change reaches, by the algorithm of
Ramalingam and Reps (An incremental algorithm for a generalization of the shortest-path problem, J. Algorithms 21, 1996,
section 4), which takes any batch of changes at once: inconsistent nodes lie in a heap, keyed by the smaller of their
old and new distances. Where a change reaches too many nodes, `EdgeArrays` solves the whole graph. `solve_naively` is
the twin of both for tests.
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


class JoinSolution(NamedTuple):
    """Float64 arrays `(nodes,)`, except `deciding`, which is int64.

    Attributes:
        distance: 0 for a source, elsewhere `joined`.
        joined: the join over the predecessors.
        deciding: number of predecessors that are the nearest of an OR, or infinitely far from an AND.
    """

    distance: np.ndarray
    joined: np.ndarray
    deciding: np.ndarray


class _IncomingEdges:
    """The edges into all nodes with one kind of join, sorted by target."""

    def __init__(self, nodes: list[int], predecessors: Sequence[dict[int, float]]) -> None:
        self.nodes = np.array(nodes, dtype=np.int64)
        self.counts = np.array([len(predecessors[node]) for node in nodes], dtype=np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self.start_of = dict(zip(nodes, self.starts.tolist(), strict=True))
        total = int(self.counts.sum())
        rows = [predecessors[node] for node in nodes]
        self.sources = np.fromiter(chain.from_iterable(rows), np.int64, total)
        self.weights = np.fromiter(chain.from_iterable(row.values() for row in rows), np.float64, total)


class EdgeArrays:
    """A snapshot of edges and kinds of joins as arrays; make a new one after either has changed."""

    def __init__(self, predecessors: Sequence[dict[int, float]], is_and: Sequence[bool]) -> None:
        self.predecessors = predecessors
        joins = [node for node, row in enumerate(predecessors) if row]
        self.into_or = _IncomingEdges([node for node in joins if not is_and[node]], predecessors)
        self.into_and = _IncomingEdges([node for node in joins if is_and[node]], predecessors)

    def solve(self, is_source: Sequence[bool], satisfied: Sequence[set[int]], horizon: float) -> JoinSolution:
        """Relaxes all edges in rounds, from infinity down, until nothing changes."""
        source = np.array(is_source, dtype=bool)
        distance, joined = np.where(source, 0.0, INF), np.full(len(source), INF)
        groups = [
            (edges, reduce, self._satisfied_places(edges, satisfied))
            for edges, reduce in ((self.into_or, np.minimum), (self.into_and, np.maximum))
            if len(edges.nodes)
        ]

        def path_lengths(edges: _IncomingEdges, satisfied_places: np.ndarray) -> np.ndarray:
            found = distance[edges.sources] + edges.weights
            found[satisfied_places] = 0.0
            found[found > horizon] = INF
            return found

        while True:
            for edges, reduce, places in groups:
                joined[edges.nodes] = reduce.reduceat(path_lengths(edges, places), edges.starts)
            after = np.where(source, 0.0, joined)
            if np.array_equal(after, distance):
                break
            distance = after
        deciding = np.zeros(len(source), dtype=np.int64)
        for edges, _, places in groups:
            limit = INF if edges is self.into_and else np.repeat(joined[edges.nodes], edges.counts)
            deciding[edges.nodes] = np.add.reduceat(path_lengths(edges, places) == limit, edges.starts, dtype=np.int64)
        return JoinSolution(distance, joined, deciding)

    def _satisfied_places(self, edges: _IncomingEdges, satisfied: Sequence[set[int]]) -> np.ndarray:
        places = []
        for node, predecessors in enumerate(satisfied):
            if predecessors and node in edges.start_of:
                order = {p: place for place, p in enumerate(self.predecessors[node])}
                places += [edges.start_of[node] + order[p] for p in predecessors]
        return np.array(places, dtype=np.int64)


def solve_naively(
    predecessors: Sequence[dict[int, float]], is_and: Sequence[bool], is_source: Sequence[bool],
    satisfied: Sequence[set[int]], horizon: float = INF,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Applies the definition to every node until nothing changes; returns the distances and the joins."""
    distance = [0.0 if source else INF for source in is_source]
    while True:
        joined = []
        for node, row in enumerate(predecessors):
            lengths = [0.0 if p in satisfied[node] else distance[p] + weight for p, weight in row.items()]
            join = (max(lengths) if is_and[node] else min(lengths)) if lengths else INF
            joined.append(join if join <= horizon else INF)
        after = [0.0 if source else join for source, join in zip(is_source, joined, strict=True)]
        if after == distance:
            return distance, joined
        distance = after


class JoinSolver:
    """Maintains distances under edits; nodes are small integers returned by `add_node`.

    Edits are cheap; the next read propagates them.

    Args:
        horizon: larger distances are infinite.
        update_limit: nodes that one read updates one by one; a change that reaches more is solved by arrays.
    Attributes:
        predecessors, successors: for each node, the weight of each edge by its other end.
        satisfied: for each node, the predecessors it no longer waits for: their edges count as distance 0.
        nodes_updated: since the solver was made, a measure of its work.

    Raises:
        ValueError: the horizon is not above 0.
    """

    def __init__(self, horizon: float = INF, update_limit: int = 300) -> None:
        if not horizon > 0:
            raise ValueError(f"got the horizon {horizon}; accepted: a number above 0")
        self.horizon = min(horizon, sys.float_info.max)  # so that infinity is beyond it
        self.update_limit = update_limit
        self.predecessors: list[dict[int, float]] = []
        self.successors: list[dict[int, float]] = []
        self.is_and: list[bool] = []
        self.satisfied: list[set[int]] = []
        self.is_source: list[bool] = []
        self.nodes_updated = 0
        self._distance: list[float] = []
        self._joined: list[float] = []  # the join over the predecessors, also of sources
        self._deciding: list[int] = []  # see `JoinSolution.deciding`
        self._free: list[int] = []  # removed nodes, to be reused
        self._arrays: EdgeArrays | None = None
        self._stale: set[int] = set()  # edited since the last read
        self._drained: dict[int, tuple[float, float]] = {}  # values at the last `drain` of nodes updated since

    def add_node(self, is_and: bool = False) -> int:
        if self._free:
            node = self._free.pop()
            self.is_and[node] = is_and
            self._arrays = None
            return node
        for column, empty in (
            (self.predecessors, {}), (self.successors, {}), (self.is_and, is_and), (self.satisfied, set()),
            (self.is_source, False), (self._distance, INF), (self._joined, INF), (self._deciding, 0),
        ):  # fmt: skip
            column.append(empty)  # type: ignore[arg-type]
        self._arrays = None
        return len(self.is_and) - 1

    def remove_node(self, node: int) -> None:
        """Removes it and its edges. `add_node` reuses the number, so call `drain` first."""
        for other in list(self.predecessors[node]):
            self.remove_edge(other, node)
        for other in list(self.successors[node]):
            self.remove_edge(node, other)
        self.is_source[node] = False
        self._stale.discard(node)
        self._distance[node] = self._joined[node] = INF
        self._drained.pop(node, None)
        self._free.append(node)

    def set_join(self, node: int, is_and: bool) -> None:
        self.is_and[node] = is_and
        self._arrays = None
        self._stale.add(node)

    def set_edge(self, source: int, target: int, weight: float = 1.0) -> None:
        """Adds the edge or changes its weight, which must be positive."""
        assert weight > 0
        self.predecessors[target][source] = weight
        self.successors[source][target] = weight
        self._arrays = None
        self._stale.add(target)

    def remove_edge(self, source: int, target: int) -> None:
        """Removes the edge, which must exist."""
        del self.predecessors[target][source], self.successors[source][target]
        self.satisfied[target].discard(source)
        self._arrays = None
        self._stale.add(target)

    def satisfy(self, source: int, target: int, yes: bool = True) -> None:
        """Sets whether `target` no longer waits for `source`."""
        (self.satisfied[target].add if yes else self.satisfied[target].discard)(source)
        self._stale.add(target)

    def set_source(self, node: int, yes: bool = True) -> None:
        """Sets whether the distance of `node` is 0 whatever leads to it."""
        self.is_source[node] = yes
        self._stale.add(node)

    def distance(self, node: int) -> float:
        """Steps from the nearest source (0: it is one), through the joins."""
        if self._stale:
            self._propagate()
        return self._distance[node]

    def next_distance(self, node: int) -> float:
        """The join over the predecessors: for a source, the distance to its next turn."""
        if self._stale:
            self._propagate()
        return self._joined[node]

    def drain(self) -> list[int]:
        """The nodes whose distance or next distance differs from the one at the last call."""
        self._propagate()
        changed = [n for n, old in self._drained.items() if old != (self._distance[n], self._joined[n])]
        self._drained.clear()
        return changed

    def solve(self) -> None:
        """Discards all distances and prepared arrays and solves the whole graph."""
        self._arrays = None
        self._solve()

    def _solve(self) -> None:
        """Solves the whole graph; edges are only read again if they have changed."""
        self._stale.clear()
        if self._arrays is None:
            self._arrays = EdgeArrays(self.predecessors, self.is_and)
        distance, joined, deciding = self._arrays.solve(self.is_source, self.satisfied, self.horizon)
        changed = (distance != np.array(self._distance)) | (joined != np.array(self._joined))
        for node in np.flatnonzero(changed).tolist():
            self._drained.setdefault(node, (self._distance[node], self._joined[node]))
        self._distance, self._joined, self._deciding = distance.tolist(), joined.tolist(), deciding.tolist()

    def _propagate(self) -> None:
        # No `LazyHeap`: an entry is valid if its key is still that of the node's present distances, which is cheaper.
        if not self._stale:
            return
        heap: list[tuple[float, int]] = []
        distance, joined, drained = self._distance, self._joined, self._drained
        for node in self._stale:
            drained.setdefault(node, (distance[node], joined[node]))
            joined[node] = self._join(node)
            self._enqueue(node, heap)
        self._stale.clear()
        last = self.nodes_updated + self.update_limit
        while heap:
            key, node = heappop(heap)
            wanted = 0.0 if self.is_source[node] else joined[node]
            old = distance[node]
            if wanted == old or key != min(wanted, old):
                continue  # superseded by a later entry
            if self.nodes_updated == last:
                return self._solve()
            self.nodes_updated += 1
            # A smaller distance is final. A larger one first becomes infinite for its successors, then is set.
            distance[node] = wanted if wanted < old else INF
            self._update_successors(node, old, heap)
            self._enqueue(node, heap)

    def _enqueue(self, node: int, heap: list[tuple[float, int]]) -> None:
        """Queues `node` if its distance differs from what its join implies."""
        wanted, old = 0.0 if self.is_source[node] else self._joined[node], self._distance[node]
        if wanted != old:
            heappush(heap, (min(wanted, old), node))

    def _update_successors(self, node: int, old: float, heap: list[tuple[float, int]]) -> None:
        """Updates the joins of the successors of `node`, whose distance was `old`."""
        distance, joined, is_and, is_source = self._distance, self._joined, self.is_and, self.is_source
        new, horizon, deciding, drained = distance[node], self.horizon, self._deciding, self._drained
        for target, weight in self.successors[node].items():
            join, was, now = joined[target], old + weight, new + weight
            if is_and[target]:
                if was <= horizon and now <= horizon and (join == INF or (was < join and now <= join)):
                    continue  # finite before and after, and another predecessor decides
                after = self._and_join(target, node, was, now)
            elif now < join:
                if now > horizon:
                    continue
                after, deciding[target] = now, 1
            elif was == now:
                continue
            elif now == join:
                deciding[target] += 1
                continue
            elif was == join:  # the nearest moved away; nothing changes if others are as near
                deciding[target] -= 1
                if deciding[target]:
                    continue
                after = self._join(target)
            else:
                continue
            if after != join:
                at = distance[target]
                if target not in drained:
                    drained[target] = at, join
                joined[target] = after
                if after != at and not is_source[target]:
                    heappush(heap, (after if after < at else at, target))

    def _and_join(self, target: int, node: int, was: float, now: float) -> float:
        """The new join of an AND after the path over `node` changed from `was` to `now`."""
        join = self._joined[target]
        if node in self.satisfied[target]:
            return join
        was, now = was if was <= self.horizon else INF, now if now <= self.horizon else INF
        self._deciding[target] += (now == INF) - (was == INF)
        if self._deciding[target]:
            return INF
        if now > join:
            return now
        return self._join(target) if was == join != now else join  # only the farthest decides

    def _join(self, node: int) -> float:
        """The join over all predecessors; updates `_deciding`."""
        predecessors, distance, horizon = self.predecessors[node], self._distance, self.horizon
        if satisfied := self.satisfied[node]:
            lengths = [0.0 if p in satisfied else distance[p] + weight for p, weight in predecessors.items()]
        else:
            lengths = [distance[p] + weight for p, weight in predecessors.items()]
        if self.is_and[node]:
            self._deciding[node] = sum(length > horizon for length in lengths)
            return INF if self._deciding[node] else max(lengths, default=INF)
        join = min(lengths, default=INF)
        self._deciding[node] = lengths.count(join)
        return join if join <= horizon else INF
