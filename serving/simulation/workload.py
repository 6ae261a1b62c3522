"""Generated workloads: the agents of workflows, their calls, and the lengths of prompts, answers and tools' times.

Every draw depends on the seed, the workflow, the agent and the number of its call, and on no earlier draw. All policies
therefore get the same calls, in whatever order they serve them. A `WorkflowClient` knows the calls that really happen;
the graph that is declared to the server may be wrong.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np

from tenure.checked import Count, NotNegative, Range, read, verify
from tenure.documents import shown

from ..workflow.spec import AgentSpec, EdgeSpec, WorkflowSpec

Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Distribution:
    """A distribution of lengths or times, parametrised by its mean.

    Attributes:
        kind: `constant`; `uniform` within mean · (1 ± shape); `exponential`; `lognormal` with standard deviation
            `shape` of the logarithm; `pareto` with tail index `shape` above 1 (below 2 its variance is infinite).

    Raises:
        ValueError: an unknown kind, or a mean or shape that it does not accept.
    """

    mean: NotNegative
    kind: Literal["constant", "uniform", "exponential", "lognormal", "pareto"] = "constant"
    shape: float = 0.0

    def __post_init__(self) -> None:
        verify(self)
        low = {"uniform": 0 <= self.shape <= 1, "lognormal": self.shape >= 0, "pareto": self.shape > 1}
        if not low.get(self.kind, True):
            raise ValueError(
                f"got shape={self.shape} for a {self.kind} distribution; accepted: 0 to 1 (uniform), 0 or more "
                "(lognormal), above 1 (pareto)"
            )

    @classmethod
    def read(cls, given: Any) -> Distribution:
        """From YAML: a number is a constant; a mapping has `mean`, and optionally `kind` and `shape`.

        Raises:
            ValueError: anything else.
        """
        return read(cls, given)

    @staticmethod
    def shorthand(value: Any) -> Any:
        """A number is the mean of a constant."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {"mean": float(value) if abs(value) <= sys.float_info.max else value}
        raise ValueError(f"got {shown(value)} for a distribution; accepted: a number, or mean, kind and shape")

    def sample(self, rng: random.Random) -> float:
        """One sample, at least 0."""
        if self.kind == "constant":
            return self.mean
        if self.kind == "uniform":
            return self.mean * (1 + self.shape * (2 * rng.random() - 1))
        if self.kind == "exponential":
            return rng.expovariate(1.0) * self.mean
        if self.kind == "lognormal":
            return self.mean * math.exp(rng.gauss(-self.shape * self.shape / 2, self.shape))
        return self.mean * (self.shape - 1) / self.shape * rng.paretovariate(self.shape)


def seeded_rng(*names: object) -> random.Random:
    """A random generator seeded by names: equal names give equal draws, in every process."""
    return random.Random("/".join(map(str, names)))


@dataclass(frozen=True)
class WorkloadConfig:
    """Workflows that run at the same time on one server.

    Attributes:
        shape: of each workflow. `ring`: stages in a circle, each with `branches` agents of which one is called;
            `branching`: a planner, then one of `branches` chains with probabilities that halve, then a writer, and
            again; `peer`: plan, execute, express and review, which then calls plan again or, with a probability of 0.3,
            execute (PEER's pattern; its probabilities are ours); `fan`: a planner, all workers at once, and a writer
            that waits for all of them, and again.
        workflows: number of workflows. shared: they call the same agents instead of their own.
        rounds: a workflow ends after this many times the calls of one round.
        shared_prefix: share of their fixed prompts with which agents of one stage begin alike: those of a stage of a
            ring, those at one place of the chains of a branching workflow, the workers of a fan. Agents that replace
            others share nothing.
        fixed_tokens, dynamic_tokens, output_tokens: lengths of a call's fixed prompt, suffix and answer.
        tool_s: seconds between a call and the next. start_s: seconds until a workflow's first call.
        mispredicted: probability that a call is followed by an agent that the declared graph does not name; not for
            a fan.
        habit: that agent is always the same one for each agent; otherwise it is drawn anew.
        noise: standard deviation of the logarithm of answers' lengths and tools' times around the declared values.
        changes: probability per call that some agent is then replaced by a new one with a prompt of its own; not for
            a fan.
        adversaries: additional workflows of hostile clients, which mark everything urgent and declare that all agents
            are next.
        vocab_size: token ids are drawn below it.

    Raises:
        ValueError: a value outside its range.
    """

    shape: Literal["ring", "branching", "peer", "fan"] = "ring"
    agents: Annotated[int, Range(2)] = 10
    branches: Count = 1
    workflows: Count = 1
    shared: bool = False
    rounds: Count = 10
    shared_prefix: Share = 0.0
    fixed_tokens: Distribution = field(default_factory=lambda: Distribution(4096))
    dynamic_tokens: Distribution = field(default_factory=lambda: Distribution(32))
    output_tokens: Distribution = field(default_factory=lambda: Distribution(32))
    tool_s: Distribution = field(default_factory=lambda: Distribution(0.0))
    start_s: Distribution = field(default_factory=lambda: Distribution(0.0))
    mispredicted: Share = 0.0
    habit: bool = False
    noise: NotNegative = 0.0
    changes: Share = 0.0
    adversaries: Annotated[int, Range(0)] = 0
    vocab_size: Count = 100_000

    def __post_init__(self) -> None:
        verify(self)
        if self.shape == "ring" and self.agents % self.branches:
            raise ValueError(
                f"got {self.agents} agents and {self.branches} branches; accepted: a ring has as many at each stage"
            )
        if self.shape == "peer" and (self.agents != len(PEER) or self.branches != 1):
            raise ValueError(f"got {self.agents} agents and {self.branches} branches; accepted: peer has 4 and 1")
        if self.shape == "fan" and (self.mispredicted or self.changes):
            raise ValueError(
                "a fan accepts mispredicted=0 and changes=0: its writer waits for all of the declared workers"
            )
        if self.shape in ("branching", "fan") and self.agents < 2 + self.branches * (self.shape == "branching"):
            raise ValueError(f"got {self.agents} agents for the shape {self.shape!r}; accepted: more than its branches")

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> WorkloadConfig:
        """From YAML: a mapping with these names; distributions as in `Distribution.read`.

        Raises:
            ValueError: an unknown name or a wrong value.
        """
        return read(cls, given)


PEER = ("plan", "execute", "express", "review")
PEER_REJECTED = 0.3  # of the reviews, which call execute again


@dataclass(frozen=True)
class WorkflowPlan:
    """A workflow's agents and edges as they are declared; true except for mispredicted calls.

    Attributes:
        following: by agent, the next agents and their probabilities; all of them at once if these are None.
        joins: by agent that waits for others, how many calls it waits for.
        stages: by agent, the stage whose agents may begin their fixed prompts alike; none for agents alone in theirs.
    """

    following: dict[str, tuple[tuple[str, ...], tuple[float, ...] | None]]
    joins: dict[str, int]
    first: str
    calls: int
    stages: dict[str, str] = field(default_factory=dict)


def make_plan(workload: WorkloadConfig, prefix: str) -> WorkflowPlan:
    """The plan of one workflow; `prefix` begins the names of its agents and makes them its own."""
    roles = PEER if workload.shape == "peer" else [f"agent{number}" for number in range(workload.agents)]
    names = [f"{prefix}{role}" for role in roles]
    if workload.shape == "ring":
        wide = workload.branches
        stages = [tuple(names[at : at + wide]) for at in range(0, len(names), wide)]
        following = {}
        for number, stage in enumerate(stages):
            after = stages[(number + 1) % len(stages)]
            following.update(dict.fromkeys(stage, (after, (1 / wide,) * wide)))
        alike = {name: stage[0] for stage in stages if wide > 1 for name in stage}
        return WorkflowPlan(following, {}, names[0], len(stages), alike)
    if workload.shape == "peer":
        plan, execute, express, review = names
        following = {
            plan: ((execute,), (1.0,)), execute: ((express,), (1.0,)), express: ((review,), (1.0,)),
            review: ((plan, execute), (1 - PEER_REJECTED, PEER_REJECTED)),
        }  # fmt: skip
        return WorkflowPlan(following, {}, plan, len(names))
    planner, *middle, writer = names
    if workload.shape == "fan":
        following = {planner: (tuple(middle), None), writer: ((planner,), (1.0,))}
        following |= {worker: ((writer,), (1.0,)) for worker in middle}
        return WorkflowPlan(following, {writer: len(middle)}, planner, len(names), dict.fromkeys(middle, middle[0]))
    chains = [middle[number :: workload.branches] for number in range(workload.branches)]
    chances = [0.5 ** (number + 1) for number in range(workload.branches)]
    chances[0] += 1 - sum(chances)
    following = {planner: (tuple(chain[0] for chain in chains), tuple(chances)), writer: ((planner,), (1.0,))}
    for chain in chains:
        following |= {agent: ((after,), (1.0,)) for agent, after in zip(chain, [*chain[1:], writer], strict=True)}
    places = [[chain[place] for chain in chains if place < len(chain)] for place in range(len(chains[0]))]
    alike = {name: same[0] for same in places if len(same) > 1 for name in same}
    return WorkflowPlan(following, {}, planner, 2 + len(chains[0]), alike)


@dataclass(frozen=True)
class AgentCall:
    """A call that a workflow makes.

    Attributes:
        prompt: int32 `(tokens,)`; the first `fixed_tokens` of them are the agent's fixed prompt.
        output_tokens: length of the answer.
        after_s: seconds after the end of the call that led to it, or after the start.
    """

    agent: str
    prompt: np.ndarray
    fixed_tokens: int
    output_tokens: int
    after_s: float


class WorkflowClient:
    """A running workflow: decides which calls follow an answer.

    Args:
        number: of the workflow; its name contains it.
        hostile: it is charged to a client of its own, which marks everything urgent.
    Attributes:
        name: of the workflow. client: the account that it is charged to.
        started, open: calls made so far, and those of them that have not been answered.
    """

    def __init__(self, workload: WorkloadConfig, seed: int, number: int, hostile: bool = False) -> None:
        self.workload, self.seed, self.hostile = workload, seed, hostile
        self.name = f"{'hostile' if hostile else 'workflow'}{number}"
        self.client = self.name if hostile else "honest"
        self.plan = make_plan(workload, "" if workload.shared and not hostile else f"{self.name}/")
        self.started = self.open = 0
        self._names = {agent: agent for agent in self.plan.following}
        self._origins = dict(self._names)
        self._calls = dict.fromkeys(self._names, 0)
        self._arrived: dict[str, int] = {}
        self._prompts: dict[str, np.ndarray] = {}

    @property
    def agents(self) -> list[str]:
        return list(self._names.values())

    def spec(self, answer_s: float) -> WorkflowSpec:
        """The workflow as it is declared to the server, with `answer_s` seconds per call."""
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
        """The declared edges that lead from an agent of the plan, with present names."""
        after, chances = self.plan.following[agent]
        return [
            EdgeSpec(self._names[agent], self._names[other], chance)
            for other, chance in zip(after, chances or (1.0,) * len(after), strict=True)
        ]

    def fixed_prompt(self, agent: str) -> np.ndarray:
        """The agent's fixed prompt, int32 `(fixed_tokens,)`; random tokens."""
        known = self._prompts.get(agent)
        if known is None:
            rng = seeded_rng("prompt", self.seed, agent)
            known = self._tokens(rng, _count(self.workload.fixed_tokens.sample(rng)))
            stage = self.plan.stages.get(agent)
            shared = round(self.workload.shared_prefix * len(known))
            if stage is not None and shared:
                known = known.copy()
                known[:shared] = self._tokens(seeded_rng("stage", self.seed, stage), shared)
            self._prompts[agent] = known
        return known

    def first_call(self) -> AgentCall:
        """The call that the workflow begins with."""
        rng = seeded_rng("start", self.seed, self.name)
        return self._call(self.plan.first, self.workload.start_s.sample(rng))

    def following(self, agent: str) -> list[AgentCall]:
        """The calls that follow an answer of `agent`; none after the last one, or while a join waits for others."""
        origin, workload = self._origins[agent], self.workload
        self.open -= 1
        rng = seeded_rng("next", self.seed, self.name, origin, self._calls[origin])
        after, chances = self.plan.following[origin]
        over = self.started >= workload.rounds * self.plan.calls
        if over and (not self.plan.joins or origin in self.plan.joins):
            return []
        wait = self._noisy(workload.tool_s.sample(rng), rng)
        others = [name for name in self._names if name not in after and name != origin]
        if others and rng.random() < workload.mispredicted:
            after = ((seeded_rng("habit", self.seed, self.name, origin) if workload.habit else rng).choice(others),)
        elif chances is not None:
            after = tuple(rng.choices(after, chances))
        return [self._call(name, wait) for name in after if self._complete(name)]

    def change(self, agent: str, calls: Sequence[AgentCall]) -> tuple[str, str, list[EdgeSpec]] | None:
        """Possibly replaces an agent, after a call of `agent` that led to `calls`.

        Returns:
            The old name, the new one, and the edges from and to the new agent; None: nothing changes.
        """
        if not self.workload.changes:
            return None
        origin = self._origins[agent]
        rng = seeded_rng("change", self.seed, self.name, origin, self._calls[origin])
        if rng.random() >= self.workload.changes:
            return None
        busy = {agent, *(call.agent for call in calls)}
        old = rng.choice([name for name in self.agents if name not in busy])
        origin = self._origins[old]
        new = self._names[origin] = f"{origin}.{seeded_rng(old).getrandbits(32):08x}"
        self._origins[new] = origin
        edges = [edge for name in self.plan.following for edge in self.edges(name) if new in (edge.source, edge.target)]
        return old, new, edges

    def _complete(self, agent: str) -> bool:
        """Whether all calls that `agent` waits for have been answered, counting one more."""
        wanted = self.plan.joins.get(agent)
        if wanted is None:
            return True
        self._arrived[agent] = (self._arrived.get(agent, 0) + 1) % wanted
        return self._arrived[agent] == 0

    def _call(self, agent: str, after_s: float) -> AgentCall:
        self.started += 1
        self.open += 1
        number = self._calls[agent] = self._calls[agent] + 1
        rng = seeded_rng("call", self.seed, self.name, agent, number)
        name = self._names[agent]
        fixed = self.fixed_prompt(name)
        dynamic = _count(self.workload.dynamic_tokens.sample(rng))
        output = _count(self._noisy(self.workload.output_tokens.sample(rng), rng))
        prompt = np.concatenate((fixed, self._tokens(rng, dynamic)))
        return AgentCall(name, prompt, len(fixed), output, after_s)

    def _tokens(self, rng: random.Random, length: int) -> np.ndarray:
        numbers = np.frombuffer(rng.randbytes(4 * length), dtype="<u4")
        return (numbers % self.workload.vocab_size).astype(np.int32)

    def _noisy(self, value: float, rng: random.Random) -> float:
        noise = self.workload.noise
        return value * Distribution(1.0, "lognormal", noise).sample(rng) if noise else value


def clients_of(workload: WorkloadConfig, seed: int) -> list[WorkflowClient]:
    """A client for each workflow, the hostile ones last."""
    return [
        WorkflowClient(workload, seed, number, hostile=number >= workload.workflows)
        for number in range(workload.workflows + workload.adversaries)
    ]


def _count(number: float) -> int:
    return max(1, round(number))
