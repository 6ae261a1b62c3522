"""The loop that stands where an engine stands: it asks the scheduler for work and lets time pass instead of computing.

Everything that decides is the real thing: tree, tiers, orders, prefetcher, scheduler and step graph. Here are only the
clock, the seconds of a batch, and the arrivals.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ..payload import Phantom
from ..scheduling.request import Ended, Request, RequestOutcome
from ..scheduling.work import Decode
from ..spec import WorkflowSpec
from ..systems import System
from ..virtual import VirtualClock
from .costs import Batch
from .machine import CountedCopies, Machine
from .recording import RecordedScheduler, TraceRecorder, batch_of

if TYPE_CHECKING:
    from ..scheduling.work import Work
    from .timeline import Timeline

MAX_STEPS = 1_000_000


@dataclass(frozen=True)
class Ask:
    """A request that is to be submitted.

    Attributes:
        answer: tokens after which its answer ends, at most `request.max_new_tokens`.
    """

    request: Request
    answer: int


class Source(Protocol):
    """Who asks."""

    @property
    def declared(self) -> Sequence[WorkflowSpec]:
        """The workflows that the server has been told of when `begin` returns."""
        ...

    def begin(self, system: System) -> list[tuple[float, Ask]]:
        """Declares workflows; returns what comes without anything before it, with the times of arrival."""
        ...

    def submitting(self, ask: Ask) -> None:
        """Called just before a request is submitted."""
        ...

    def ended(self, ended: Ended) -> list[tuple[float, Ask]]:
        """What follows a request that has ended, with the times of arrival."""
        ...


@dataclass
class Run:
    """What a simulation has found.

    Attributes:
        system: as it was left. ended: all requests, in the order of their ends.
        begin_s, end_s: on the virtual clock, of the first arrival and the last end.
        events: what a simulation step by step would have to visit: arrivals, admissions, loads, chunks, tokens
            decoded, stores, ends, and parts of copies. decisions: of these, what this one visited singly, with all
            tokens of one piece of work counted as one.
        cpu_s: seconds of the processor that the simulation took.
    """

    system: System
    ended: list[Ended] = field(default_factory=list)
    begin_s: float = 0.0
    end_s: float = 0.0
    events: int = 0
    decisions: int = 0
    cpu_s: float = 0.0

    @property
    def makespan_s(self) -> float:
        return self.end_s - self.begin_s


class Driver:
    """Runs sources, one after the other, on one system.

    Args:
        recorder: is told what happens; timeline: looks at where the agents' prompts are after each step.
    """

    def __init__(
        self,
        machine: Machine,
        system: System,
        clock: VirtualClock,
        recorder: TraceRecorder | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.machine, self.system, self.clock = machine, system, clock
        self.recorder, self.timeline = recorder, timeline
        self.scheduler = system.scheduler if recorder is None else RecordedScheduler(system.scheduler, recorder)
        self._arrivals: list[tuple[float, int, Ask]] = []
        self._short: dict[str, int] = {}  # answers that end before `max_new_tokens`
        self._number = 0

    def run(self, source: Source) -> Run:
        """Until nothing is left to be done.

        Raises:
            RuntimeError: requests are left that nothing will ever bring forward.
        """
        scheduler = self.scheduler
        run = Run(self.system, begin_s=self.clock.now, end_s=self.clock.now)
        began, counted = time.process_time(), self._events()
        decoded, decisions = scheduler.statistics.decoded, 0
        self._expect(source.begin(self.system))
        if self.recorder is not None:
            for spec in source.declared:
                self.recorder.workflow(self.clock.now, spec)
        while True:
            self._submit(source)
            work = scheduler.next_work(max_steps=MAX_STEPS)
            decisions += 1
            self._collect(source, run)
            if self.timeline is not None:
                self.timeline.look(self.clock.now)
            if work is not None:
                self._compute(work)
                continue
            due = self._next_time()
            if due is None or (not self._arrivals and not len(scheduler)):
                break
            self.clock.advance_to(due)
        if len(scheduler):
            raise RuntimeError(f"{len(scheduler)} requests are left and nothing will bring them forward")
        run.cpu_s = time.process_time() - began
        run.events = self._events() - counted
        run.decisions = run.events - (scheduler.statistics.decoded - decoded) + decisions
        return run

    def _events(self) -> int:
        mover = self.system.tiers.transfers.mover
        assert isinstance(mover, CountedCopies), "the system was built by a Machine"
        return self.system.scheduler.statistics.events + mover.parts

    def _expect(self, asks: list[tuple[float, Ask]]) -> None:
        for at, ask in asks:
            self._number += 1
            heapq.heappush(self._arrivals, (max(at, self.clock.now), self._number, ask))

    def _submit(self, source: Source) -> None:
        while self._arrivals and self._arrivals[0][0] <= self.clock.now:
            ask = heapq.heappop(self._arrivals)[2]
            source.submitting(ask)
            if ask.answer < ask.request.max_new_tokens:
                self._short[ask.request.id] = ask.answer
            self.scheduler.submit(ask.request)

    def _collect(self, source: Source, run: Run) -> None:
        for ended in self.scheduler.take_ended():
            self._short.pop(ended.request.id, None)
            if ended.outcome is not RequestOutcome.ANSWERED and ended.outcome is not RequestOutcome.TIMED_OUT:
                raise RuntimeError(f"the request {ended.request.id!r} ended as {ended.outcome.value}: {ended.error}")
            run.ended.append(ended)
            run.end_s = max(run.end_s, ended.times.ended or 0.0)
            if self.timeline is not None:
                self.timeline.ended(ended)
            self._expect(source.ended(ended))

    def _next_time(self) -> float | None:
        times = (self._arrivals[0][0] if self._arrivals else None, self.system.scheduler.next_time())
        return min((at for at in times if at is not None), default=None)

    def _compute(self, work: Work) -> None:
        """Lets the seconds pass that `work` takes, up to the next thing that may change what is best to do."""
        now, costs = self.clock.now, self.machine.costs
        ends = (
            {item: self._left(item) for item in work.decodes if item.request.id in self._short} if self._short else {}
        )
        if ends:
            work.steps = min(work.steps, *ends.values())
        batch = batch_of(work)
        seconds = costs.batch_s(batch)
        if work.steps > 1:
            due = self._next_time()
            if due is not None and seconds > due - now:
                one = costs.batch_s(Batch(batch.chunks, batch.contexts, 1))
                work.steps = max(1, min(work.steps, math.ceil((due - now) / one)))
                seconds = costs.batch_s(Batch(batch.chunks, batch.contexts, work.steps))
        for item in work.prefills:
            item.finished = item.last and self._short.get(item.request.id) == 1
            if item.store is not None:
                tokens = item.store[1] - item.store[0]
                rate = item.request.bytes_per_token or self.machine.bytes_per_token
                item.payload = Phantom(tokens, tokens * rate, self.machine.copy_parts)
        for item, left in ends.items():
            item.finished = left == work.steps
        self.clock.advance_to(now + seconds)
        self.scheduler.complete(work)

    def _left(self, item: Decode) -> int:
        """Tokens until a short answer ends."""
        return item.left - (item.request.max_new_tokens - self._short[item.request.id])
