"""The tuned numbers of step graphs, with units: durations, transition counts, reuse model, learned graphs, limits.

Times marked "in 1/γ" are multiples of the discount time of `StepGraph`, see `GraphConfig.discount_s`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tenure.checked import Count, OrInfinite, Positive, Range, verify


@dataclass(frozen=True)
class DurationConfig:
    """How `Duration` learns from observed waits.

    Attributes:
        memory: observations that are stored; beyond this number the running mean and variance become exponentially
            weighted with the weight 1 / memory.
        wide_spread: ratio of standard deviation to mean above which the stored observations replace the closed form.
        prior_weight: observations; what was known before counts as much as this many of them.
    """

    memory: Count = 32
    wide_spread: Positive = 0.5
    prior_weight: Positive = 3.0

    def __post_init__(self) -> None:
        verify(self)


@dataclass(frozen=True)
class TransitionConfig:
    """How much a workflow relies on its declared edges, and how it learns from observed calls.

    Attributes:
        edge_weight: calls; the declared edges of an agent count as much as this many observed transitions.
        decay: factor on older counts with every further observation, 0 to 1.
        repeat_prior: unpredicted calls; weight of the assumption that any agent is equally likely to be one.
        max_successors: observed successors stored for one agent; beyond, the least frequent is forgotten.
        accuracy_prior: calls; weight of the initial assumption that every prediction is correct.
        accuracy_memory: calls over which the share of correct predictions is averaged.
        min_validity: validity (0 to 1, see `PendingPredictions`) below which a pending prediction is dropped.
    """

    edge_weight: Positive = 8.0
    decay: Positive = 0.98
    repeat_prior: Positive = 2.0
    max_successors: Count = 32
    accuracy_prior: Count = 5
    accuracy_memory: Count = 32
    min_validity: Positive = 0.1

    def __post_init__(self) -> None:
        verify(self)


@dataclass(frozen=True)
class ReuseConfig:
    """Precision and caching of the reuse model.

    Attributes:
        tolerance: probability; fixed-point iterations stop below this change.
        max_exact_targets: agents plus edges into AND joins up to which first passages are solved exactly; larger
            workflows use the most probable path.
        drift: relative change of a duration discount, or absolute change of accuracy and transition probabilities,
            that invalidates cached first passages.
        max_age: in 1/γ; a cached result older than this is recomputed.
        min_pause: in 1/γ; a pause shorter than this is too short to load another prompt.
    """

    tolerance: Positive = 1e-6
    max_exact_targets: Count = 128
    drift: Positive = 0.01
    max_age: Positive = 0.05
    min_pause: Positive = 0.1

    def __post_init__(self) -> None:
        verify(self)


@dataclass(frozen=True)
class MarkovConfig:
    """A learned first-order Markov model (`LearnedTransitions`).

    Attributes:
        decay: factor on an agent's older counts with every further call, above 0 and at most 1; counts halve after
            ln 2 / (1 - decay) calls.
        prior: calls; weight of successors not seen yet.
        min_probability: edges with a smaller probability are removed, above 0 and below 1.
        resolution: probability; an edge is updated when its probability is off by at least this much.
        max_agents: agents remembered; beyond, the least recently called is forgotten. At least 2.
        max_successors: successors remembered for one agent; beyond, the least frequent is forgotten.
        max_sessions: open sessions; beyond, the least recently active counts as ended.
    """

    decay: Annotated[float, Range(0, 1, above=True)] = 0.98
    prior: Positive = 0.5
    min_probability: Annotated[float, Range(0, 1, above=True, below=True)] = 0.02
    resolution: Positive = 0.01
    max_agents: Annotated[int, Range(2)] = 1000
    max_successors: Count = 32
    max_sessions: Count = 10_000

    def __post_init__(self) -> None:
        verify(self)


@dataclass(frozen=True)
class GraphConfig:
    """Limits and tuned numbers of a `StepGraph`.

    Attributes:
        horizon: steps; agents farther away count as unreachable. May be infinite.
        discount_s: seconds, 1/γ; a call this far away is worth 1/e of an immediate one. None: `discount_steps` times
            the running mean of a step (a call and the pause after it), within `min_discount_s` and `max_discount_s`.
        default_call_s: seconds; guessed duration of a call of an unknown agent.
        max_workflows, max_agents, max_edges: declared by all clients together.
        client_share: of these three, 0 to 1; the most that the workflows of one client may be.
        silence_s: seconds without an event after which a workflow may be removed for a new one, and its predictions
            are cleared.
        discount_steps: mean steps in 1/γ where `discount_s` is None.
        min_discount_s, max_discount_s: bounds of the adapted 1/γ in seconds.
        rate_hysteresis: factor by which 1/γ must be off before it is adapted.
        reload_weight: weight of the slowly discounted reuse in `StepGraph.retention_value`: the cost of a reload,
            relative to a miss.
        slow_discount: factor by which that discount is slower.
        max_age: in 1/γ; agents of an active workflow without an event for this long are reported as changed.
        durations, transitions, reuse: of the parts.
    """

    horizon: Annotated[Positive, OrInfinite()] = 64
    discount_s: Positive | None = None
    default_call_s: Positive = 5.0
    max_workflows: Count = 10_000
    max_agents: Count = 100_000
    max_edges: Count = 1_000_000
    client_share: Annotated[float, Range(0, 1, above=True)] = 0.5
    silence_s: Positive = 3600.0
    discount_steps: Positive = 0.4
    min_discount_s: Positive = 0.01
    max_discount_s: Positive = 100.0
    rate_hysteresis: Positive = 1.4
    reload_weight: Positive = 0.001
    slow_discount: Positive = 16.0
    max_age: Positive = 8.0
    durations: DurationConfig = field(default_factory=DurationConfig)
    transitions: TransitionConfig = field(default_factory=TransitionConfig)
    reuse: ReuseConfig = field(default_factory=ReuseConfig)

    def __post_init__(self) -> None:
        verify(self)
