"""Expected discounted reuse E[exp(-γT)] of each agent's cache, T being the time until the agent's next call.

exp(-γT) is the probability that an exponential clock with mean 1/γ rings after the call, so everything below is
arithmetic of probabilities. An event is described by two numbers: `reach`, the probability that it ever happens, and
`reuse`, the probability that it happens before the clock rings; reuse / reach says how soon it is if it happens.

* In sequence, probabilities multiply; a duration D contributes E[exp(-γD)]. With branches only (one of the edges is
  taken), first passages solve the linear system of semi-Markov processes (Pyke, Markov renewal processes, Ann. Math.
  Stat. 32, 1961), q_w(x) = E[exp(-γD_w)] · Σ_y p_wy (1 if y = x else q_y(x)), and the result is exact.
* A prediction of the edges is correct with probability `accuracy`; otherwise any agent may be called, each with the
  same probability. Observed transitions (`TransitionCounts`) are blended in; the edges count as much as
  `TransitionConfig.edge_weight` of them. Both apply to agents that take one of their edges; forks, which take all, are
  assumed to be correct.
* The first of several events (OR, forks, concurrent calls), taken as independent: wait for the sooner one if it
  happens at all, else for the other (`first_of`). It is never above the true value, which may use whichever happens to
  be first, nor below any single one.
* The last of several events (AND), taken as independent: all must happen, and the one that is latest on average
  decides (`last_of`); never below the true value, E[exp(-γ max T)] <= min E[exp(-γT)].

Not modelled: dependence between branches of a fork (they may share a past), and tails that `durations` does not cover.

Workflows with too many agents for the linear system (`ReuseConfig.max_exact_targets`) follow the most probable path,
found by the same AND/OR solver as the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .durations import AgentDurations
from .graph_config import ReuseConfig, TransitionConfig
from .steps_solver import JoinSolver
from .workflow import Workflow


class ReuseChance(NamedTuple):
    """Float64 arrays of one shape, 0 <= reuse <= reach <= 1."""

    reach: np.ndarray
    reuse: np.ndarray

    def after(self, reach: float, reuse: float) -> ReuseChance:
        """After another event with this reach and reuse."""
        return ReuseChance(self.reach * reach, self.reuse * reuse)


def no_chance(*shape: int) -> ReuseChance:
    return ReuseChance(np.zeros(shape), np.zeros(shape))


def first_of(one: ReuseChance, other: ReuseChance) -> ReuseChance:
    """Either of two independent events; if both happen, the one that is sooner on average counts."""
    return ReuseChance(*combine_first(*one, *other, np.maximum))


def combine_first(
    one_reach: Any, one_reuse: Any, other_reach: Any, other_reuse: Any, maximum: Callable[[Any, Any], Any] = max
) -> tuple[Any, Any]:
    """Reach and reuse of `first_of`, for numbers or, with numpy's `maximum`, for arrays."""
    sooner = maximum(one_reuse + (1 - one_reach) * other_reuse, other_reuse + (1 - other_reach) * one_reuse)
    return 1 - (1 - one_reach) * (1 - other_reach), sooner


def last_of(reach: np.ndarray, reuse: np.ndarray) -> tuple[float, float]:
    """Reach and reuse of the last of several independent events, arrays `(events,)`."""
    if not reach.all():
        return 0.0, 0.0
    return float(reach.prod()), float(reach.prod() * (reuse / reach).min())


class FirstPassage:
    """Probabilities that a call leads to the first later call of each agent.

    AND joins block passages: the edges into them are targets of their own, which `next_calls` joins. So the targets
    are the agents 0 .. n-1, followed by these edges.

    Args:
        branches: for each agent, its successors and the probabilities of the edges; those below 1 exclude each other.
        is_and: for each agent, whether it is an AND join.
        discounts: for each agent, E[exp(-γ(call + pause))], float64 `(agents,)`.
        accuracy: probability that a call predicted by an edge comes, and not another one.
        transitions: for each agent, observed counts by successor (`TransitionCounts.counts`).
        edge_weight: observed calls that the edges of an agent count as much as.
        tolerance: probability, of fixed-point iterations.
    Attributes:
        after: chances `(agents, targets)` of the target's first call after one of the agent that begins now.
        onward: the same, counted from the end of the agent's call and pause.
        unpredicted: for each agent, the probability that its call is followed by any given agent without an edge.
        and_inputs: for each AND agent, for each predecessor, the target that stands for the edge.
    """

    def __init__(
        self, branches: Sequence[Mapping[int, float]], is_and: Sequence[bool], discounts: np.ndarray,
        accuracy: float = 1.0, transitions: Sequence[Mapping[int, float]] = (),
        edge_weight: float = TransitionConfig.edge_weight, tolerance: float = ReuseConfig.tolerance,
    ) -> None:  # fmt: skip
        self.agents = len(branches)
        self.discounts = discounts
        self.tolerance = tolerance
        self.and_inputs: dict[int, dict[int, int]] = {agent: {} for agent in range(self.agents) if is_and[agent]}
        self.targets = self.agents
        exclusive: list[tuple[int, int, float]] = []
        always: list[list[int]] = [[] for _ in branches]
        for agent, row in enumerate(branches):
            scale = max(1.0, sum(p for p in row.values() if p < 1))
            for successor, probability in row.items():
                target = successor
                if is_and[successor]:
                    target = self.and_inputs[successor][agent] = self.targets
                    self.targets += 1
                if probability < 1:
                    exclusive.append((agent, target, probability / scale))
                else:
                    always[agent].append(target)
        choice = np.zeros((self.agents, self.targets))
        for agent, target, probability in exclusive:
            choice[agent, target] = probability
        for agent in range(self.agents):
            if len(always[agent]) == 1 and not choice[agent].any():  # a single edge is a branch of probability 1
                choice[agent, always[agent].pop()] = 1.0
        self.unpredicted = (1 - accuracy) * choice.sum(1) / max(1, self.agents)
        choice *= accuracy
        choice[:, : self.agents] += self.unpredicted[:, None]
        for agent, counts in enumerate(transitions):
            total = edge_weight + sum(counts.values())
            choice[agent] *= edge_weight / total
            self.unpredicted[agent] *= edge_weight / total
            for target, count in counts.items():
                choice[agent, target] += count / total
        width = max(map(len, always), default=0)
        forks = np.full((self.agents, width), self.targets)  # padded with the index of a row of zeros
        for agent, row in enumerate(always):
            forks[agent, : len(row)] = row
        self.onward = self._iterate(choice, forks) if width else self._solve_linear(choice)
        self.after = ReuseChance(self.onward.reach, self.onward.reuse * discounts[:, None])

    def _solve_linear(self, choice: np.ndarray) -> ReuseChance:
        """Without forks, the expected arrivals solve a linear system: those at a target are the chance of a first
        arrival times the arrivals from there (Pyke 1961, renewal equation). Endless cycles need discounts below 1.
        """
        most, found = np.full(self.agents, 1 - 0.01 * self.tolerance), []
        for discounts in (most, np.minimum(most, self.discounts)):
            arrivals = np.linalg.solve(np.eye(self.agents) - choice[:, : self.agents] * discounts, choice)
            arrivals[:, : self.agents] /= 1 + discounts * arrivals[: self.agents, : self.agents].diagonal()
            found.append(np.clip(arrivals, 0.0, 1.0))
        reach, reuse = found
        reach[reach > 1 - self.tolerance] = 1.0
        return ReuseChance(reach, np.minimum(reuse, reach))

    def _iterate(self, choice: np.ndarray, forks: np.ndarray) -> ReuseChance:
        """Fixed-point iteration from zero, one call a round: the least solution, also in endless cycles."""
        onward = no_chance(self.agents, self.targets)
        arrived = np.zeros((self.targets + 1, self.targets))
        own = np.arange(self.targets)
        arrived[own, own] = 1.0
        entered = ReuseChance(arrived, arrived.copy())  # chances of each target once something arrives at a target
        agents = own[: self.agents]
        for _ in range(4 * self.agents + 200):
            step = ReuseChance(choice @ entered.reach[:-1], choice @ entered.reuse[:-1])
            for column in forks.T:
                step = first_of(step, ReuseChance(entered.reach[column], entered.reuse[column]))
            converged = np.abs(step.reach - onward.reach).max(initial=0.0) < self.tolerance
            converged = converged and bool((np.abs(step.reuse - onward.reuse) <= self.tolerance * step.reuse).all())
            onward = step
            if converged:
                break
            entered.reach[: self.agents] = onward.reach
            entered.reuse[: self.agents] = onward.reuse * self.discounts[:, None]
            for table in entered:
                table[agents, agents] = 1.0
        return onward

    def from_start(self, agent: int) -> ReuseChance:
        """Chances `(targets,)` from a call of `agent` that begins now, itself included."""
        row = ReuseChance(self.after.reach[agent].copy(), self.after.reuse[agent].copy())
        row.reach[agent] = row.reuse[agent] = 1.0
        return row

    def from_running(self, agent: int, discount: float) -> ReuseChance:
        """Chances `(targets,)` from a call in progress; `discount`: E[exp(-γ · rest of the call and its pause)]."""
        return ReuseChance(self.onward.reach[agent], self.onward.reuse[agent] * discount)

    def from_end(self, agent: int, repeat_factor: float = 1.0) -> ReuseChance:
        """Chances `(targets,)` from the end of a call and of the pause after it.

        In an unpredicted call, the agent itself is `repeat_factor` times as likely as others.
        """
        row = ReuseChance(self.onward.reach[agent].copy(), self.onward.reuse[agent].copy())
        for each in row:
            each[agent] = min(1.0, max(0.0, each[agent] + (repeat_factor - 1) * self.unpredicted[agent]))
        return row

    def next_calls(
        self, sources: Sequence[ReuseChance], waiting: Mapping[tuple[int, int], tuple[float, float]]
    ) -> ReuseChance:
        """Chances `(agents,)` of each agent's next call.

        Args:
            sources: of everything in progress, each `(targets,)`.
            waiting: for edges (predecessor, AND agent) with a pending prediction: its reach and reuse.
        """
        base = sources[0] if sources else no_chance(self.targets)
        for source in sources[1:]:
            base = first_of(base, source)
        if not self.and_inputs:
            return ReuseChance(base.reach[: self.agents], base.reuse[: self.agents])
        joined = dict.fromkeys(self.and_inputs, (0.0, 0.0))
        total = base
        for _ in range(len(self.and_inputs) + 20):  # one more for each join that follows another, and some for cycles
            total = base
            for agent, (reach, reuse) in joined.items():
                if reach:
                    total = first_of(total, self.from_start(agent).after(reach, reuse))
            before, joined = joined, {agent: self._join(agent, total, waiting) for agent in self.and_inputs}
            if all(abs(a - b) < self.tolerance for g in joined for a, b in zip(joined[g], before[g], strict=True)):
                break
        return ReuseChance(total.reach[: self.agents], total.reuse[: self.agents])

    def _join(
        self, agent: int, total: ReuseChance, waiting: Mapping[tuple[int, int], tuple[float, float]]
    ) -> tuple[float, float]:
        """Reach and reuse of an AND agent whose inputs have the chances `total`, or those of `waiting`."""
        inputs = self.and_inputs[agent]
        if not inputs:
            return 0.0, 0.0
        ways = [waiting.get((p, agent), (total.reach[edge], total.reuse[edge])) for p, edge in inputs.items()]
        reach, reuse = np.array(ways).T
        return last_of(reach, reuse)


class WorkflowReuse:
    """Chances of all agents of one workflow, cached until its next event or `ReuseConfig.max_age`.

    Larger workflows (`max_exact_targets`) are not summed over paths: the reuse of an agent is that of the most
    probable path to it, in an AND of the least probable one. That is a lower bound without ANDs; `reach` is then 1.

    Args:
        workflow: whose state is read.
        rate: γ in 1/s.
    """

    def __init__(self, workflow: Workflow, rate: float) -> None:
        self.workflow = workflow
        self.rate = rate
        self.config = workflow.graph_state.config.reuse
        self._chances: dict[str, tuple[float, float]] = {}
        self._read_at = (-1, -math.inf)  # version and seconds
        self._passage: FirstPassage | None = None
        self._paths: _MostProbablePaths | None = None
        self._structure_version = -1
        self._nodes: list[int] = []
        self._durations: list[AgentDurations] = []  # of `_nodes`
        self._valid_discounts: list[tuple[float, float]] = []  # ranges in which the cached passages are valid
        self._accuracy = 1.0  # of the cached passages

    def chances(self) -> dict[str, tuple[float, float]]:
        """By agent, reach and reuse: the probability of another call, and E[exp(-γT)]."""
        workflow, now = self.workflow, self.workflow.graph_state.clock()
        version, at = self._read_at
        if version != workflow.version or abs(now - at) * self.rate > self.config.max_age:
            if not (workflow.running or workflow.pending or workflow.expected):
                self._chances = dict.fromkeys(workflow.ids, (0.0, 0.0))  # nothing leads to any call
                self._read_at = (workflow.version, now)
                return self._chances
            inputs = sum(len(workflow.solver.predecessors[n]) for n in workflow.names if workflow.solver.is_and[n])
            exact = len(workflow.ids) + inputs <= self.config.max_exact_targets
            self._chances = self._by_first_passages(now) if exact else self._by_most_probable_paths()
            self._read_at = (workflow.version, now)
        return self._chances

    def _by_first_passages(self, now: float) -> dict[str, tuple[float, float]]:
        workflow, rate, durations = self.workflow, self.rate, self.workflow.graph_state.durations
        passage = self._first_passages()
        index = {node: place for place, node in enumerate(self._nodes)}
        sources = [passage.from_start(index[node]) for node in sorted(workflow.expected)]
        for node, calls in workflow.running.items():
            agent = durations[workflow.names[node]]
            pause = agent.pause.discount(rate)
            for began in calls.values():
                sources.append(passage.from_running(index[node], agent.call.discount(rate, now - began) * pause))
        waiting: dict[tuple[int, int], tuple[float, float]] = {}
        exclusive: dict[int, ReuseChance] = {}  # by source: its branches exclude each other, so they are summed
        for (node, successor), prediction in workflow.pending.items():
            left = durations[workflow.names[node]].pause.discount(rate, now - prediction.since)
            validity = workflow.pending.validity(prediction)
            likely = prediction.probability * validity
            if workflow.solver.is_and[successor]:
                waiting[index[node], index[successor]] = (likely, likely * left)
                continue
            row = passage.from_start(index[successor]).after(likely, likely * left)
            if prediction.probability == 1 and len(workflow.branches[node]) > 1:  # a fork
                sources.append(row)
            elif not workflow.is_choice(node):
                so_far = exclusive.get(node, no_chance(passage.targets))
                both = ReuseChance(so_far.reach + row.reach, so_far.reuse + row.reuse)
                exclusive[node] = ReuseChance(np.minimum(1.0, both.reach), np.minimum(1.0, both.reuse))
            elif node not in exclusive:
                # Only in a long pause can another prompt be loaded in place of the agent that was just called.
                long_pause = left < 1 - self.config.min_pause
                factor = workflow.transitions.repeat_factor(passage.agents) if long_pause else 1.0
                exclusive[node] = passage.from_end(index[node], factor).after(validity, validity * left)
        reach, reuse = passage.next_calls([*sources, *exclusive.values()], waiting)
        found = zip(reach.tolist(), reuse.tolist(), strict=True)
        return {workflow.names[node]: chance for node, chance in zip(self._nodes, found, strict=True)}

    def _first_passages(self) -> FirstPassage:
        """The cached passages, unless the structure has changed or durations or transitions have drifted."""
        workflow, drift = self.workflow, self.config.drift
        if self._structure_version != workflow.structure_version:
            self._nodes, self._passage = list(workflow.names), None
            self._durations = [workflow.graph_state.durations[agent] for agent in workflow.names.values()]
            self._structure_version = workflow.structure_version
        rate = self.rate
        discounts = [durations.discount(rate) for durations in self._durations]
        if (
            self._passage is None
            or abs(workflow.accuracy - self._accuracy) > drift
            or workflow.transitions.drift > drift
            or any(not low <= each <= high for each, (low, high) in zip(discounts, self._valid_discounts, strict=True))
        ):
            self._valid_discounts = [_valid_range(each, drift) for each in discounts]
            self._accuracy = workflow.accuracy
            index = {node: place for place, node in enumerate(self._nodes)}
            branches = [{index[t]: p for t, p in workflow.branches[node].items()} for node in self._nodes]
            is_and = [workflow.solver.is_and[node] for node in self._nodes]
            observed = (workflow.transitions.counts(node, workflow.branches[node]) for node in self._nodes)
            transitions = [{index[target]: count for target, count in counts.items()} for counts in observed]
            workflow.transitions.drift = 0.0
            self._passage = FirstPassage(
                branches, is_and, np.array(discounts), self._accuracy, transitions,
                workflow.transitions.config.edge_weight, self.config.tolerance,
            )  # fmt: skip
        return self._passage

    def _by_most_probable_paths(self) -> dict[str, tuple[float, float]]:
        if self._paths is None or self._structure_version != self.workflow.structure_version:
            self._paths = _MostProbablePaths(self.workflow, self.rate)
            self._structure_version = self.workflow.structure_version
        return self._paths.chances()


class _MostProbablePaths:
    """A `JoinSolver` with the nodes of the workflow's own and the edge weights -log(p · E[exp(-γD)])."""

    def __init__(self, workflow: Workflow, rate: float) -> None:
        self.workflow = workflow
        self.solver = JoinSolver()
        self.sources: set[int] = set()
        self.satisfied: set[tuple[int, int]] = set()
        for is_and in workflow.solver.is_and:
            self.solver.add_node(is_and)
        self._rate = rate
        self._drift = workflow.graph_state.config.reuse.drift
        self._durations = {node: workflow.graph_state.durations[workflow.names[node]] for node in workflow.branches}
        self._valid_discounts: dict[int, tuple[float, float]] = {}  # ranges in which the edges' weights are valid

    def _update_weights(self) -> None:
        for node, durations in self._durations.items():
            discount = durations.discount(self._rate)
            low, high = self._valid_discounts.get(node, (math.inf, math.inf))
            if not low <= discount <= high:
                self._valid_discounts[node] = _valid_range(discount, self._drift)
                for target, probability in self.workflow.branches[node].items():
                    self.solver.set_edge(node, target, max(1e-9, -math.log(max(1e-300, probability * discount))))

    def chances(self) -> dict[str, tuple[float, float]]:
        self._update_weights()
        workflow, solver = self.workflow, self.solver
        sources = workflow.expected | workflow.running.keys()
        for node in sources ^ self.sources:
            solver.set_source(node, node in sources)
        for source, target in workflow.pending.keys() ^ self.satisfied:
            solver.satisfy(source, target, (source, target) in workflow.pending)
        self.sources, self.satisfied = set(sources), set(workflow.pending)
        found = {}
        for agent, node in workflow.ids.items():
            again = node in workflow.running and node not in workflow.expected
            reuse = math.exp(-(solver.next_distance(node) if again else solver.distance(node)))
            found[agent] = (float(reuse > 0), reuse)
        return found


def _valid_range(discount: float, drift: float) -> tuple[float, float]:
    """The least and the largest E[exp(-γD)] of durations that differ by no more than `drift`."""
    return discount ** (1 + drift) * (1 - drift), discount ** (1 - drift) * (1 + drift)
