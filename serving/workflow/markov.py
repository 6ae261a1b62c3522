"""Learns a step graph from observed call sequences, for sessions without a declared workflow."""

from __future__ import annotations

from collections.abc import Hashable

from .graph import StepGraph
from .graph_config import MarkovConfig
from .spec import check_name
from .workflow import Workflow


class LearnedTransitions:
    """A first-order Markov model of the calls of all sessions, stored as one workflow of a step graph.

    Every call of an agent that leads to another one multiplies the agent's counts by `decay` and adds 1 to that of the
    successor, so old habits fade. The edge has the probability count / (sum of counts + prior); `prior` leaves room
    for agents not seen yet. A session is one call in progress, from the start of one agent to that of the next, so the
    graph's steps, seconds and reuse mean the same as with a declared graph. Dependence on more than the previous call
    is not modelled.

    Args:
        graph: gets the workflow `name`, which nothing else may change.

    Raises:
        ValueError: the graph has a workflow of that name, or is full.
    """

    def __init__(self, graph: StepGraph, name: str = "learned", config: MarkovConfig | None = None) -> None:
        self.config = config or MarkovConfig()
        self.workflow: Workflow = graph.add_workflow(name)
        self.workflow.persistent = True
        self._counts: dict[str, dict[str, float]] = {}  # least recently called first
        self._ended: dict[str, float] = {}  # decayed counts of calls that nothing followed
        self._sessions: dict[Hashable, str] = {}  # the agent called last, least recently active session first

    def observe(self, session: Hashable, agent: str) -> None:
        """`session` calls `agent` now.

        Raises:
            ValueError: an invalid name, or the graph is full.
        """
        check_name(agent, "an agent")
        if agent not in self._counts:
            self._add_agent(agent, keep=self._sessions.get(session))
        before = self._sessions.pop(session, None)
        if before is None and len(self._sessions) >= self.config.max_sessions:
            self.end(next(iter(self._sessions)))
        self._counts[agent] = self._counts.pop(agent)
        if before is not None:
            self._learn(before, agent)
            self._finish_call(before, agent, session)
        self.workflow.start(agent, session)
        self._sessions[session] = agent

    def end(self, session: Hashable) -> None:
        """`session` makes no further call; unknown sessions are ignored."""
        before = self._sessions.pop(session, None)
        if before is not None:
            self._learn(before, None)
            self.workflow.finish(before, session, chose=())

    def probability(self, agent: str, successor: str) -> float:
        """Probability that `successor` follows `agent`."""
        counts = self._counts.get(agent, {})
        total = sum(counts.values()) + self._ended.get(agent, 0.0) + self.config.prior
        return counts.get(successor, 0.0) / total

    def _learn(self, agent: str, successor: str | None) -> None:
        counts, decay = self._counts[agent], self.config.decay
        for other in counts:
            counts[other] *= decay
        self._ended[agent] = self._ended.get(agent, 0.0) * decay + (successor is None)
        if successor is not None:
            counts[successor] = counts.get(successor, 0.0) + 1.0
            if len(counts) > self.config.max_successors:
                del counts[min(counts, key=lambda name: (name == successor, counts[name]))]
        workflow = self.workflow
        known = {workflow.names[node]: p for node, p in workflow.branches[workflow.ids[agent]].items()}
        for other in known.keys() | counts.keys():
            probability = self.probability(agent, other)
            off = abs(probability - known.get(other, 0.0))
            if probability < self.config.min_probability:
                if other in known:
                    workflow.remove_edge(agent, other)
            elif off >= self.config.resolution and (other in known or workflow.can_add_edge()):
                workflow.add_edge(agent, other, probability)

    def _finish_call(self, before: str, agent: str, session: Hashable) -> None:
        """Ends the call of `before`, which led to `agent` with or without an edge."""
        edges = self.workflow.branches[self.workflow.ids[before]]
        self.workflow.finish(before, session, chose=[agent] if self.workflow.ids[agent] in edges else ())

    def _add_agent(self, agent: str, keep: str | None) -> None:
        if len(self._counts) >= self.config.max_agents:
            self._remove_agent(next(name for name in self._counts if name != keep))
        self.workflow.add_agent(agent)
        self._counts[agent] = {}

    def _remove_agent(self, agent: str) -> None:
        for session in [s for s, last in self._sessions.items() if last == agent]:
            del self._sessions[session]
        self.workflow.remove_agent(agent)
        del self._counts[agent]
        self._ended.pop(agent, None)
        for counts in self._counts.values():
            counts.pop(agent, None)
