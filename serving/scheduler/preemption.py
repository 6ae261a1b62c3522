"""Preemption: when no memory is left for an answer to continue, the request with the lowest claim gives up its own.

Its handle and its reservation are released, and it waits again in its old place, with the answer so far as part of what
is to be computed. Its whole pages are in the tree, and stay there as long as nobody needs their memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..kvcache.eviction_policy import AllocStatus
from .admission import Admission
from .batch import RunningRequests
from .request_memory import RequestMemory
from .request_state import RequestState


@dataclass
class Growth:
    """The requests that needed memory to continue and did not simply get it.

    Attributes:
        stalled: they skip this batch, with what they have; there will be memory once transfers or requests of a higher
            claim have ended, or requests that may not be preempted yet have made progress.
        preempted: they have given up their memory and wait again.
        outgrown: prompt and answer fill the device; they end.
    """

    stalled: set[RequestState] = field(default_factory=set)
    preempted: list[RequestState] = field(default_factory=list)
    outgrown: list[RequestState] = field(default_factory=list)


class Preemption:
    """Gives every decoding request the memory for its next token, the oldest first. Used under the cache's lock.

    The claim of a request is its place in the fair queue within a workflow: its time of arrival, moved by its priority.
    Requests are preempted only for others of a higher claim, so the one with the highest claim always makes progress.
    One that was preempted is not preempted again before it has got a further token, for which it is admitted with
    enough memory: every preemption is paid for with a token, so all requests end.

    Requests whose KV was loaded while others took all places in the batch keep their memory until there is a place. If
    no running request finds memory then, the one with the lowest claim gives up its memory and its place.
    """

    def __init__(self, memory: RequestMemory, running: RunningRequests, admission: Admission) -> None:
        self.memory, self.running, self.admission = memory, running, admission

    def grow(self) -> Growth:
        """Grows the reservations of all decoding requests by a page where their next token needs it."""
        growth, refused = Growth(), list[RequestState]()
        short = [state for state in self.running.decoding if self.memory.available_steps(state) < 1]
        for state in sorted(short, key=self._claim):
            # It may have been preempted meanwhile.
            if state in self.running.decoding and self._grow(state, growth) is AllocStatus.REFUSED:
                refused.append(state)
        waits = bool(self.admission.loading.ready)
        if waits and refused and len(refused) == len(self.running):
            self._preempt(max(refused, key=self._claim), growth)
        return growth

    def _grow(self, state: RequestState, growth: Growth) -> AllocStatus:
        """Grows one reservation; returns the last status, READY also if the request has outgrown the device."""
        while (status := self.memory.grow(state)) is not AllocStatus.READY:
            if status is AllocStatus.REFUSED and self.memory.exceeds_device(state):
                self.running.remove(state)
                growth.outgrown.append(state)
                return AllocStatus.READY
            victim = self._victim(state) if status is AllocStatus.REFUSED else None
            if victim is None:
                growth.stalled.add(state)
                return status
            self._preempt(victim, growth)
        return status

    def _preempt(self, victim: RequestState, growth: Growth) -> None:
        self.running.remove(victim)
        self.admission.preempt(victim)
        growth.stalled.discard(victim)
        growth.preempted.append(victim)

    def _victim(self, state: RequestState) -> RequestState | None:
        """The request with the lowest claim that may be preempted for `state`; its own claim must be higher."""
        claim = self._claim(state)
        victims = [other for other in self._admitted() if other.preemptible and self._claim(other) > claim]
        return max(victims, key=self._claim, default=None)

    def _admitted(self) -> Iterator[RequestState]:
        yield from self.running
        yield from self.admission.loading
        yield from self.admission.loading.ready

    def _claim(self, state: RequestState) -> tuple[float, int]:
        """Orders requests by their claims, the highest first."""
        window = self.memory.config.priority_window_s
        return state.times.arrived - window * state.request.priority, state.number
