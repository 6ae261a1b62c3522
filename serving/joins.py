"""The least solution of a graph of AND and OR joins from nothing: by arrays, and by the bare definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
