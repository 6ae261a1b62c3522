"""How soon each agent of a running workflow is called again: the state of a `Workflow` read into chances."""

from __future__ import annotations

import math

import numpy as np

from .durations import AgentDurations
from .expected import Chance, FirstPassage, nothing
from .solver import JoinSolver
from .workflow import Workflow

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
