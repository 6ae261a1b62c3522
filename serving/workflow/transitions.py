"""Predicted transitions between agents: those that wait for their call, and counts of what really followed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from .graph_config import TransitionConfig

Edge = tuple[int, int]
_NONE: Mapping[int, float] = {}
_TINY = 1e-200  # the running product in `PendingPredictions` is normalised below this


class PendingPrediction(NamedTuple):
    """On an edge whose source has finished and whose target has not started since.

    Attributes:
        since: seconds, when the source finished.
        probability: of the edge, or 1 if the edge is known to be taken.
        initial_scale: of `PendingPredictions` when this one was added.
    """

    since: float
    probability: float
    initial_scale: float = 1.0


class PendingPredictions(dict[Edge, PendingPrediction]):
    """Predictions by (source, target) number, oldest first; changed by `add`, `remove` and `record_unpredicted` only.

    An unpredicted call replaces one of the predicted ones. It is not known which, so the validity of all predictions
    is multiplied by the same factor: one running product serves thousands of them.

    Args:
        min_validity: predictions below it are dropped.
    """

    def __init__(self, min_validity: float = TransitionConfig.min_validity) -> None:
        super().__init__()
        self.min_validity = min_validity
        self.source_counts: dict[int, int] = {}
        self._scale = 1.0  # the product of the factors of all unpredicted calls

    def add(self, edge: Edge, since: float, probability: float) -> None:
        """Adds a prediction, or replaces the one on that edge."""
        self.remove(edge)
        self[edge] = PendingPrediction(since, probability, self._scale)
        self.source_counts[edge[0]] = self.source_counts.get(edge[0], 0) + 1

    def remove(self, edge: Edge) -> bool:
        if self.pop(edge, None) is None:
            return False
        self.source_counts[edge[0]] -= 1
        if not self.source_counts[edge[0]]:
            del self.source_counts[edge[0]]
        return True

    def only_source(self) -> int | None:
        """The source of all predictions; None if there are several, or no predictions."""
        return next(iter(self.source_counts)) if len(self.source_counts) == 1 else None

    def validity(self, prediction: PendingPrediction) -> float:
        """Probability that no unpredicted call has replaced the predicted one."""
        return self._scale / prediction.initial_scale

    def record_unpredicted(self) -> list[Edge]:
        """An unpredicted call replaced one of the predicted ones: that of any source, with equal probability.

        Returns:
            The edges whose predictions are to be removed, because their validity is below `min_validity`.
        """
        if len(self.source_counts) < 2:
            return list(self)
        self._scale *= 1 - 1 / len(self.source_counts)
        if self._scale < _TINY:
            for edge, prediction in self.items():
                self[edge] = prediction._replace(initial_scale=prediction.initial_scale / self._scale)
            self._scale = 1.0
        invalid = []
        for edge, prediction in self.items():
            if self.validity(prediction) >= self.min_validity:
                break
            invalid.append(edge)
        return invalid


class TransitionCounts:
    """Decayed counts of observed successors, by the agents' numbers.

    The reuse model blends declared edge weights with these counts. Of each successor without a declared edge one
    observation is attributed to chance and the rest counts as a habit: otherwise random calls would leave traces where
    they have just been.

    Attributes:
        drift: sum of the changes of transition probabilities since the reader last set it to 0.
        unpredicted, repeats: decayed numbers of unpredicted calls, and of those that called the same agent again.
    """

    def __init__(self, config: TransitionConfig | None = None) -> None:
        self.config = config or TransitionConfig()
        self.drift = self.unpredicted = self.repeats = 0.0
        self._counts: dict[int, dict[int, float]] = {}
        self._sources: dict[int, set[int]] = {}  # of each target, so that `forget` is fast

    def record(self, source: int, target: int, predicted: float) -> None:
        """A call of `target` followed one of `source`; `predicted` is the probability that the graph gave it."""
        decay, edge_weight = self.config.decay, self.config.edge_weight
        counts = self._counts.setdefault(source, {})
        total = edge_weight + sum(counts.values())
        self.drift += (1 - (edge_weight * predicted + counts.get(target, 0.0)) / total) / (total + 1)
        for other in counts:
            counts[other] *= decay
        counts[target] = counts.get(target, 0.0) + 1.0
        self._sources.setdefault(target, set()).add(source)
        if len(counts) > self.config.max_successors:
            rarest = min(counts, key=lambda other: (other == target, counts[other]))
            del counts[rarest]
            self._sources[rarest].discard(source)

    def record_unpredicted(self, repeats: bool) -> None:
        """A call came that nothing predicted; `repeats`: of the agent that had just been called."""
        self.unpredicted = self.config.decay * self.unpredicted + 1.0
        self.repeats = self.config.decay * self.repeats + repeats

    def repeat_factor(self, agents: int) -> float:
        """How many times as likely as another one of `agents` the last called agent is in an unpredicted call."""
        prior = self.config.repeat_prior
        return (self.repeats * agents + prior) / (self.unpredicted + prior)

    def counts(self, source: int, declared: Collection[int]) -> dict[int, float]:
        """Counts by successor of `source`; one less for those without a `declared` edge."""
        counts = self._counts.get(source, _NONE)
        return {
            target: n if target in declared else n - 1 for target, n in counts.items() if target in declared or n > 1
        }

    def is_habit(self, source: int, target: int) -> bool:
        return self._counts.get(source, _NONE).get(target, 0.0) > 1

    def forget(self, node: int) -> None:
        """Removes an agent; its number may be reused for another one."""
        for target in self._counts.pop(node, _NONE):
            self._sources[target].discard(node)
        for source in self._sources.pop(node, ()):
            self._counts[source].pop(node, None)
