"""What agents ask of a server: who calls whom, and how long prompts, answers and tools are."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from .draws import Spread

SHAPES = ("ring", "branching", "fan")


@dataclass(frozen=True)
class Workload:
    """What the clients do.

    Attributes:
        shape: `ring`: stages one after the other and again, one of `branches` agents at each; `branching`: a planner,
            then one of `branches` chains with chances that fall by half, then a writer, and again; `fan`: a planner,
            all workers at once, and a writer that waits for all of them, and again.
        agents, branches: of a workflow.
        workflows: that run at the same time. shared: they call the same agents rather than their own.
        rounds: how often a workflow goes round: it ends after so many times the calls of a round.
        fixed_tokens, dynamic_tokens, output_tokens: of a call. tool_s: between a call and the next.
        start_s: how late a workflow begins.
        mispredicted: chance that a call is followed by another agent than the graph says. Not for a fan.
        habit: for each agent that is always the same one; otherwise any.
        noise: spread (of the logarithm) of answers' lengths and of tools' times around what the server is told.
        changes: chance, for each call, that some agent is then replaced by a new one with a prompt of its own. Not for
            a fan.
        adversaries: further workflows whose client marks everything urgent and declares that all agents come next.
    """

    shape: str = "ring"
    agents: int = 10
    branches: int = 1
    workflows: int = 1
    shared: bool = False
    rounds: int = 10
    fixed_tokens: Spread = field(default_factory=lambda: Spread(4096))
    dynamic_tokens: Spread = field(default_factory=lambda: Spread(32))
    output_tokens: Spread = field(default_factory=lambda: Spread(32))
    tool_s: Spread = field(default_factory=lambda: Spread(0.0))
    start_s: Spread = field(default_factory=lambda: Spread(0.0))
    mispredicted: float = 0.0
    habit: bool = False
    noise: float = 0.0
    changes: float = 0.0
    adversaries: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"got shape={self.shape!r:.60} for a workload; accepted: {', '.join(SHAPES)}")
        for name, low in (("agents", 2), ("branches", 1), ("workflows", 1), ("rounds", 1), ("adversaries", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"got {name}={value!r:.60} for a workload; accepted: a whole number from {low} up")
        for name in ("shared", "habit"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"got {name}={getattr(self, name)!r:.60} for a workload; accepted: true or false")
        if not (0 <= self.mispredicted <= 1 and 0 <= self.changes <= 1 and self.noise >= 0):
            raise ValueError(
                f"got mispredicted={self.mispredicted}, changes={self.changes}, noise={self.noise} for a workload; "
                "accepted: chances from 0 to 1, a noise of 0 or more"
            )
        if self.shape == "ring" and self.agents % self.branches:
            raise ValueError(
                f"got {self.agents} agents and {self.branches} branches; accepted: a ring has as many at each stage"
            )
        if self.shape == "fan" and (self.mispredicted or self.changes):
            raise ValueError(
                "a fan accepts mispredicted=0 and changes=0: who waits for all workers needs these workers"
            )
        if self.shape != "ring" and self.agents < 2 + self.branches * (self.shape == "branching"):
            raise ValueError(f"got {self.agents} agents for the shape {self.shape!r}; accepted: more than its branches")

    @classmethod
    def read(cls, given: dict[str, Any]) -> Workload:
        """From a mapping with these names; numbers or mappings for what varies.

        Raises:
            ValueError: an unknown name or a wrong value.
        """
        kinds = {each.name: each for each in fields(cls)}
        unknown = given.keys() - kinds.keys()
        if unknown:
            raise ValueError(f"a workload has no {sorted(unknown)[0]!r:.60}; accepted: {', '.join(kinds)}")
        spreads = {"fixed_tokens", "dynamic_tokens", "output_tokens", "tool_s", "start_s"}
        values: dict[str, Any] = {name: Spread.read(v) if name in spreads else v for name, v in given.items()}
        return cls(**values)


@dataclass(frozen=True)
class Plan:
    """A workflow's agents and edges, as they are declared and, unless they are mispredicted, true.

    Attributes:
        following: of each agent, the next ones with their chances, or all of them at once where the chances are None.
        joins: of agents that wait, for how many.
        first: the agent a workflow begins with.
        calls: of a round.
    """

    following: dict[str, tuple[tuple[str, ...], tuple[float, ...] | None]]
    joins: dict[str, int]
    first: str
    calls: int


def plan_of(workload: Workload, prefix: str) -> Plan:
    """Names begin with `prefix`, which makes them a workflow's own."""
    names = [f"{prefix}agent{number}" for number in range(workload.agents)]
    if workload.shape == "ring":
        wide = workload.branches
        stages = [tuple(names[at : at + wide]) for at in range(0, len(names), wide)]
        following = {}
        for number, stage in enumerate(stages):
            after = stages[(number + 1) % len(stages)]
            following.update(dict.fromkeys(stage, (after, (1 / wide,) * wide)))
        return Plan(following, {}, names[0], len(stages))
    planner, *middle, writer = names
    if workload.shape == "fan":
        following = {planner: (tuple(middle), None), writer: ((planner,), (1.0,))}
        following |= {worker: ((writer,), (1.0,)) for worker in middle}
        return Plan(following, {writer: len(middle)}, planner, len(names))
    chains = [middle[number :: workload.branches] for number in range(workload.branches)]
    chances = [0.5 ** (number + 1) for number in range(workload.branches)]
    chances[0] += 1 - sum(chances)
    following = {planner: (tuple(chain[0] for chain in chains), tuple(chances)), writer: ((planner,), (1.0,))}
    for chain in chains:
        following |= {agent: ((after,), (1.0,)) for agent, after in zip(chain, [*chain[1:], writer], strict=True)}
    return Plan(following, {}, planner, 2 + len(chains[0]))
