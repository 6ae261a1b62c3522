"""A virtual clock, and a transfer backend whose copies take the time of links with fixed bandwidths on it."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from ..kvcache.base import Link, Urgency
from ..kvcache.transfer_queue import LayerAction, Outcome, TransferJob, TransferQueue


class VirtualClock:
    """A clock that only `advance_to` moves; calling it returns its time in seconds."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance_to(self, time: float) -> None:
        """Moves to `time`; earlier times leave the clock unchanged."""
        self.now = max(self.now, time)


@dataclass(frozen=True)
class LinkSpeed:
    """Bandwidth of a link while a layer is copied, and the seconds before each layer."""

    bytes_per_s: float
    latency_s: float = 0.0

    def seconds(self, nbytes: int) -> float:
        return self.latency_s + nbytes / self.bytes_per_s


class VirtualTransfer:
    """A `TransferBackend` that copies each layer at the virtual time at which its link would have copied it.

    Payloads with data are really copied, so tests run every path deterministically in one thread. Not thread-safe:
    the cache calls it under its lock.

    Args:
        clock: shared with the cache; `poll` handles everything due by its time, `wait` advances it.
        speeds: by link; links that are missing cannot be used.
    """

    def __init__(self, clock: VirtualClock, speeds: Mapping[Link, LinkSpeed]) -> None:
        self.clock, self.speeds = clock, dict(speeds)
        self._queues = {link: TransferQueue() for link in self.speeds}
        self._running: dict[Link, TransferJob] = {}
        self._due: list[tuple[float, int, Link]] = []
        self._numbers = count()
        self._finished: deque[TransferJob] = deque()
        self.num_events = 0

    def submit(self, job: TransferJob) -> None:
        self._run(self.clock.now)  # a change now must not affect layers that are due already
        self._queues[job.link].add(job)
        if job.link not in self._running:
            self._next_job(job.link, self.clock.now)

    def cancel(self, job: TransferJob) -> None:
        self._run(self.clock.now)
        job.cancelled = True
        if self._queues[job.link].discard(job):
            self._end(job, Outcome.CANCELLED)

    def promote(self, job: TransferJob, urgency: Urgency, priority: float) -> None:
        self._run(self.clock.now)
        job.urgency, job.priority = urgency, priority
        if self._queues[job.link].discard(job):
            self._queues[job.link].add(job)

    def poll(self) -> Sequence[TransferJob]:
        self._run(self.clock.now)
        if not self._finished:
            return []
        finished = list(self._finished)
        self._finished.clear()
        return finished

    def next_time(self) -> float | None:
        return min((self._end_time(time, self._running[link]) for time, _, link in self._due), default=None)

    def _end_time(self, time: float, job: TransferJob) -> float:
        """When the running `job` ends, whose next layer is copied at `time`; `time` if it may be preempted there."""
        first = self._queues[job.link].peek()
        if not job.cancelled and (first is None or first.urgency >= job.urgency):
            speed = self.speeds[job.link]
            for nbytes in job.payload.layers[job.layers_done + 1 :]:
                time += speed.seconds(nbytes)
        return time

    def wait(self, num_events: int, timeout_s: float) -> bool:
        deadline = self.clock.now + timeout_s
        while self.num_events <= num_events and self._due and self._due[0][0] <= deadline:
            self.clock.advance_to(self._due[0][0])
            self._run(self.clock.now)
        if self.num_events <= num_events:
            self.clock.advance_to(deadline)
        return self.num_events > num_events

    def interrupt(self) -> None:
        self.num_events += 1

    def close(self) -> None:
        for queue in self._queues.values():
            while (job := queue.pop()) is not None:
                self._end(job, Outcome.CANCELLED)
        for job in self._running.values():
            self._end(job, Outcome.CANCELLED)
        self._running.clear()
        self._due.clear()

    def _run(self, until: float) -> None:
        while self._due and self._due[0][0] <= until:
            time, _, link = heapq.heappop(self._due)
            job = self._running[link]
            try:
                self.copy_layer(job)
            except Exception as error:
                del self._running[link]
                self._end(job, Outcome.FAILED, error)
                self._next_job(link, time)
                continue
            self._continue(job, time)

    def copy_layer(self, job: TransferJob) -> None:
        """Copies one layer; a hook for tests and counters."""
        job.copy_layer()

    def _next_job(self, link: Link, time: float) -> None:
        job = self._queues[link].pop()
        if job is not None:
            self._running[link] = job
            self._continue(job, time)

    def _continue(self, job: TransferJob, time: float) -> None:
        """Continues, preempts or ends `job` at the layer boundary that it reaches at `time`."""
        link, queue = job.link, self._queues[job.link]
        action = queue.next_action(job)
        if action is LayerAction.COPY:
            seconds = self.speeds[link].seconds(job.payload.layers[job.layers_done])
            heapq.heappush(self._due, (time + seconds, next(self._numbers), link))
            return
        del self._running[link]
        if action is LayerAction.YIELD:
            queue.add(job)
        else:
            self._end(job, Outcome.DONE if action is LayerAction.COMMIT else Outcome.CANCELLED)
        self._next_job(link, time)

    def _end(self, job: TransferJob, outcome: Outcome, error: BaseException | None = None) -> None:
        job.finish(outcome, error)
        self._finished.append(job)
        self.num_events += 1
