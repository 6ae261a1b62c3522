"""What the workflows of one step graph have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .durations import AgentDurations, Duration
from .spec import AgentSpec

if TYPE_CHECKING:
    from .workflow import Workflow


@dataclass
class News:
    """What one reader of the graph has not been told yet: workflows with an event, and agents that left one."""

    workflows: set[Workflow] = field(default_factory=set)
    agents: set[str] = field(default_factory=set)


@dataclass
class Shared:
    """Counters, durations and the index of agents; each workflow writes to them for its own agents and edges.

    Attributes:
        clock: seconds.
        horizon: steps; what is farther is infinitely far.
        default_s: guessed seconds of a call of an agent of which nothing is known.
        max_agents, max_edges: of all workflows together; `agents` and `edges` count them.
        durations: of every agent, whichever workflow calls it; kept when the last of them ends, while there is room.
        calls, pauses: of all agents together.
        members: of every agent, the workflows that have it.
        steps_news, reuse_news: one for each of the two readers.
    """

    clock: Callable[[], float]
    horizon: float
    default_s: float
    max_agents: int
    max_edges: int
    agents: int = 0
    edges: int = 0
    durations: dict[str, AgentDurations] = field(default_factory=dict)
    calls: Duration = field(default_factory=lambda: Duration(0.0, 0.0))
    pauses: Duration = field(default_factory=lambda: Duration(0.0, 0.0))
    members: dict[str, set[Workflow]] = field(default_factory=dict)
    steps_news: News = field(default_factory=News)
    reuse_news: News = field(default_factory=News)

    def joined(self, workflow: Workflow, spec: AgentSpec) -> None:
        """`workflow` has a new agent."""
        if self.agents >= self.max_agents:
            raise ValueError(f"the graph is full: {self.max_agents} agents are accepted in all workflows together")
        self.agents += 1
        self.members.setdefault(spec.name, set()).add(workflow)
        if spec.name not in self.durations:
            self.durations[spec.name] = AgentDurations.guess(spec, self.default_s)
            if spec.call_s is None:
                self.durations[spec.name].call.like = self.calls
            if spec.pause_s is None:
                self.durations[spec.name].pause.like = self.pauses

    def left(self, workflow: Workflow, agent: str) -> None:
        """`workflow` has one agent less."""
        self.agents -= 1
        self.members[agent].discard(workflow)
        if not self.members[agent]:
            del self.members[agent]
            if len(self.durations) > self.max_agents:
                del self.durations[agent]
        for news in (self.steps_news, self.reuse_news):
            news.agents.add(agent)

    def call(self, agent: str, seconds: float) -> None:
        """A call of `agent` took so long."""
        self.durations[agent].call.observe(seconds)
        self.calls.observe(seconds)

    def pause(self, agent: str, seconds: float) -> None:
        """What a call of `agent` led to came so much later."""
        self.durations[agent].pause.observe(seconds)
        self.pauses.observe(seconds)

    def happened(self, workflow: Workflow) -> None:
        self.steps_news.workflows.add(workflow)
        self.reuse_news.workflows.add(workflow)
