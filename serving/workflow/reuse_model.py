"""Expected discounted reuse: E[exp(-γT)], T the time until an agent's next call, of a workflow's graph.

exp(-γT) is the chance that a clock which rings after an exponential time of mean 1/γ rings after the call; so all of it
is a calculation with chances. Two numbers describe an event: `reach`, the chance that it ever happens, and `reuse`,
the chance that it happens before the clock rings; reuse / reach tells how soon it is if it happens.

* One after another: the chances multiply; a duration D contributes E[exp(-γD)]. With branches only (one of the edges is
  taken), first passages solve the linear system of semi-Markov processes (Pyke, Markov renewal processes, Ann. Math.
  Stat. 32, 1961), q_w(x) = E[exp(-γD_w)] · Σ_y p_wy (1 if y = x else q_y(x)), and the result is exact.
* What the edges say is true with the chance `accuracy`; otherwise any agent may be called, each with the same chance.
  That is believed as much as so many calls that were seen (`TransitionCounts`). Both are for ways of which one is
  taken; forks, all of whose ways are taken, are believed.
* The first of several (OR, forks, calls that run at once), taken as independent: wait for the sooner one if it comes at
  all, else for the other (`first_of`). It is never above the true value, which may use whichever happens to be first,
  nor below any single one.
* The last of several (AND), taken as independent: all must come, and the latest in the mean decides (`last_of`); never
  below the true value, E[exp(-γ max T)] <= min E[exp(-γT)].

Not seen: dependence between branches of a fork (they may share a past), and tails that `durations` does not describe.

How soon each agent of a running workflow is called again: the state of a `Workflow` read into chances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .durations import AgentDurations
from .steps_solver import JoinSolver
from .workflow import TRUST, Workflow

TOLERANCE = 1e-6


class Chance(NamedTuple):
    """Float64 arrays of one shape, 0 <= reuse <= reach <= 1."""

    reach: np.ndarray
    reuse: np.ndarray

    def scaled(self, reach: float, reuse: float) -> Chance:
        """After something else that has these chances."""
        return Chance(self.reach * reach, self.reuse * reuse)


def nothing(*shape: int) -> Chance:
    return Chance(np.zeros(shape), np.zeros(shape))


def first_of(one: Chance, other: Chance) -> Chance:
    """Either of two independent events, whichever is sooner in the mean counting if both happen."""
    sooner = np.maximum(
        one.reuse + (1 - one.reach) * other.reuse,
        other.reuse + (1 - other.reach) * one.reuse,
    )
    return Chance(1 - (1 - one.reach) * (1 - other.reach), sooner)


def last_of(reach: np.ndarray, reuse: np.ndarray) -> tuple[float, float]:
    """All of several independent events, arrays `(events,)`: reach and reuse of the last one."""
    if not reach.all():
        return 0.0, 0.0
    return float(reach.prod()), float(reach.prod() * (reuse / reach).min())


class FirstPassage:
    """Chances that a call leads to the first later call of each agent.

    AND joins let nothing pass: the edges into them are targets of their own, which `chances` joins. So the targets are
    the agents 0 .. n-1 and then these edges.

    Args:
        branches: for each agent, its successors and the probabilities of the edges; those below 1 exclude each other.
        is_and: for each agent.
        legs: for each agent, E[exp(-γ(call + pause))], float64 `(agents,)`.
        accuracy: the chance that a call which an edge foretells comes, and not another one.
        followed: for each agent, how often which ones have followed it (`TransitionCounts.counts`).
    Attributes:
        after: chances `(agents, targets)` of the target's first call after one of the agent that begins now.
        onward: the same, counted from the end of the agent's call and pause.
        anywhere: for each agent, the chance that after its call any certain one comes for no reason.
        gates: for each AND agent, for each predecessor, the target that stands for the edge.
    """

    def __init__(
        self,
        branches: Sequence[Mapping[int, float]],
        is_and: Sequence[bool],
        legs: np.ndarray,
        accuracy: float = 1.0,
        followed: Sequence[Mapping[int, float]] = (),
    ) -> None:
        self.agents = len(branches)
        self.legs = legs
        self.gates: dict[int, dict[int, int]] = {agent: {} for agent in range(self.agents) if is_and[agent]}
        self.targets = self.agents
        exclusive: list[tuple[int, int, float]] = []
        always: list[list[int]] = [[] for _ in branches]
        for agent, row in enumerate(branches):
            scale = max(1.0, sum(p for p in row.values() if p < 1))
            for successor, probability in row.items():
                target = successor
                if is_and[successor]:
                    target = self.gates[successor][agent] = self.targets
                    self.targets += 1
                if probability < 1:
                    exclusive.append((agent, target, probability / scale))
                else:
                    always[agent].append(target)
        choice = np.zeros((self.agents, self.targets))
        for agent, target, probability in exclusive:
            choice[agent, target] = probability
        for agent in range(self.agents):
            if len(always[agent]) == 1 and not choice[agent].any():  # one sure way is a branch of probability 1
                choice[agent, always[agent].pop()] = 1.0
        self.anywhere = (1 - accuracy) * choice.sum(1) / max(1, self.agents)
        choice *= accuracy
        choice[:, : self.agents] += self.anywhere[:, None]
        for agent, counts in enumerate(followed):
            total = TRUST + sum(counts.values())
            choice[agent] *= TRUST / total
            self.anywhere[agent] *= TRUST / total
            for target, count in counts.items():
                choice[agent, target] += count / total
        width = max(map(len, always), default=0)
        forks = np.full((self.agents, width), self.targets)  # filled up with a row of zeros
        for agent, row in enumerate(always):
            forks[agent, : len(row)] = row
        self.onward = self._by_rounds(choice, forks) if width else self._by_visits(choice)
        self.after = Chance(self.onward.reach, self.onward.reuse * legs[:, None])

    def _by_visits(self, choice: np.ndarray) -> Chance:
        """Without forks: the expected number of arrivals at each target is a linear system, and that of all arrivals is
        the chance of a first one times that of the arrivals from there on (Pyke 1961, renewal equation).

        An endless cycle has endlessly many arrivals, so a call counts a little less than 1 at the most.
        """
        most, found = np.full(self.agents, 1 - 0.01 * TOLERANCE), []
        for legs in (most, np.minimum(most, self.legs)):
            arrivals = np.linalg.solve(np.eye(self.agents) - choice[:, : self.agents] * legs, choice)
            arrivals[:, : self.agents] /= 1 + legs * arrivals[: self.agents, : self.agents].diagonal()
            found.append(np.clip(arrivals, 0.0, 1.0))
        reach, reuse = found
        reach[reach > 1 - TOLERANCE] = 1.0
        return Chance(reach, np.minimum(reuse, reach))

    def _by_rounds(self, choice: np.ndarray, forks: np.ndarray) -> Chance:
        """Rounds from zero up: the least solution, which is the first passage also where a cycle never ends.

        A round is a call; those beyond the last round, which nothing here waits for, are not counted in `reach`.
        """
        onward = nothing(self.agents, self.targets)
        arrived = np.zeros((self.targets + 1, self.targets))
        own = np.arange(self.targets)
        arrived[own, own] = 1.0
        entered = Chance(arrived, arrived.copy())  # the chances of each target once something arrives at a target
        agents = own[: self.agents]
        for _ in range(4 * self.agents + 200):
            step = Chance(choice @ entered.reach[:-1], choice @ entered.reuse[:-1])
            for column in forks.T:
                step = first_of(step, Chance(entered.reach[column], entered.reuse[column]))
            still = np.abs(step.reach - onward.reach).max(initial=0.0) < TOLERANCE
            still = still and bool((np.abs(step.reuse - onward.reuse) <= TOLERANCE * step.reuse).all())
            onward = step
            if still:
                break
            entered.reach[: self.agents] = onward.reach
            entered.reuse[: self.agents] = onward.reuse * self.legs[:, None]
            for table in entered:
                table[agents, agents] = 1.0
        return onward

    def beginning(self, agent: int) -> Chance:
        """Chances `(targets,)` from a call of `agent` that begins now, itself included."""
        row = Chance(self.after.reach[agent].copy(), self.after.reuse[agent].copy())
        row.reach[agent] = row.reuse[agent] = 1.0
        return row

    def ended(self, agent: int, repeating: float = 1.0) -> Chance:
        """Chances `(targets,)` from the end of a call and of the pause after it.

        Args:
            repeating: how many times as likely as others the agent is to be called for no reason.
        """
        row = Chance(self.onward.reach[agent].copy(), self.onward.reuse[agent].copy())
        for each in row:
            each[agent] = min(1.0, max(0.0, each[agent] + (repeating - 1) * self.anywhere[agent]))
        return row

    def running(self, agent: int, left: float) -> Chance:
        """Chances `(targets,)` from a call under way; `left`: E[exp(-γ · what is left of it and of its pause)]."""
        return Chance(self.onward.reach[agent], self.onward.reuse[agent] * left)

    def chances(self, sources: Sequence[Chance], waiting: Mapping[tuple[int, int], tuple[float, float]]) -> Chance:
        """Chances `(agents,)` of each agent's next call.

        Args:
            sources: what is under way, each as chances `(targets,)`.
            waiting: for edges (predecessor, AND agent) that are marked: reach and reuse of the rest of the pause.
        """
        base = sources[0] if sources else nothing(self.targets)
        for source in sources[1:]:
            base = first_of(base, source)
        if not self.gates:
            return Chance(base.reach[: self.agents], base.reuse[: self.agents])
        joined = dict.fromkeys(self.gates, (0.0, 0.0))
        total = base
        for _ in range(len(self.gates) + 20):  # one more for each join that follows another, and some for cycles
            total = base
            for agent, (reach, reuse) in joined.items():
                if reach:
                    total = first_of(total, self.beginning(agent).scaled(reach, reuse))
            before, joined = joined, {agent: self._join(agent, total, waiting) for agent in self.gates}
            if all(abs(a - b) < TOLERANCE for g in joined for a, b in zip(joined[g], before[g], strict=True)):
                break
        return Chance(total.reach[: self.agents], total.reuse[: self.agents])

    def _join(
        self, agent: int, total: Chance, waiting: Mapping[tuple[int, int], tuple[float, float]]
    ) -> tuple[float, float]:
        gates = self.gates[agent]
        if not gates:
            return 0.0, 0.0
        ways = [waiting.get((p, agent), (total.reach[gate], total.reuse[gate])) for p, gate in gates.items()]
        reach, reuse = np.array(ways).T
        return last_of(reach, reuse)


EXACT_TARGETS = 128  # agents and edges into AND joins up to which first passages are solved; beyond: best paths
DRIFT = 0.01  # change of a duration, as a share of it and of 1/γ, that makes old first passages useless; of an accuracy
STALE = 0.05  # of 1/γ: what was read so long ago is read again
MOMENT = 0.1  # of 1/γ: in so long a pause nothing can be brought up


class WorkflowReuse:
    """Reads one workflow; what it reads is kept until an event, or until it is stale.

    Larger workflows (`EXACT_TARGETS`) are not summed over paths: the chance of an agent is that of the most probable
    path to it, in an AND of the least probable one. That is a lower bound without ANDs, and found like steps, with the
    weights -log(p · E[exp(-γD)]); `reach` is then 1.

    Args:
        rate: γ in 1/s.
    """

    def __init__(self, workflow: Workflow, rate: float) -> None:
        self.workflow = workflow
        self.rate = rate
        self._chances: dict[str, tuple[float, float]] = {}
        self._read = (-1, -math.inf)
        self._passage: FirstPassage | None = None
        self._paths: _BestPaths | None = None
        self._structure = -1
        self._nodes: list[int] = []
        self._durations: list[AgentDurations] = []  # of these
        self._legs: list[tuple[float, float]] = []  # the least and the largest that the kept passages are good for
        self._accuracy = 1.0  # that they were found with

    def chances(self) -> dict[str, tuple[float, float]]:
        """Of each agent, reach and reuse: the chance that it is called again, and E[exp(-γT)]."""
        workflow, now = self.workflow, self.workflow.shared.clock()
        version, at = self._read
        if version != workflow.version or abs(now - at) * self.rate > STALE:
            gates = sum(len(workflow.solver.predecessors[n]) for n in workflow.names if workflow.solver.is_and[n])
            exact = len(workflow.ids) + gates <= EXACT_TARGETS
            self._chances = self._by_first_passages(now) if exact else self._by_best_paths()
            self._read = (workflow.version, now)
        return self._chances

    def _by_first_passages(self, now: float) -> dict[str, tuple[float, float]]:
        workflow, rate, durations = self.workflow, self.rate, self.workflow.shared.durations
        passage = self._first_passages()
        index = {node: place for place, node in enumerate(self._nodes)}
        sources = [passage.beginning(index[node]) for node in sorted(workflow.expected)]
        for node, calls in workflow.running.items():
            agent = durations[workflow.names[node]]
            pause = agent.pause.discount(rate)
            for began in calls.values():
                left = agent.call.discount(rate, now - began) * pause
                sources.append(passage.running(index[node], left))
        waiting: dict[tuple[int, int], tuple[float, float]] = {}
        pending: dict[int, Chance] = {}  # the branches of one agent exclude each other: they are summed
        for (node, successor), mark in workflow.marks.items():
            left = durations[workflow.names[node]].pause.discount(rate, now - mark.since)
            likely = mark.probability * workflow.marks.valid(mark)
            chance = (likely, likely * left)
            if workflow.solver.is_and[successor]:
                waiting[index[node], index[successor]] = chance
                continue
            row = passage.beginning(index[successor]).scaled(*chance)
            if mark.probability == 1 and len(workflow.branches[node]) > 1:  # a fork
                sources.append(row)
            elif not workflow.is_choice(node):
                so_far = pending.get(node, nothing(passage.targets))
                both = Chance(so_far.reach + row.reach, so_far.reuse + row.reuse)
                pending[node] = Chance(np.minimum(1.0, both.reach), np.minimum(1.0, both.reuse))
            elif node not in pending:
                # What is brought up in the place of the agent that was just called must be there before the next call.
                repeating = workflow.followed.repeating(passage.agents) if left < 1 - MOMENT else 1.0
                valid = workflow.marks.valid(mark)
                pending[node] = passage.ended(index[node], repeating).scaled(valid, valid * left)
        reach, reuse = passage.chances([*sources, *pending.values()], waiting)
        found = zip(reach.tolist(), reuse.tolist(), strict=True)
        return {workflow.names[node]: chance for node, chance in zip(self._nodes, found, strict=True)}

    def _first_passages(self) -> FirstPassage:
        """The kept ones, unless the graph is another one or the durations have moved."""
        workflow = self.workflow
        if self._structure != workflow.structure:
            self._nodes, self._passage = list(workflow.names), None
            self._durations = [workflow.shared.durations[agent] for agent in workflow.names.values()]
            self._structure = workflow.structure
        rate = self.rate
        legs = [durations.discount(rate) for durations in self._durations]
        if (
            self._passage is None
            or abs(workflow.accuracy - self._accuracy) > DRIFT
            or workflow.followed.moved > DRIFT
            or any(not least <= leg <= most for leg, (least, most) in zip(legs, self._legs, strict=True))
        ):
            self._legs = [_near(leg) for leg in legs]
            self._accuracy = workflow.accuracy
            index = {node: place for place, node in enumerate(self._nodes)}
            branches = [{index[t]: p for t, p in workflow.branches[node].items()} for node in self._nodes]
            is_and = [workflow.solver.is_and[node] for node in self._nodes]
            seen = (workflow.followed.counts(node, workflow.branches[node]) for node in self._nodes)
            followed = [{index[target]: count for target, count in counts.items()} for counts in seen]
            workflow.followed.moved = 0.0
            self._passage = FirstPassage(branches, is_and, np.array(legs), self._accuracy, followed)
        return self._passage

    def _by_best_paths(self) -> dict[str, tuple[float, float]]:
        if self._paths is None or self._structure != self.workflow.structure:
            self._paths = _BestPaths(self.workflow, self.rate)
            self._structure = self.workflow.structure
        return self._paths.chances()


class _BestPaths:
    """A second solver beside the workflow's own, with the same nodes."""

    def __init__(self, workflow: Workflow, rate: float) -> None:
        self.workflow = workflow
        self.solver = JoinSolver()
        self.sources: set[int] = set()
        self.satisfied: set[tuple[int, int]] = set()
        for is_and in workflow.solver.is_and:
            self.solver.add_node(is_and)
        self._rate = rate
        self._durations = {node: workflow.shared.durations[workflow.names[node]] for node in workflow.branches}
        self._legs: dict[int, tuple[float, float]] = {}  # between which an edge's weight is good

    def _weigh(self) -> None:
        """Edges get the weights of durations that have moved."""
        for node, durations in self._durations.items():
            leg, (least, most) = durations.discount(self._rate), self._legs.get(node, (math.inf, math.inf))
            if not least <= leg <= most:
                self._legs[node] = _near(leg)
                for target, probability in self.workflow.branches[node].items():
                    self.solver.set_edge(node, target, max(1e-9, -math.log(max(1e-300, probability * leg))))

    def chances(self) -> dict[str, tuple[float, float]]:
        self._weigh()
        workflow, solver = self.workflow, self.solver
        sources = workflow.expected | workflow.running.keys()
        for node in sources ^ self.sources:
            solver.set_source(node, node in sources)
        for source, target in workflow.marks.keys() ^ self.satisfied:
            solver.satisfy(source, target, (source, target) in workflow.marks)
        self.sources, self.satisfied = set(sources), set(workflow.marks)
        found = {}
        for agent, node in workflow.ids.items():
            again = node in workflow.running and node not in workflow.expected
            reuse = math.exp(-(solver.next_distance(node) if again else solver.distance(node)))
            found[agent] = (float(reuse > 0), reuse)
        return found


def _near(leg: float) -> tuple[float, float]:
    """The least and the largest E[exp(-γD)] of durations that are by no more than `DRIFT` other ones."""
    return leg ** (1 + DRIFT) * (1 - DRIFT), leg ** (1 - DRIFT) * (1 + DRIFT)
