"""Numbers that vary, drawn so that a draw depends on its name alone and not on what was drawn before it.

What agents ask of a server: who calls whom, and how long prompts, answers and tools are.

Workflows as they run: each `Client` knows what really happens, the server is told a graph that may be wrong.

All draws depend on the seed, the workflow, the agent and the number of its call, so every policy is given the same
calls whatever order it serves them in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ..workflow.spec import AgentSpec, EdgeSpec, WorkflowSpec

KINDS = ("constant", "uniform", "exponential", "lognormal", "pareto")


@dataclass(frozen=True)
class Spread:
    """A distribution by its mean.

    Attributes:
        kind: `constant`; `uniform` within mean · (1 ± shape); `exponential`; `lognormal` with standard deviation
            `shape` of the logarithm; `pareto` with tail index `shape` above 1 (below 2 its variance is infinite).
    """

    mean: float
    kind: str = "constant"
    shape: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"got kind={self.kind!r:.60} for a distribution; accepted: {', '.join(KINDS)}")
        low = {"uniform": 0 <= self.shape <= 1, "lognormal": self.shape >= 0, "pareto": self.shape > 1}
        if not 0 <= self.mean < math.inf or not low.get(self.kind, True):
            raise ValueError(
                f"got mean={self.mean}, shape={self.shape} for a {self.kind} distribution; accepted: a mean of 0 or "
                "more, and a shape of 0 to 1 (uniform), 0 or more (lognormal), above 1 (pareto)"
            )

    @classmethod
    def read(cls, given: Any) -> Spread:
        """A number is a constant; a mapping has `mean` and may have `kind` and `shape`."""
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return cls(float(given))
        if isinstance(given, dict) and "mean" in given and given.keys() <= {"mean", "kind", "shape"}:
            return cls(**given)
        raise ValueError(f"got {given!r:.80} for a distribution; accepted: a number, or mean, kind and shape")

    def draw(self, draws: random.Random) -> float:
        if self.kind == "constant":
            return self.mean
        if self.kind == "uniform":
            return self.mean * (1 + self.shape * (2 * draws.random() - 1))
        if self.kind == "exponential":
            return draws.expovariate(1.0) * self.mean
        if self.kind == "lognormal":
            return self.mean * math.exp(draws.gauss(-self.shape * self.shape / 2, self.shape))
        return self.mean * (self.shape - 1) / self.shape * draws.paretovariate(self.shape)


def seeded(*names: object) -> random.Random:
    """A generator that is the same wherever the same names are given."""
    return random.Random("/".join(map(str, names)))


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


VOCABULARY = 100_000


@dataclass(frozen=True)
class Call:
    """One request to be.

    Attributes:
        after_s: seconds after what leads to it.
        prompt: int32 `(tokens,)`, the first `fixed_tokens` of them the agent's.
    """

    agent: str
    prompt: np.ndarray
    fixed_tokens: int
    output_tokens: int
    after_s: float


class Client:
    """One workflow as it runs.

    Args:
        hostile: it has a client of its own, which marks everything urgent.
    Attributes:
        name: of the workflow; client: who is charged for it.
        started, open: calls begun so far, and those of them that have not been answered.
    """

    def __init__(self, workload: Workload, seed: int, number: int, hostile: bool = False) -> None:
        self.workload, self.seed, self.hostile = workload, seed, hostile
        self.name = f"{'hostile' if hostile else 'workflow'}{number}"
        self.client = self.name if hostile else "honest"
        self.plan = plan_of(workload, "" if workload.shared and not hostile else f"{self.name}/")
        self.started = self.open = 0
        self._names = {agent: agent for agent in self.plan.following}
        self._origins = dict(self._names)
        self._calls = dict.fromkeys(self._names, 0)
        self._arrived: dict[str, int] = {}
        self._prompts: dict[str, np.ndarray] = {}

    @property
    def agents(self) -> list[str]:
        """By the names that are in use now."""
        return list(self._names.values())

    def spec(self, answer_s: float) -> WorkflowSpec:
        """What the server is told: edges, joins, and durations with `answer_s` for a call."""
        workload = self.workload
        tool = workload.tool_s.mean
        spread = tool if workload.noise or workload.tool_s.kind != "constant" else 0.0
        agents = [
            AgentSpec(name, "and" if name in self.plan.joins else "or", answer_s, answer_s / 4, tool, spread)
            for name in self.plan.following
        ]
        start = self.agents if self.hostile else [self.plan.first]
        return WorkflowSpec(
            self.name, agents, [each for name in self.plan.following for each in self.edges(name)], start
        )

    def edges(self, agent: str) -> list[EdgeSpec]:
        """Those that lead away from an agent of the plan, by the names that are in use now."""
        after, chances = self.plan.following[agent]
        return [
            EdgeSpec(self._names[agent], self._names[other], chance)
            for other, chance in zip(after, chances or (1.0,) * len(after), strict=True)
        ]

    def fixed_prompt(self, agent: str) -> np.ndarray:
        """int32 `(fixed_tokens,)`; random tokens that are the agent's own."""
        known = self._prompts.get(agent)
        if known is None:
            draws = seeded("prompt", self.seed, agent)
            known = self._prompts[agent] = _tokens(draws, _count(self.workload.fixed_tokens.draw(draws)))
        return known

    def first_call(self) -> Call:
        draws = seeded("start", self.seed, self.name)
        return self._call(self.plan.first, self.workload.start_s.draw(draws))

    def following(self, agent: str) -> list[Call]:
        """What comes after an answer of `agent`; nothing after the last one, and while others are waited for."""
        origin, workload = self._origins[agent], self.workload
        self.open -= 1
        draws = seeded("next", self.seed, self.name, origin, self._calls[origin])
        after, chances = self.plan.following[origin]
        over = self.started >= workload.rounds * self.plan.calls
        if over and (not self.plan.joins or origin in self.plan.joins):
            return []
        wait = self._noisy(workload.tool_s.draw(draws), draws)
        others = [name for name in self._names if name not in after and name != origin]
        if others and draws.random() < workload.mispredicted:
            after = ((seeded("habit", self.seed, self.name, origin) if workload.habit else draws).choice(others),)
        elif chances is not None:
            after = tuple(draws.choices(after, chances))
        return [self._call(name, wait) for name in after if self._complete(name)]

    def change(self, agent: str, calls: Sequence[Call]) -> tuple[str, str, list[EdgeSpec]] | None:
        """Whether some agent is replaced after a call of `agent` that led to `calls`.

        Returns:
            Its old name, its new one, and the new one's edges from and to others.
        """
        if not self.workload.changes:
            return None
        origin = self._origins[agent]
        draws = seeded("change", self.seed, self.name, origin, self._calls[origin])
        if draws.random() >= self.workload.changes:
            return None
        busy = {agent, *(call.agent for call in calls)}
        old = draws.choice([name for name in self.agents if name not in busy])
        origin = self._origins[old]
        new = self._names[origin] = f"{origin}.{seeded(old).getrandbits(32):08x}"
        self._origins[new] = origin
        edges = [edge for name in self.plan.following for edge in self.edges(name) if new in (edge.source, edge.target)]
        return old, new, edges

    def _complete(self, agent: str) -> bool:
        """Whether everybody that a joining agent waits for has answered."""
        wanted = self.plan.joins.get(agent)
        if wanted is None:
            return True
        self._arrived[agent] = (self._arrived.get(agent, 0) + 1) % wanted
        return self._arrived[agent] == 0

    def _call(self, agent: str, after_s: float) -> Call:
        self.started += 1
        self.open += 1
        number = self._calls[agent] = self._calls[agent] + 1
        draws = seeded("call", self.seed, self.name, agent, number)
        name = self._names[agent]
        fixed = self.fixed_prompt(name)
        dynamic = _count(self.workload.dynamic_tokens.draw(draws))
        output = _count(self._noisy(self.workload.output_tokens.draw(draws), draws))
        prompt = np.concatenate((fixed, _tokens(draws, dynamic)))
        return Call(name, prompt, len(fixed), output, after_s)

    def _noisy(self, value: float, draws: random.Random) -> float:
        noise = self.workload.noise
        return value * Spread(1.0, "lognormal", noise).draw(draws) if noise else value


def clients_of(workload: Workload, seed: int) -> list[Client]:
    """One for each workflow, the hostile ones last."""
    return [
        Client(workload, seed, number, hostile=number >= workload.workflows)
        for number in range(workload.workflows + workload.adversaries)
    ]


def _count(number: float) -> int:
    return max(1, round(number))


def _tokens(draws: random.Random, length: int) -> np.ndarray:
    numbers = np.frombuffer(draws.randbytes(4 * length), dtype="<u4")
    return (numbers % VOCABULARY).astype(np.int32)
