"""Which calls have been foretold and have not come yet, and what is left of that where others have come instead."""

from __future__ import annotations

from typing import NamedTuple

FAINT = 0.1  # of the probability of its edge: less is left of no mark
TINY = 1e-200  # so small may a product of chances become before it begins anew
Edge = tuple[int, int]


class Mark(NamedTuple):
    """On an edge: its source has finished (at `since`, in seconds) and its target has not started since.

    `probability` is that of the edge, or 1 if it is known to be taken. `doubts` belongs to `Marks.valid`.
    """

    since: float
    probability: float
    doubts: float = 1.0


class Marks(dict[Edge, Mark]):
    """By the agents' numbers (source, target), the oldest first; changed by `put`, `take` and `surprise` alone.

    Attributes:
        sources: those that have marks, with how many.
    """

    def __init__(self) -> None:
        super().__init__()
        self._doubts = 1.0  # the product of what each surprise has left
        self.sources: dict[int, int] = {}

    def put(self, edge: Edge, since: float, probability: float) -> None:
        """A new mark, also where there was one."""
        self.take(edge)
        self[edge] = Mark(since, probability, self._doubts)
        self.sources[edge[0]] = self.sources.get(edge[0], 0) + 1

    def take(self, edge: Edge) -> bool:
        """Removes the mark of an edge; whether there was one."""
        if self.pop(edge, None) is None:
            return False
        self.sources[edge[0]] -= 1
        if not self.sources[edge[0]]:
            del self.sources[edge[0]]
        return True

    def only_source(self) -> int | None:
        """The source of all marks; None if there are several, or no marks."""
        return next(iter(self.sources)) if len(self.sources) == 1 else None

    def valid(self, mark: Mark) -> float:
        """The chance that no other call has come instead of the one that `mark` stands for."""
        return self._doubts / mark.doubts

    def surprise(self) -> list[Edge]:
        """One of the calls that the marks stand for will not come: that of any source, with the same chance.

        Returns:
            The edges whose marks are to be taken, as nearly nothing is left of them. It takes no longer where there
            are thousands, as all become less valid by the same factor.
        """
        if len(self.sources) < 2:
            return list(self)
        self._doubts *= 1 - 1 / len(self.sources)
        if self._doubts < TINY:
            for edge, mark in self.items():
                self[edge] = mark._replace(doubts=mark.doubts / self._doubts)
            self._doubts = 1.0
        faint = []
        for edge, mark in self.items():
            if self.valid(mark) >= FAINT:
                break
            faint.append(edge)
        return faint
