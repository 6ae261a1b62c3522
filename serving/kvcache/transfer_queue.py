"""Transfers between tiers: a job for each copy, a queue for each link, and the choice at every layer boundary.

Whatever moves the bytes, threads or a virtual clock, asks the queue what to do at each boundary, so a demand load
overtakes a prefetch by the same rule in the engine and in the simulator.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from ..lazy_heap import LazyHeap
from .base import KVPayload, Link, Tier, Urgency
from .memory_pool import PayloadBuilder

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class Outcome(Enum):
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class LayerAction(Enum):
    """The next action for a job at the boundary of a layer."""

    COPY = "copy the next layer"
    COMMIT = "finish the copy"
    YIELD = "requeue the job: a more urgent one is queued"
    CANCEL = "abort the copy"


@dataclass(eq=False)
class TransferJob:
    """One copy of a payload. The backend owns the job from `submit` until it is polled.

    Attributes:
        owner: the node whose payload it is; opaque here and to the backend.
        payload: what is read; the pool of `source` keeps it meanwhile.
        builder: what is written.
        urgency, priority: the smaller runs first; `priority` orders jobs of one urgency, e.g. a deadline in seconds.
        allocated: bytes allocated in the target's pool.
        frees_source: the transfer is part of an eviction, which frees the source when it is done.
        waiters: ids of the handles that wait for the result.
        cancelled: it was asked to stop, and does so at the next boundary.
        outcome, result, error: how it ended.
    """

    id: int
    owner: Any
    source: Tier
    target: Tier
    payload: KVPayload
    builder: PayloadBuilder
    urgency: Urgency
    priority: float = 0.0
    allocated: int = 0
    frees_source: bool = False
    waiters: set[int] = field(default_factory=set)
    layers_done: int = 0
    cancelled: bool = False
    outcome: Outcome | None = None
    result: KVPayload | None = None
    error: BaseException | None = None

    @property
    def link(self) -> Link:
        return self.source, self.target

    @property
    def remaining_bytes(self) -> int:
        """Bytes of the layers that are not copied yet."""
        return sum(self.payload.layers[self.layers_done :])

    @property
    def gpu(self) -> torch.device | None:
        """The GPU that the copy reads or writes."""
        for device in (self.payload.device, self.builder.device):
            if device is not None and device.type == "cuda":
                return device
        return None

    def copy_layer(self) -> None:
        """Copies the next layer; raises what reading and writing raise."""
        self.builder.write(self.layers_done, self.payload.read(self.layers_done))
        self.layers_done += 1

    def finish(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Commits or aborts the builder; called once, by the backend. Does not raise."""
        if outcome is Outcome.DONE:
            try:
                self.result = self.builder.commit()
            except Exception as failure:
                outcome, error = Outcome.FAILED, failure
        if outcome is not Outcome.DONE:
            try:
                self.builder.abort()
            except Exception:  # whoever waits for the job must learn of its end whatever happens
                logger.exception("aborting the copy of %s to %s failed", self.source.name, self.target.name)
        self.outcome, self.error = outcome, error


class TransferQueue(LazyHeap[TransferJob]):
    """The jobs that wait for one link, by urgency and priority. Not synchronised: its backend does that."""

    def add(self, job: TransferJob) -> None:
        """Queues `job`, or ranks it anew after its urgency or priority has changed."""
        self.push(job, (job.urgency, job.priority))

    def next_action(self, job: TransferJob) -> LayerAction:
        """The next action for the running `job` at the boundary it has reached."""
        if job.cancelled:
            return LayerAction.CANCEL
        if job.layers_done == len(job.payload.layers):
            return LayerAction.COMMIT
        first = self.peek()
        # Only a more urgent kind overtakes: two jobs of one kind could otherwise starve each other.
        if first is not None and first.urgency < job.urgency:
            return LayerAction.YIELD
        return LayerAction.COPY


class TransferBackend(Protocol):
    """Moves the bytes of jobs and returns the jobs in the order in which they end. Callable from any thread.

    Attributes:
        num_events: jobs that have ended, polled or not, and interrupts; `wait` waits for it to grow.
    """

    num_events: int

    def submit(self, job: TransferJob) -> None:
        """Takes over `job`. Does not block."""

    def cancel(self, job: TransferJob) -> None:
        """Asks `job` to stop; it may still end as DONE. No effect on a job that has ended."""

    def promote(self, job: TransferJob, urgency: Urgency, priority: float) -> None:
        """Changes the urgency and priority of a queued or running `job`."""

    def poll(self) -> Sequence[TransferJob]:
        """The jobs that have ended since the last call. Does not block."""
        ...

    def wait(self, num_events: int, timeout_s: float) -> bool:
        """Waits until `self.num_events` exceeds the given number; False on timeout."""
        ...

    def interrupt(self) -> None:
        """Ends the waiting of all threads, as an event of another kind has happened."""

    def next_time(self) -> float | None:
        """When the next transfer will end, in seconds; None if there is none, or only real time will tell."""

    def close(self) -> None:
        """Cancels everything and returns when no bytes are moved any more; the rest is then polled."""
