"""Where each agent's fixed prompt lay over the time of a simulation, and when its calls waited and computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..kvcache.base import Status
from ..request import RequestOutput
from ..system import System


@dataclass(frozen=True)
class PlacementInterval:
    """`agent`'s fixed prompt lay in `place` (the value of a `Status`) from `begin` to `end`, in seconds."""

    agent: str
    place: str
    begin: float
    end: float


@dataclass(frozen=True)
class CallSpan:
    """A call of `agent`: seconds of its arrival, its admission, its first token and its end."""

    agent: str
    arrived: float
    admitted: float
    first_token: float
    ended: float


@dataclass
class Timeline:
    """Samples the tree after each step of a simulator; states that last no time are not recorded.

    Attributes:
        agents: whose prompts are sampled. start_s: the clock's time that counts as 0.
        intervals, calls: the records, in seconds from `start_s`.
    """

    agents: list[str] = field(default_factory=list)
    start_s: float = 0.0
    intervals: list[PlacementInterval] = field(default_factory=list)
    calls: list[CallSpan] = field(default_factory=list)
    _system: System | None = None
    _now: dict[str, tuple[str, float]] = field(default_factory=dict)

    def begin(self, system: System, agents: Sequence[str], at: float) -> None:
        """Begins to record the prompts of `agents` at time `at`."""
        self._system, self.agents, self.start_s = system, list(dict.fromkeys(agents)), at
        self._now = {agent: (self._place(agent), 0.0) for agent in self.agents}

    def sample(self, at: float) -> None:
        """Records the placements that have changed by time `at`."""
        at -= self.start_s
        for agent in self.agents:
            before, since = self._now[agent]
            place = self._place(agent)
            if place == before:
                continue
            if at > since:
                self.intervals.append(PlacementInterval(agent, before, since, at))
            self._now[agent] = (place, at)

    def finish(self, at: float) -> None:
        """Records the placements that last until the end of the run, at time `at`."""
        at -= self.start_s
        for agent, (place, since) in self._now.items():
            if at > since:
                self.intervals.append(PlacementInterval(agent, place, since, at))
                self._now[agent] = (place, at)

    def record_call(self, output: RequestOutput) -> None:
        """Records a call that was answered; others are ignored."""
        times, agent = output.times, output.request.agent
        if agent is None or times.admitted is None or times.first_token is None or times.finished is None:
            return
        moments = (times.arrived, times.admitted, times.first_token, times.finished)
        self.calls.append(CallSpan(agent, *(at - self.start_s for at in moments)))

    def _place(self, agent: str) -> str:
        """The slowest place of any part of the prompt: it is on the device once all of it is."""
        assert self._system is not None, "`begin` comes first"
        end = self._system.tiers.lookup_agent(agent)
        if end is None:
            return Status.ABSENT.value
        places = [node.status.value for node in end.path()]
        order = [status.value for status in (Status.GPU, Status.OFFLOADING, Status.LOADING, Status.CPU, Status.DISK)]
        return max(places, key=lambda place: order.index(place) if place in order else len(order))
