"""What was where when: the place of every agent's fixed prompt over time, its calls, and what they waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..node import Status
from ..scheduling.request import Ended
from ..systems import System


@dataclass(frozen=True)
class Stretch:
    """`agent`'s fixed prompt was in this place from `begin` to `end`, seconds."""

    agent: str
    place: str
    begin: float
    end: float


@dataclass(frozen=True)
class CallSpan:
    """A call of `agent`: seconds at which it arrived, could be computed, gave its first token, and ended."""

    agent: str
    arrived: float
    admitted: float
    first_token: float
    ended: float


@dataclass
class Timeline:
    """Looks at the tree whenever the driver has done something; what lasted no time is not seen.

    Attributes:
        agents: whose prompts are looked at. start_s: the time that counts as 0.
        stretches, calls: what was found, in seconds from there.
    """

    agents: list[str] = field(default_factory=list)
    start_s: float = 0.0
    stretches: list[Stretch] = field(default_factory=list)
    calls: list[CallSpan] = field(default_factory=list)
    _system: System | None = None
    _now: dict[str, tuple[str, float]] = field(default_factory=dict)

    def begin(self, system: System, agents: Sequence[str], at: float) -> None:
        """Begins to look at the prompts of `agents`."""
        self._system, self.agents, self.start_s = system, list(dict.fromkeys(agents)), at
        self._now = {agent: (self._place(agent), 0.0) for agent in self.agents}

    def look(self, at: float) -> None:
        """Notes what has changed by the time `at`."""
        at -= self.start_s
        for agent in self.agents:
            before, since = self._now[agent]
            place = self._place(agent)
            if place != before:
                self._note(agent, before, since, at)
                self._now[agent] = (place, at)

    def ended(self, ended: Ended) -> None:
        """Notes a call that was answered."""
        times, agent = ended.times, ended.request.agent
        if agent is None or times.admitted is None or times.first_token is None or times.ended is None:
            return
        self.calls.append(
            CallSpan(
                agent, *(at - self.start_s for at in (times.arrived, times.admitted, times.first_token, times.ended))
            )
        )

    def finish(self, at: float) -> None:
        """Ends the last stretches."""
        for agent, (place, since) in self._now.items():
            self._note(agent, place, since, at - self.start_s)
        self._now = {}

    def _note(self, agent: str, place: str, begin: float, end: float) -> None:
        if end > begin:
            self.stretches.append(Stretch(agent, place, begin, end))

    def _place(self, agent: str) -> str:
        """The slowest place of a part of the prompt: it is on the device when all of it is."""
        assert self._system is not None, "begun"
        end = self._system.tiers.tree.ends.get(agent)
        if end is None:
            return Status.ABSENT.value
        places = [node.status.value for node in end.path()]
        order = [status.value for status in (Status.GPU, Status.OFFLOADING, Status.LOADING, Status.CPU, Status.DISK)]
        return max(places, key=lambda place: order.index(place) if place in order else len(order))
