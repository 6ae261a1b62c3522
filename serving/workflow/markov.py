"""Without a graph: who follows whom, learned from the sequence of calls while it is served."""

from __future__ import annotations

from collections.abc import Hashable

from .graph import StepGraph
from .spec import check_name
from .workflow import Workflow

RESOLUTION = 0.01  # what an edge's probability may be off by: nothing that was found with the old one is found anew


class LearnedTransitions:
    """A first-order Markov model of the calls of all sessions, kept as one workflow of a step graph.

    Every call of an agent that leads to another one multiplies the agent's counts by `decay` and adds 1 to what
    followed, so that old habits fade (half of them after ln 2 / (1 - decay) calls). The edge has the probability
    count / (sum of counts + prior); what `prior` leaves over is for agents not seen yet. A session is one call under
    way, from the start of one agent to that of the next, so the graph's steps, seconds and reuse mean the same as with
    a declared graph. Where a call depends on more than the one before it, the model does not see it.

    Args:
        graph: gets the workflow `name`, which nothing else may change.
        decay: above 0, at most 1.
        prior: calls that unseen agents are counted for.
        floor: probability below which an edge is left out.
        max_agents: beyond, the agent whose last call is the longest ago is forgotten.
        max_successors: of one agent; beyond, the least frequent is forgotten.
        max_sessions: beyond, the session whose last call is the longest ago counts as ended.
    """

    def __init__(
        self,
        graph: StepGraph,
        name: str = "learned",
        *,
        decay: float = 0.98,
        prior: float = 0.5,
        floor: float = 0.02,
        max_agents: int = 1000,
        max_successors: int = 32,
        max_sessions: int = 10_000,
    ) -> None:
        if not (0 < decay <= 1 and prior > 0 and 0 < floor < 1):
            raise ValueError(
                f"got decay={decay}, prior={prior}, floor={floor}; accepted: 0 < decay <= 1, prior > 0, 0 < floor < 1"
            )
        if min(max_successors, max_sessions) < 1 or max_agents < 2:
            raise ValueError(
                f"got max_agents={max_agents}, max_successors={max_successors}, max_sessions={max_sessions}; accepted: "
                "2 or more agents, 1 or more of the others"
            )
        self.workflow: Workflow = graph.add_workflow(name)
        self.workflow.lasting = True
        self.decay, self.prior, self.floor = decay, prior, floor
        self.max_agents, self.max_successors, self.max_sessions = max_agents, max_successors, max_sessions
        self._counts: dict[str, dict[str, float]] = {}  # the order of the keys is that of the last calls
        self._ended: dict[str, float] = {}  # how often nothing followed, decayed in the same way
        self._sessions: dict[Hashable, str] = {}  # the same order

    def observe(self, session: Hashable, agent: str) -> None:
        """`session` calls `agent` now."""
        check_name(agent, "an agent")
        if agent not in self._counts:
            self._admit(agent, keep=self._sessions.get(session))
        before = self._sessions.pop(session, None)
        if before is None and len(self._sessions) >= self.max_sessions:
            self.end(next(iter(self._sessions)))
        self._counts[agent] = self._counts.pop(agent)
        if before is not None:
            self._learn(before, agent)
            self._leave(before, agent, session)
        self.workflow.start(agent, session)
        self._sessions[session] = agent

    def end(self, session: Hashable) -> None:
        """`session` makes no further call; an unknown one is none of our business."""
        before = self._sessions.pop(session, None)
        if before is not None:
            self._learn(before, None)
            self.workflow.finish(before, session, chose=())

    def probability(self, agent: str, successor: str) -> float:
        """That `successor` follows `agent`."""
        counts = self._counts.get(agent, {})
        total = sum(counts.values()) + self._ended.get(agent, 0.0) + self.prior
        return counts.get(successor, 0.0) / total

    def _learn(self, agent: str, successor: str | None) -> None:
        counts = self._counts[agent]
        for other in counts:
            counts[other] *= self.decay
        self._ended[agent] = self._ended.get(agent, 0.0) * self.decay + (successor is None)
        if successor is not None:
            counts[successor] = counts.get(successor, 0.0) + 1.0
            if len(counts) > self.max_successors:
                del counts[min(counts, key=lambda name: (name == successor, counts[name]))]
        workflow = self.workflow
        known = {workflow.names[node]: p for node, p in workflow.branches[workflow.ids[agent]].items()}
        for other in known.keys() | counts.keys():
            probability = self.probability(agent, other)
            if probability < self.floor:
                if other in known:
                    workflow.remove_edge(agent, other)
            elif abs(probability - known.get(other, 0.0)) >= RESOLUTION and (other in known or workflow.can_add_edge()):
                workflow.add_edge(agent, other, probability)

    def _leave(self, before: str, agent: str, session: Hashable) -> None:
        """The call of `before` is over and led to `agent`, whether or not there is an edge."""
        edges = self.workflow.branches[self.workflow.ids[before]]
        self.workflow.finish(before, session, chose=[agent] if self.workflow.ids[agent] in edges else ())

    def _admit(self, agent: str, keep: str | None) -> None:
        if len(self._counts) >= self.max_agents:
            self._forget(next(name for name in self._counts if name != keep))
        self.workflow.add_agent(agent)
        self._counts[agent] = {}

    def _forget(self, agent: str) -> None:
        for session in [s for s, last in self._sessions.items() if last == agent]:
            del self._sessions[session]
        self.workflow.remove_agent(agent)
        del self._counts[agent]
        self._ended.pop(agent, None)
        for counts in self._counts.values():
            counts.pop(agent, None)
