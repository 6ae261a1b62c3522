"""Workflows as they run: each `Client` knows what really happens, the server is told a graph that may be wrong.

All draws depend on the seed, the workflow, the agent and the number of its call, so every policy is given the same
calls whatever order it serves them in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..spec import AgentSpec, EdgeSpec, WorkflowSpec
from .draws import Spread, seeded
from .workload import Workload, plan_of

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
