"""What has followed whose calls: a declared graph is believed the less, the more calls have been seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping

TRUST = 8.0  # calls of an agent that its edges count as much as
FADING = 0.98  # of what was seen, with every further call
DOUBT = 2.0  # surprises that it counts as much as, that any agent is as likely to be one
MOST = 32  # successors of an agent that are counted; beyond, the least frequent is forgotten
_NONE: Mapping[int, float] = {}


class Followed:
    """Decayed counts of successors, by the agents' numbers.

    Of an agent whose calls lead elsewhere than its edges say, one time is put down to chance and the rest is a habit.
    Without that, what goes anywhere would leave its traces where it has just been.

    Attributes:
        moved: by how much the chances that follow from the counts have changed since it was last set to 0, in all.
        surprises, repeats: decayed numbers of calls that nothing foretold, and of those among them that were of the
            agent that had just been called.
    """

    def __init__(self) -> None:
        self._counts: dict[int, dict[int, float]] = {}
        self._sources: dict[int, set[int]] = {}  # of each target, so that nobody else is asked when it goes
        self.moved = self.surprises = self.repeats = 0.0

    def surprised(self, repeats: bool) -> None:
        """A call has come that nothing foretold, perhaps of the agent that had just been called."""
        self.surprises = FADING * self.surprises + 1.0
        self.repeats = FADING * self.repeats + repeats

    def repeating(self, agents: int) -> float:
        """How many times as likely as another of so many agents the last one is to be a surprise."""
        return (self.repeats * agents + DOUBT) / (self.surprises + DOUBT)

    def saw(self, source: int, target: int, told: float) -> None:
        """A call of `target` has followed one of `source`; `told` is the chance that the graph gives it."""
        counts = self._counts.setdefault(source, {})
        total = TRUST + sum(counts.values())
        self.moved += (1 - (TRUST * told + counts.get(target, 0.0)) / total) / (total + 1)
        for other in counts:
            counts[other] *= FADING
        counts[target] = counts.get(target, 0.0) + 1.0
        self._sources.setdefault(target, set()).add(source)
        if len(counts) > MOST:
            rarest = min(counts, key=lambda other: (other == target, counts[other]))
            del counts[rarest]
            self._sources[rarest].discard(source)

    def counts(self, source: int, named: Collection[int]) -> dict[int, float]:
        """How often each agent has followed `source`; of those that no edge names, how often again."""
        counts = self._counts.get(source, _NONE)
        return {target: n if target in named else n - 1 for target, n in counts.items() if target in named or n > 1}

    def again(self, source: int, target: int) -> bool:
        """Whether `target` has followed `source` more than once."""
        return self._counts.get(source, _NONE).get(target, 0.0) > 1

    def forget(self, node: int) -> None:
        """It is none of the workflow's agents any more; its number may be another's from now on."""
        for target in self._counts.pop(node, _NONE):
            self._sources[target].discard(node)
        for source in self._sources.pop(node, ()):
            self._counts[source].pop(node, None)
