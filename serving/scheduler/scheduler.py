"""All requests that are not over, and how they come to an end.

The scheduler: requests in, pieces of work out, results back, and every request ends once.
"""

from __future__ import annotations

from collections import deque

from ..hints.hint import Hint
from ..kvcache.estimates import Estimates
from ..kvcache.tiered_cache import TieredCache
from ..metrics import SchedulerMetrics
from ..prediction import NextCallPredictor
from ..prefetch import Prefetcher
from ..request import Ended, Request, RequestOutput
from .admission import Admission
from .batch import Batch
from .config import SchedulerConfig
from .request_state import Decode, Entry, Prefill, State, Timers, Work, new_entry


class LiveRequests:
    """Every request is in it from its arrival to its end, and in one place of admission or batch meanwhile.

    Attributes:
        entries: by the requests' ids. over: the ends that nobody has been told yet.
    """

    def __init__(self, admission: Admission, batch: Batch, predictor: NextCallPredictor, timers: Timers) -> None:
        self.admission, self.batch, self.predictor, self.timers = admission, batch, predictor, timers
        self.entries: dict[str, Entry] = {}
        self.over: deque[Ended] = deque()

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: Entry) -> None:
        """A request has come."""
        self.entries[entry.request.id] = entry
        self.timers.set(entry.times.arrived + self._timeout(entry), entry)
        self.admission.add(entry)
        self.admission.statistics.submitted += 1
        self.admission.statistics.events += 1

    def end(self, entry: Entry, outcome: RequestOutput, error: str | None) -> None:
        """Ends a request now or, if it is in the work that is out, as soon as that is back."""
        if entry.working:
            entry.doomed = entry.doomed or (outcome, error)
            return
        self.admission.remove(entry)
        self.batch.remove(entry)
        self.admission.settle(entry)
        now = self.admission.tiers.clock()
        entry.state, entry.times.ended = State.ENDED, now
        del self.entries[entry.request.id]
        self.timers.ended()
        self._count(entry, outcome)
        if entry.started:
            self.predictor.on_finish(entry.request, now - entry.times.arrived, outcome is RequestOutput.ANSWERED)
        self.over.append(entry.ended(outcome, error))

    def _count(self, entry: Entry, outcome: RequestOutput) -> None:
        statistics = self.admission.statistics
        statistics.ended[outcome] += 1
        statistics.events += 1
        statistics.cached_tokens += entry.cached
        statistics.loaded_tokens += entry.loaded
        statistics.recomputed_tokens += entry.recomputed

    def expire(self) -> None:
        """Ends what has timed out, and gives up loads that take too long."""
        now = self.admission.tiers.clock()
        for entry in self.timers.due(now):
            timeout = self._timeout(entry)
            if now >= entry.times.arrived + timeout:
                told = f"it was not answered within {timeout:g} s; {entry.state.value}"
                self.end(entry, RequestOutput.TIMED_OUT, told)
            elif entry.state is State.LOADING and now >= entry.give_up_at:
                self.admission.give_up(entry)

    def _timeout(self, entry: Entry) -> float:
        own = entry.request.timeout_s
        return self.admission.limits.timeout_s if own is None else own

    def check(self) -> None:
        """Raises AssertionError unless each request is in one place and holds what it should."""
        admission, batch = self.admission, self.batch
        entries = list(self.entries.values())
        waiting = [*admission.queue, *admission.overdue, *admission.loading, *admission.loading.ready]
        places = [*waiting, *batch.prefilling, *batch.decoding]
        assert len(places) == len(set(places)) and set(places) == set(entries), "a request is in one place"
        reserved = sum(entry.reserved for entry in entries)
        assert admission.tiers.reserved_bytes == reserved, "reserved bytes belong to requests"
        handles = {entry.handle.id for entry in entries if entry.handle is not None}
        assert handles <= admission.tiers.handles.keys(), "leases of requests are live"
        assert len(batch) <= admission.limits.running, "no more are computed than may be"
        for entry in batch.prefilling:
            assert entry.state is State.PREFILL and entry.handle is not None
        for entry in batch.decoding:
            assert entry.state is State.DECODE and entry.handle is not None


class Scheduler:
    """Continuous batching over tiers. It computes nothing and reads no clock but the tiers'.

    Whoever drives it, an engine or a simulator, asks for work, computes it, writes the results into its items and hands
    it back; one piece of work is out at a time. Requests may be submitted and cancelled from any thread, at any time.

    Args:
        tiers: the cache; its device pool is also where requests reserve their memory.
        estimates: seconds of loads and of computing.
        outlook: what is known of the agents' next calls; told of every call.
        bytes_per_token: KV of a token that is computed.
        prefetcher: brings fixed prompts up ahead of their calls; None: nobody does.
        batch_waits: nothing is computed while a request's KV is on its way. To compare: a batch of SGLang's HiCache
            waits, layer by layer, for what its requests load, and all others wait for the batch.
    """

    def __init__(
        self,
        tiers: TieredCache,
        estimates: Estimates,
        predictor: NextCallPredictor,
        bytes_per_token: int,
        limits: SchedulerConfig | None = None,
        prefetcher: Prefetcher | None = None,
        batch_waits: bool = False,
    ) -> None:
        if bytes_per_token < 1:
            raise ValueError(f"got bytes_per_token={bytes_per_token}; accepted: 1 or more")
        self.tiers, self.predictor, self.prefetcher = tiers, predictor, prefetcher
        self.limits, self.bytes_per_token, self.batch_waits = limits or SchedulerConfig(), bytes_per_token, batch_waits
        self.statistics = SchedulerMetrics()
        self._timers = Timers()
        self._admission = Admission(tiers, estimates, self.limits, self.statistics, self._timers, predictor)
        self._batch = Batch(tiers, self.limits, self.statistics)
        self._requests = LiveRequests(self._admission, self._batch, predictor, self._timers)
        self._out: Work | None = None
        self._works = 0
        self._news = False
        self._seen = 0
        self._closed: str | None = None

    def __len__(self) -> int:
        """Requests that are not over."""
        return len(self._requests)

    # Requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Takes a request.

        Raises:
            ValueError: it can never be computed, its id is in use, the queue is full, or the scheduler is closed.
        """
        page_size, clock = self.tiers.page_size, self.tiers.clock
        entry = new_entry(request, page_size, self.bytes_per_token, clock())
        with self.tiers.lock:
            self._refuse_what_cannot_be(request, entry)
            entry.agent, entry.started = self.predictor.on_request(request)
            entry.fixed = entry.fixed or self.predictor.fixed_tokens(entry.agent, request.namespace, entry.key)
            if self.prefetcher is not None and entry.agent is not None:
                self.prefetcher.on_request(entry.agent)
            self._requests.add(entry)
            self._news = True
        self.tiers.interrupt()

    def _refuse_what_cannot_be(self, request: Request, entry: Entry) -> None:
        if self._closed is not None:
            raise ValueError(f"the scheduler is closed: {self._closed}")
        if request.id in self._requests.entries:
            raise ValueError(f"there is a request {request.id!r} already that is not over")
        if len(self._admission) >= self.limits.waiting:
            raise ValueError(f"the queue is full: {self.limits.waiting} waiting requests are accepted")
        capacity = self.tiers.capacity()
        if entry.needed > capacity:
            raise ValueError(
                f"the request {request.id!r} needs {entry.needed} bytes for {entry.size} + {request.max_new_tokens} "
                f"tokens; the device's pool has {capacity}"
            )

    def cancel(self, request_id: str) -> None:
        """The request ends without an answer; nothing happens if there is none of that name (any more)."""
        with self.tiers.lock:
            entry = self._requests.entries.get(request_id)
            if entry is not None:
                self._requests.end(entry, RequestOutput.CANCELLED, "the request was cancelled")
            self._news = True
        self.tiers.interrupt()

    def hint(self, hint: Hint) -> None:
        """Takes a client's hint; it moves memory, never answers."""
        with self.tiers.lock:
            self.predictor.on_hint(hint)
            self._news = True
        self.tiers.interrupt()

    def take_ended(self) -> list[Ended]:
        """The requests that have ended since the last call, in that order."""
        with self.tiers.lock:
            over = list(self._requests.over)
            self._requests.over.clear()
            return over

    # Work -------------------------------------------------------------------------------------------------------

    def next_work(self, max_steps: int = 1) -> Work | None:
        """What is to be computed next; None if nothing can be now.

        Args:
            max_steps: tokens that every decoding request may get in it, where nothing else is to be computed.

        Raises:
            ValueError: the last piece of work has not been handed back, or max_steps is below 1.
        """
        if max_steps < 1:
            raise ValueError(f"got max_steps={max_steps}; accepted: 1 or more")
        with self.tiers.lock:
            if self._out is not None:
                raise ValueError(f"the work {self._out.number} is still out: complete it before asking for more")
            self._news = False
            self._seen = self.tiers.num_events
            self.tiers.poll()
            self._refresh()
            self._requests.expire()
            now, slots, room = self.tiers.clock(), self.limits.running - len(self._batch), self._admission.changed
            for entry in self._admission.admit(slots, idle=not self._batch):
                self._batch.add(entry, now)
            if self.prefetcher is not None:
                self.prefetcher.start_prefetches(paused=self._admission.starved, room_freed=room)
            self.tiers.write_back_eagerly()
            if self.batch_waits and self._admission.loading:
                return None
            self._works += 1
            self._out = self._batch.build(self._works, max_steps)
            return self._out

    def complete(self, work: Work, error: BaseException | None = None) -> None:
        """Takes the results of the work that is out.

        Args:
            error: the whole batch failed; its requests end as FAILED.

        Raises:
            ValueError: this work is not out.
        """
        with self.tiers.lock:
            if work is not self._out:
                raise ValueError(f"the work {work.number} is not out")
            self._out = None
            self.statistics.batches += 1
            for item in (*work.prefills, *work.decodes):
                item.entry.working = False
                self._take(item, work.steps, error or item.error)
            self._news = True

    def _take(self, item: Prefill | Decode, steps: int, error: BaseException | None) -> None:
        entry = item.entry
        if entry.doomed is not None:
            self._requests.end(entry, *entry.doomed)
            return
        try:
            if error is not None:
                raise error
            if isinstance(item, Prefill):
                over = self._batch.take_prefill(item, self.tiers.clock())
            else:
                over = self._batch.take_decode(item, steps)
        except Exception as failure:
            self._requests.end(entry, RequestOutput.FAILED, f"computing it failed: {type(failure).__name__}: {failure}")
            return
        if over:
            self._requests.end(entry, RequestOutput.ANSWERED, None)

    def close(self, reason: str = "the scheduler was closed") -> None:
        """Ends every request, those in the work that is out as well, and takes no more; the tiers stay open."""
        with self.tiers.lock:
            self._closed = reason
            if self._out is not None:
                for item in (*self._out.prefills, *self._out.decodes):
                    item.entry.working = False
                self._out = None
            for entry in list(self._requests.entries.values()):
                self._requests.end(entry, *(entry.doomed or (RequestOutput.CANCELLED, reason)))
            if self.prefetcher is not None:
                self.prefetcher.close()
            self._news = True
        self.tiers.interrupt()

    # Time -------------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Tells the tree and the prefetcher what is new about the agents."""
        changed = self.predictor.push_values(self.tiers)
        if changed and self.prefetcher is not None:
            self.prefetcher.values_changed(changed)

    def wait(self, timeout_s: float) -> None:
        """Waits until there may be something new: a copy has ended, a request has come or gone, a timer is due."""
        with self.tiers.lock:
            due = self.next_time()
            if self._news or self._requests.over:
                return
            seen = self._seen
        if due is not None:
            timeout_s = min(timeout_s, max(0.0, due - self.tiers.clock()))
        self.tiers.wait(seen, timeout_s)

    def next_time(self) -> float | None:
        """When something happens next without the driver: a copy (in virtual time), a timeout, a prefetch."""
        with self.tiers.lock:
            copies, timers = self.tiers.next_time(), self._timers.next_time()
            wishes = None if self.prefetcher is None else self.prefetcher.next_time()
            return min((time for time in (copies, timers, wishes) if time is not None), default=None)

    def check(self) -> None:
        """Raises AssertionError unless requests, leases and bytes agree; not while work is out in another thread."""
        with self.tiers.lock:
            self.tiers.check()
            self._admission.check()
            self._requests.check()
            if self.prefetcher is not None:
                assert self.prefetcher.handle_ids() <= self.tiers.handles.keys(), "leases of prefetches are live"
