"""Copies between tiers: one job a copy, one queue a link, and the rule who goes next at the boundary of a layer.

Whatever moves the bytes, threads or a virtual clock, asks the queue what to do at every boundary; so a demand load
overtakes a prefetch by the same rule in the engine and in the simulator.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import Protocol

from .base import KVPayload, Link, Tier, Urgency
from .memory_pool import Builder
from .radix_tree import Node


class Outcome(Enum):
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Move(Enum):
    """What to do with a job at the boundary of a layer."""

    COPY = "copy the next layer"
    COMMIT = "finish the copy"
    YIELD = "put it back: something more urgent waits"
    CANCEL = "give it up"


@dataclass(eq=False)
class TransferJob:
    """One copy of a node's payload. Whoever moves the bytes owns the job from `submit` until it is polled.

    Attributes:
        node: whose copy; the mover does not touch it.
        source, target: tiers.
        payload: what is read; the pool of `source` keeps it meanwhile.
        builder: what is written.
        urgency, priority: smaller goes first; `priority` is for jobs of one urgency, e.g. a deadline in seconds.
        held: bytes taken from the target's pool.
        frees_source: the copy is part of an eviction: its source is to go once it is done.
        waiters: numbers of the leases that want the result.
        done: layers copied so far.
        cancelled: it was asked to stop; it does at the next boundary.
        outcome, result, error: how it ended.
        ready: waits, on a GPU, for what computed the payload; called before the first layer by the mover.
    """

    node: Node
    source: Tier
    target: Tier
    payload: KVPayload
    builder: Builder
    urgency: Urgency
    priority: float = 0.0
    held: int = 0
    frees_source: bool = False
    waiters: set[int] = field(default_factory=set)
    done: int = 0
    cancelled: bool = False
    outcome: Outcome | None = None
    result: KVPayload | None = None
    error: BaseException | None = None
    ready: Callable[[], None] | None = None
    entry: int = field(default=0, repr=False)  # its valid place in a queue, 0 = in none

    @property
    def link(self) -> Link:
        return self.source, self.target

    def copy_layer(self) -> None:
        """Copies the next layer; raises what reading and writing raise."""
        self.builder.write(self.done, self.payload.read(self.done))
        self.done += 1

    def end(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Called once, by the mover; commits or aborts the builder."""
        if outcome is Outcome.DONE:
            try:
                self.result = self.builder.commit()
            except Exception as failure:
                outcome, error = Outcome.FAILED, failure
        if outcome is not Outcome.DONE:
            self.builder.abort()
        self.outcome, self.error = outcome, error


class TransferQueue:
    """The jobs that wait for one link. Not locked: its mover does that."""

    def __init__(self) -> None:
        self._heap: list[tuple[Urgency, float, int, TransferJob]] = []
        self._numbers = count(1)

    def put(self, job: TransferJob) -> None:
        """Enters `job`; also after its urgency or priority has changed, which makes the old entry stale."""
        job.entry = next(self._numbers)
        heapq.heappush(self._heap, (job.urgency, job.priority, job.entry, job))

    def remove(self, job: TransferJob) -> bool:
        """Takes a waiting job out; False if it was not waiting."""
        waiting, job.entry = job.entry != 0, 0
        return waiting

    def first(self) -> TransferJob | None:
        """The job that goes next; it stays."""
        while self._heap and self._heap[0][3].entry != self._heap[0][2]:
            heapq.heappop(self._heap)
        return self._heap[0][3] if self._heap else None

    def take(self) -> TransferJob | None:
        """The job that goes next, out of the queue."""
        job = self.first()
        if job is not None:
            heapq.heappop(self._heap)
            job.entry = 0
        return job

    def next_move(self, job: TransferJob) -> Move:
        """What to do with the running `job` at the boundary it has reached."""
        if job.cancelled:
            return Move.CANCEL
        if job.done == len(job.payload.layers):
            return Move.COMMIT
        first = self.first()
        # Only a more urgent kind overtakes: among equals a job half done goes on, or two could starve each other.
        if first is not None and first.urgency < job.urgency:
            return Move.YIELD
        return Move.COPY


class TransferBackend(Protocol):
    """Moves the bytes of jobs and hands them back when they have ended, in the order in which they ended.

    Attributes:
        ended: how many jobs have ended so far, polled or not, and how often waiting was interrupted.
    """

    ended: int

    def submit(self, job: TransferJob) -> None:
        """Takes over `job`. Does not block."""
        ...

    def cancel(self, job: TransferJob) -> None:
        """Asks that `job` stop; it may still end as DONE. Nothing happens if it has ended."""
        ...

    def promote(self, job: TransferJob, urgency: Urgency, priority: float) -> None:
        """Makes a waiting or running `job` that urgent."""
        ...

    def poll(self) -> Sequence[TransferJob]:
        """The jobs that have ended since the last call; does not block."""
        ...

    def wait(self, ended: int, timeout_s: float) -> bool:
        """Waits until more than `ended` jobs have ended; False if the time runs out first."""
        ...

    def interrupt(self) -> None:
        """Ends everybody's waiting: there is other news."""
        ...

    def next_time(self) -> float | None:
        """When the next copy will have ended; None if nothing is under way, or only real time will tell."""
        ...

    def close(self) -> None:
        """Cancels everything, and returns when nothing is moved any more; `poll` then has the rest."""
        ...
