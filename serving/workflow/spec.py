"""The declaration of a workflow: agents, edges and first agents, validated because clients send them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from tenure.checked import Named, NotNegative, Range, Size, verify

from ..request import MAX_NAME, check_name, shown

JOINS = ("or", "and")
MIN_REST = 1e-9  # a smaller probability that is missing to 1 is a rounding error
Join = Literal["or", "and"]
Name = Annotated[str, Size(1, MAX_NAME)]


def _is_name(value: object) -> bool:
    return type(value) is str and 0 < len(value) <= MAX_NAME


def _is_duration(value: object) -> bool:
    return type(value) is float and 0 <= value < math.inf


def check_probability(probability: object) -> float:
    """Returns `probability` as a float; raises ValueError unless it is a number in (0, 1]."""
    number = isinstance(probability, (int, float)) and not isinstance(probability, bool)
    if not number or not 0 < probability <= 1:  # type: ignore[operator]
        raise ValueError(
            f"got {shown(probability)} as the probability of an edge; accepted: a number above 0, at most 1"
        )
    return float(probability)  # type: ignore[arg-type]


@dataclass(frozen=True)
class AgentSpec:
    """An agent of a workflow.

    Attributes:
        name: 1 to `MAX_NAME` characters, shared by all workflows that call the agent.
        join: `or`: a call of any predecessor leads to one of this agent; `and`: it waits for all of them.
        call_s, call_spread_s: guessed mean and standard deviation of a call in seconds; None: the graph's default.
        pause_s, pause_spread_s: the same for the pause after a call, e.g. for a tool.

    Raises:
        ValueError: an invalid name, join or number of seconds.
    """

    name: Name
    join: Join = "or"
    call_s: NotNegative | None = None
    call_spread_s: NotNegative | None = None
    pause_s: NotNegative | None = None
    pause_spread_s: NotNegative | None = None

    def __post_init__(self) -> None:
        # Clients add agents at any rate, so whatever a quick look finds right is not verified field by field.
        times = (self.call_s, self.call_spread_s, self.pause_s, self.pause_spread_s)
        if _is_name(self.name) and self.join in JOINS and all(t is None or _is_duration(t) for t in times):
            return
        verify(self, f"agents.{str(self.name)[:60]}" if isinstance(self.name, str) else "agent")


@dataclass(frozen=True)
class EdgeSpec:
    """A call of `source` leads to one of `target`: always if the probability is 1, else as one of several branches.

    At most one of an agent's branches (its edges below 1) is taken, none with the probability that is missing to 1;
    sums above 1 are scaled down to 1.

    Raises:
        ValueError: an invalid name, or a probability outside (0, 1].
    """

    source: Annotated[Name, Named("from")]
    target: Annotated[Name, Named("to")]
    probability: Annotated[float, Range(0, 1, above=True)] = 1.0

    def __post_init__(self) -> None:
        named = _is_name(self.source) and _is_name(self.target)
        if not (named and type(self.probability) is float and 0 < self.probability <= 1):
            verify(self, "edge")

    @staticmethod
    def shorthand(value: Any) -> Any:
        """`[from, to]` or `[from, to, probability]` in a document."""
        if isinstance(value, list | tuple) and len(value) in (2, 3):
            return dict(zip(("from", "to", "probability"), value, strict=False))
        raise ValueError(f"got {shown(value)} as an edge; accepted: [from, to], [from, to, probability] or a mapping")


@dataclass(frozen=True)
class WorkflowSpec:
    """A workflow; `start` names the agents that are called first.

    Raises:
        ValueError: an invalid name, a duplicate agent or edge, or an edge or start that names no agent.
    """

    name: str
    agents: Sequence[AgentSpec]
    edges: Sequence[EdgeSpec] = ()
    start: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_name(self.name, "a workflow")
        for name, kind in (("agents", AgentSpec), ("edges", EdgeSpec), ("start", str)):
            given = getattr(self, name)
            if not isinstance(given, list | tuple) or not all(isinstance(one, kind) for one in given):
                raise ValueError(f"got {shown(given)} as {name} of a workflow; accepted: a list of {kind.__name__}")
        known: set[str] = set()
        for agent in self.agents:
            if agent.name in known:
                raise ValueError(f"the workflow {self.name!r} has the agent {agent.name!r} twice")
            known.add(agent.name)
        ends: set[tuple[str, str]] = set()
        for edge in self.edges:
            for end in (edge.source, edge.target):
                if end not in known:
                    raise ValueError(
                        f"an edge of the workflow {self.name!r} names {end!r}, which is none of its agents"
                    )
            if (edge.source, edge.target) in ends:
                raise ValueError(
                    f"the workflow {self.name!r} has the edge from {edge.source!r} to {edge.target!r} twice"
                )
            ends.add((edge.source, edge.target))
        for name in self.start:
            if name not in known:
                raise ValueError(f"the workflow {self.name!r} starts at {name!r}, which is none of its agents")


def without_agents(spec: WorkflowSpec, names: Collection[str]) -> WorkflowSpec:
    """A workflow without the nodes that never call the model: their predecessors lead to their successors.

    The probabilities of two edges are multiplied, and those of parallel ways added. A successor takes over the join of
    the removed node where that is its only predecessor; other joins with several predecessors behind them become an OR,
    the earlier of the two.

    Raises:
        ValueError: a name that is none of the workflow's agents.
    """
    agents = {agent.name: agent for agent in spec.agents}
    edges = {(edge.source, edge.target): edge.probability for edge in spec.edges}
    start = list(spec.start)
    for name in names:
        if name not in agents:
            raise ValueError(f"got {shown(name)} as an agent to leave out; accepted: {', '.join(agents)}")
    for name in dict.fromkeys(names):
        removed = agents.pop(name)
        sources = {s: p for (s, t), p in edges.items() if t == name != s}
        targets = {t: p for (s, t), p in edges.items() if s == name != t}
        for target in targets:
            only = all(t != target for (s, t) in edges if s != name)
            if only:
                agents[target] = replace(agents[target], join=removed.join)
            elif len(sources) > 1 and removed.join == "or":
                agents[target] = replace(agents[target], join="or")
        edges = {pair: p for pair, p in edges.items() if name not in pair}
        for source, into in sources.items():
            for target, onward in targets.items():
                edges[source, target] = min(1.0, edges.get((source, target), 0.0) + into * onward)
        if name in start:
            start[start.index(name) : start.index(name) + 1] = targets
    return WorkflowSpec(
        spec.name, list(agents.values()), [EdgeSpec(*pair, p) for pair, p in edges.items()], list(dict.fromkeys(start))
    )


def repeated(spec: WorkflowSpec) -> WorkflowSpec:
    """A workflow whose runs follow one another: an agent after which a run may end leads to the first agents as well.

    The probability of such an edge is the one that is missing in the agent's branches, in equal parts for each first
    agent; an agent without edges leads there always.
    """
    rest = {agent.name: 1.0 for agent in spec.agents}
    edges = {(edge.source, edge.target): edge.probability for edge in spec.edges}
    for (source, _), probability in edges.items():
        rest[source] -= probability
    for source, missing in rest.items():
        if missing > MIN_REST:
            for first in spec.start:
                edges[source, first] = min(1.0, edges.get((source, first), 0.0) + missing / len(spec.start))
    return WorkflowSpec(spec.name, spec.agents, [EdgeSpec(*pair, p) for pair, p in edges.items()], spec.start)
