"""Transfers on worker threads: one for each link, on a side stream of the GPU whose memory it reads or writes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .base import Link, Urgency
from .transfer_queue import LayerAction, Outcome, TransferJob, TransferQueue

if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)


class WorkerDiedError(RuntimeError):
    """The worker thread of a transfer died during it; another thread has replaced it."""


class ThreadedTransfer:
    """A `TransferBackend` with a daemon thread for each link, started at the link's first job.

    Workers access jobs, never nodes or pools. All methods may be called from any thread.

    A job that reads or writes the memory of a GPU runs on a stream of its link and that GPU. The payloads make this
    stream wait for what writes the source, and for what still uses the memory of the target (`TensorPayload`); a layer
    counts as copied, and a job as ended, when the stream has executed it. So nobody reads a copy in flight, and memory
    is never freed while a copy uses it.

    Args:
        bandwidth: bytes/s to which a link is throttled.

    Raises:
        ValueError: a bandwidth that is not above 0.
    """

    def __init__(self, bandwidth: Mapping[Link, float] | None = None) -> None:
        self.bandwidth = dict(bandwidth or {})
        slow = {link: speed for link, speed in self.bandwidth.items() if not speed > 0}
        if slow:
            raise ValueError(f"got bandwidths {slow}; accepted: more than 0 bytes/s")
        self._changed = threading.Condition()
        self._queues: dict[Link, TransferQueue] = {}
        self._running: dict[Link, TransferJob] = {}
        self._workers: dict[Link, threading.Thread] = {}
        self._finished: deque[TransferJob] = deque()
        self._closing = threading.Event()
        self.num_events = 0

    def submit(self, job: TransferJob) -> None:
        with self._changed:
            if job.link not in self._queues:
                self._queues[job.link] = TransferQueue()
                if not self._closing.is_set():
                    self._start(job.link)
            if self._closing.is_set():
                self._end(job, Outcome.CANCELLED)
                return
            self._queues[job.link].add(job)
            self._changed.notify_all()

    def cancel(self, job: TransferJob) -> None:
        with self._changed:
            job.cancelled = True
            if self._queues[job.link].discard(job):
                self._end(job, Outcome.CANCELLED)

    def promote(self, job: TransferJob, urgency: Urgency, priority: float) -> None:
        with self._changed:
            job.urgency, job.priority = urgency, priority
            if self._queues[job.link].discard(job):
                self._queues[job.link].add(job)
                self._changed.notify_all()

    def poll(self) -> Sequence[TransferJob]:
        with self._changed:
            finished = list(self._finished)
            self._finished.clear()
            return finished

    def wait(self, num_events: int, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.num_events > num_events, timeout_s)

    def interrupt(self) -> None:
        with self._changed:
            self.num_events += 1
            self._changed.notify_all()

    def next_time(self) -> None:
        return None

    def close(self) -> None:
        """Ends what runs at its next layer; may be called from any thread but the workers, and again."""
        with self._changed:
            self._closing.set()
            for queue in self._queues.values():
                while (job := queue.pop()) is not None:
                    self._end(job, Outcome.CANCELLED)
            for job in self._running.values():
                job.cancelled = True
            self._changed.notify_all()
            workers = list(self._workers.values())
        for worker in workers:
            worker.join()

    def _start(self, link: Link) -> None:
        name = f"tenure-copy-{link[0].name.lower()}-{link[1].name.lower()}"
        self._workers[link] = threading.Thread(target=self._work, args=(link,), name=name, daemon=True)
        self._workers[link].start()

    def _work(self, link: Link) -> None:
        try:
            streams: dict[torch.device, torch.cuda.Stream] = {}
            while (job := self._next_job(link)) is not None:
                self._run(job, streams)
                del job  # while this thread waits, it must not keep alive what it has copied
        finally:
            # Reached while not closing only if the thread is dying, for whatever reason.
            with self._changed:
                job = self._running.pop(link, None)
                if job is not None:
                    self._end(job, Outcome.FAILED, WorkerDiedError(f"the worker of {link[0].name} -> {link[1].name}"))
                if not self._closing.is_set():
                    logger.error("a transfer worker died (%s -> %s); starting another", link[0].name, link[1].name)
                    self._start(link)

    def _next_job(self, link: Link) -> TransferJob | None:
        """Waits for the next job of a link; None when closing."""
        with self._changed:
            queue = self._queues[link]
            self._changed.wait_for(lambda: self._closing.is_set() or queue.peek() is not None)
            job = None if self._closing.is_set() else queue.pop()
            if job is not None:
                self._running[link] = job
            return job

    def _run(self, job: TransferJob, streams: dict[torch.device, torch.cuda.Stream]) -> None:
        """Copies layers until the job has ended or must yield."""
        queue = self._queues[job.link]
        while True:
            with self._changed:
                action = queue.next_action(job)
                if action is LayerAction.YIELD:
                    del self._running[job.link]
                    queue.add(job)
                    return
            outcome, error = None, None
            if action is LayerAction.COPY:
                try:
                    self._copy_layer(job, streams)
                except Exception as failure:
                    outcome, error = Outcome.FAILED, failure
            else:
                outcome = Outcome.DONE if action is LayerAction.COMMIT else Outcome.CANCELLED
            if outcome is not None:
                job.finish(outcome, error)  # may write to disk: not under the lock
                with self._changed:
                    del self._running[job.link]
                    self._return(job)
                return

    def _copy_layer(self, job: TransferJob, streams: dict[torch.device, torch.cuda.Stream]) -> None:
        begun = time.monotonic()
        size = job.payload.layers[job.layers_done]
        if job.gpu is None:
            job.copy_layer()
        else:
            _copy_on_stream(job, job.gpu, streams)
        speed = self.bandwidth.get(job.link)
        if speed is not None:
            self._closing.wait(max(0.0, size / speed - (time.monotonic() - begun)))

    def _end(self, job: TransferJob, outcome: Outcome, error: BaseException | None = None) -> None:
        job.finish(outcome, error)
        self._return(job)

    def _return(self, job: TransferJob) -> None:
        self._finished.append(job)
        self.num_events += 1
        self._changed.notify_all()


def _copy_on_stream(job: TransferJob, gpu: torch.device, streams: dict[torch.device, torch.cuda.Stream]) -> None:
    """Copies the next layer of `job` on the stream of `gpu`, created at first use, and waits until it is copied."""
    import torch

    if gpu not in streams:
        streams[gpu] = torch.cuda.Stream(gpu)
    with torch.cuda.stream(streams[gpu]):
        try:
            job.copy_layer()
        finally:  # also after an error: what is queued uses memory that is freed next
            streams[gpu].record_event().synchronize()  # without the GIL
