"""The scheduler: takes requests, hands out batches, takes their results back, and ends every request exactly once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from ..errors import BadRequest, Draining, QueueFull, TooLarge
from ..hints.hint import Hint
from ..kvcache.estimates import Estimates
from ..kvcache.radix_tree import Node
from ..kvcache.tiered_cache import TieredCache
from ..metrics import RecentCounts, SchedulerMetrics
from ..prediction import NextCallPredictor
from ..prefetch import Prefetcher
from ..request import FinishReason, Request, RequestOutput, shown
from .admission import Admission
from .batch import RunningRequests
from .preemption import Preemption
from .request_memory import RequestMemory
from .request_state import RequestState, RequestStatus, RequestTimers, ScheduledBatch, ScheduledDecode, ScheduledPrefill
from .scheduler_config import SchedulerConfig

logger = logging.getLogger(__name__)


class Scheduler:
    """Continuous batching over a tiered cache. It computes nothing, and its only clock is the cache's.

    A driver, an engine or a simulator, takes a batch with `next_batch`, computes it, writes the results into its items
    and hands it back with `complete`. At most one batch is in flight. `submit`, `cancel`, `hint`, `take_finished` and
    `close` may be called from any thread at any time; everything runs under the cache's lock.

    Every unfinished request is in exactly one place: Admission's queues, its loads, or the running requests. It is
    known by its number, which no other request ever has. Whatever fails while one request is admitted, started or
    completed ends that request as FAILED, and no other.

    Args:
        tiers: the cache; requests reserve their memory in its device pool.
        predictor: predicts the agents' next calls; notified of every call.
        bytes_per_token: KV of a computed token.
        prefetcher: loads fixed prompts ahead of their calls; None: nothing is prefetched.
        batch_waits: nothing is computed while a request's KV is being loaded. For comparison: a batch of SGLang's
            HiCache waits, layer by layer, for the loads of its requests, and all others wait for the batch.

    Attributes:
        metrics: counters since the scheduler was made. recent: samples of them.
        namespaces: used by the clients; an engine says what of them is the client's own (`ClientNamespaces.own`).
        vocab_size: prompts with larger token ids are refused; None: all are accepted. An engine sets it to its model's.

    Raises:
        ValueError: bytes_per_token is below 1.
    """

    def __init__(
        self, tiers: TieredCache, estimates: Estimates, predictor: NextCallPredictor, bytes_per_token: int,
        config: SchedulerConfig | None = None, prefetcher: Prefetcher | None = None, batch_waits: bool = False,
    ) -> None:  # fmt: skip
        if bytes_per_token < 1:
            raise ValueError(f"got bytes_per_token={bytes_per_token}; accepted: 1 or more")
        self.tiers, self.predictor, self.prefetcher = tiers, predictor, prefetcher
        self.config, self.bytes_per_token, self.batch_waits = config or SchedulerConfig(), bytes_per_token, batch_waits
        self.metrics, self.recent = SchedulerMetrics(), RecentCounts()
        self.vocab_size: int | None = None
        self._timers = RequestTimers()
        self._memory = RequestMemory(tiers, self.config)
        self._admission = Admission(
            tiers, estimates, self.config, self.metrics, self._timers, predictor, self._memory,
            lambda state, error: self._fail(state, "admitting", error), self._end_outgrown,
        )  # fmt: skip
        self.namespaces = self._admission.namespaces
        self._running = RunningRequests(tiers, self.config, self.metrics, self._memory)
        self._preemption = Preemption(self._memory, self._running, self._admission)
        self._numbers = count(1)
        self._requests: dict[int, RequestState] = {}  # by number, from arrival to end
        self._finished: deque[RequestOutput] = deque()  # not taken yet
        self._in_flight: ScheduledBatch | None = None
        self._batches = 0
        self._changed = False  # something has happened since the last `next_batch` that it may act on
        self._predicting = False  # the next `next_batch` reads further predictions
        self._transfers_seen = 0
        self._closed: str | None = None

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def requests(self) -> list[RequestState]:
        """The requests that have not ended, in the order of their arrival; to be read under the cache's lock."""
        return list(self._requests.values())

    def is_sharing(self, state: RequestState) -> bool:
        """Whether a request waits for pages that another one computes."""
        return state in self._admission.shared

    # Requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Takes a request.

        Returns:
            Its number, by which it is cancelled, and which its output carries.

        Raises:
            BadRequest, TooLarge: it can never be computed. QueueFull: too many wait. Draining: the scheduler is closed.
                All are ValueErrors. Nothing is changed then, neither here nor in the predictions.
        """
        with self.tiers.lock:
            self._require_acceptable(request)
            number, now = next(self._numbers), self.tiers.clock()
            state = RequestState.create(request, number, self.tiers.page_size, self.bytes_per_token, now)
            self._require_memory(state)
            try:
                self._take(state)
            except BaseException:
                self._forget(state)
                raise
            self.metrics.submitted += 1
            self.metrics.events += 1
            self._changed = True
        self.tiers.interrupt()
        return number

    def _require_acceptable(self, request: Request) -> None:
        if self._closed is not None:
            raise Draining(f"the scheduler is closed: {self._closed}")
        if len(self._admission) >= self.config.max_queued_requests:
            raise QueueFull(f"the queue is full: at most {self.config.max_queued_requests} requests may wait")
        self.require_vocabulary(request.prompt)

    def require_vocabulary(self, prompt: Any) -> None:
        """Raises BadRequest if `prompt`, token ids `(tokens,)`, has one beyond `vocab_size`."""
        if self.vocab_size is not None and (largest := int(np.max(prompt))) >= self.vocab_size:
            raise BadRequest(f"got the token id {largest} in a prompt; accepted: 0 to {self.vocab_size - 1}")

    def _require_memory(self, state: RequestState) -> None:
        capacity, end = self.tiers.capacity(), self._memory.least_end(state)
        needed = self._memory.required(state, end)
        if needed > capacity:
            prompt = state.num_prompt_tokens
            raise TooLarge(
                f"the request {state.request.id!r} needs {needed} bytes for {prompt} + {end - prompt} tokens, in whole "
                f"pages; the device's pool has {capacity}"
            )

    def _take(self, state: RequestState) -> None:
        request = state.request
        state.agent, state.in_workflow = self.predictor.on_request(request, state.number)
        if not state.num_fixed_tokens:
            state.num_fixed_tokens = self.predictor.fixed_tokens(state.agent, request.namespace, state.whole_pages)
        if self.prefetcher is not None and state.agent is not None:
            self.prefetcher.on_request(state.agent)
        self._timers.set(state.times.arrived + self._timeout_s(state), state)
        self._admission.add(state)
        self._requests[state.number] = state

    def _forget(self, state: RequestState) -> None:
        """Takes back what `_take` has done of a request before it failed."""
        state.status = RequestStatus.ENDED  # its timer is skipped
        self._timers.ended()
        self._admission.remove(state)
        self._notify_finish(state, succeeded=False)

    def cancel(self, number: int) -> None:
        """Ends a request without an answer; numbers that are unknown or have ended are ignored.

        Args:
            number: from `submit`.

        Raises:
            ValueError: anything but a number, such as the label `Request.id`.
        """
        if type(number) is not int:
            raise ValueError(f"got {shown(number)} to cancel; accepted: the number that submit returned")
        with self.tiers.lock:
            state = self._requests.get(number)
            if state is not None:
                self._end(state, FinishReason.CANCELLED, "the request was cancelled")
            self._changed = True
        self.tiers.interrupt()

    def drop_admitted(self, reason: str) -> None:
        """Ends every request that has KV, computed or cached, as CANCELLED; not while a batch is in flight.

        Those that wait to be admitted go on. `reason` becomes the error of the others.
        """
        with self.tiers.lock:
            if self._in_flight is not None:
                raise ValueError(f"the batch {self._in_flight.number} is still in flight: complete it first")
            loading = self._admission.loading
            for state in [*self._running, *loading, *loading.ready]:
                self._end(state, FinishReason.CANCELLED, reason)
            self._changed = True

    def hint(self, hint: Hint) -> None:
        """Takes a client's hint. Hints influence what is cached and prefetched, never an answer."""
        with self.tiers.lock:
            self.predictor.on_hint(hint)
            self._changed = True
        self.tiers.interrupt()

    def take_finished(self) -> list[RequestOutput]:
        """The outputs of the requests that have ended since the last call, in order of their ends."""
        with self.tiers.lock:
            finished = list(self._finished)
            self._finished.clear()
            return finished

    # Batches ----------------------------------------------------------------------------------------------------

    def next_batch(self, max_steps: int = 1) -> ScheduledBatch | None:
        """The next batch to compute; None if nothing can be computed now.

        Args:
            max_steps: tokens of each decode in a batch without prefills.

        Raises:
            ValueError: a batch is in flight, or max_steps is below 1.
        """
        if max_steps < 1:
            raise ValueError(f"got max_steps={max_steps}; accepted: 1 or more")
        with self.tiers.lock:
            if self._in_flight is not None:
                raise ValueError(f"the batch {self._in_flight.number} is still in flight: complete it before the next")
            self._changed = False
            self._transfers_seen = self.tiers.num_events
            self.tiers.poll()
            self._predicting = False
            self._predict(self._push_predictions)
            self._expire()
            now, slots = self.tiers.clock(), self.config.max_num_seqs - len(self._running)
            statistics = self.tiers.statistics
            self.recent.sample(now, self.metrics, statistics.tokens_asked, statistics.tokens_found)
            room = self._admission.changed
            for state in self._admission.admit(slots, list(self._running)):
                try:
                    self._running.add(state, now)
                except Exception as error:
                    self._fail(state, "starting", error)
            self._predict(self._start_prefetches, room)
            self.tiers.write_back_eagerly()
            if self.batch_waits and self._admission.loading:
                return None
            growth = self._preemption.grow()
            for state in growth.outgrown:
                self._end_outgrown(state)
            self._batches += 1
            self._in_flight = self._running.schedule(self._batches, max_steps, growth.stalled, growth.preempted)
            return self._in_flight

    def _predict(self, update: Callable[..., None], *args: bool) -> None:
        """Calls `update`. Predictions never influence an answer, so no request ends for an error there."""
        try:
            update(*args)
        except Exception:
            logger.exception("predictions or prefetches were not updated")
            self.metrics.predictions_failed += 1

    def _start_prefetches(self, room_freed: bool) -> None:
        if self.prefetcher is not None:
            self.prefetcher.start_prefetches(paused=self._admission.starved, room_freed=room_freed)

    def _push_predictions(self) -> None:
        changed = self.predictor.push_values(self.tiers)
        if changed and self.prefetcher is not None:
            self.prefetcher.values_changed(changed)
        self._predicting = self.predictor.has_due

    def _expire(self) -> None:
        """Ends requests that have timed out, and gives up loads that have passed their deadline."""
        now = self.tiers.clock()
        for state in self._timers.due(now):
            timeout = self._timeout_s(state)
            if now >= state.times.arrived + timeout:
                error = f"it was not answered within {timeout:g} s; {state.status.value}"
                self._end(state, FinishReason.TIMED_OUT, error)
            elif state.status is RequestStatus.LOADING and now >= state.load_deadline:
                self._admission.give_up(state)
            else:
                self._admission.check_patience(state)

    def _timeout_s(self, state: RequestState) -> float:
        own = state.request.timeout_s
        return self.config.timeout_s if own is None else own

    def complete(self, batch: ScheduledBatch, error: BaseException | None = None) -> None:
        """Takes the results of the batch in flight.

        Args:
            error: the whole batch failed; its requests end as FAILED.

        Raises:
            ValueError: this batch is not in flight. Draining, which is one: `close` has ended its requests meanwhile.
        """
        with self.tiers.lock:
            if batch is not self._in_flight and self._closed is not None:
                raise Draining(f"the batch {batch.number} is not in flight: the scheduler is closed: {self._closed}")
            if batch is not self._in_flight:
                raise ValueError(f"the batch {batch.number} is not in flight")
            self._in_flight = None
            self.metrics.batches += 1
            items = (*batch.prefills, *batch.decodes)
            for item in items:
                item.state.in_batch = False
            for item in items:
                self._complete_item(item, batch.steps, error or item.error)
            self._changed = True

    def _complete_item(self, item: ScheduledPrefill | ScheduledDecode, steps: int, error: BaseException | None) -> None:
        state = item.state
        if state.pending_outcome is not None:
            self._end(state, *state.pending_outcome)
            return
        try:
            if error is not None:
                raise error
            if isinstance(item, ScheduledPrefill):
                answered = self._running.complete_prefill(item, self.tiers.clock())
                self._admission.computed(state)
            else:
                answered = self._running.complete_decode(item, steps)
        except Exception as failure:
            self._fail(state, "computing", failure)
            return
        if answered:
            self._end(state, FinishReason.ANSWERED, None)

    def _end_outgrown(self, state: RequestState) -> None:
        error = (
            f"the answer was cut short after {state.num_output_tokens} tokens: with the {state.num_prompt_tokens} of "
            f"the prompt it needs more than the {self.tiers.capacity()} bytes of the device's pool"
        )
        self._end(state, FinishReason.LENGTH, error)

    def _fail(self, state: RequestState, doing: str, error: BaseException) -> None:
        self._end(state, FinishReason.FAILED, f"{doing} it failed: {type(error).__name__}: {error}")

    def _end(self, state: RequestState, reason: FinishReason, error: str | None) -> None:
        """Ends a request and frees its memory; one in the batch in flight ends when that is complete."""
        if state.in_batch:
            state.pending_outcome = state.pending_outcome or (reason, error)
            return
        end = None if state.handle is None else state.handle.node
        self._admission.remove(state)
        self._running.remove(state)
        self._running.record_not_stored(state)
        self._admission.settle_charge(state)
        now = self.tiers.clock()
        state.status, state.times.finished = RequestStatus.ENDED, now
        del self._requests[state.number]
        self._timers.ended()
        self._count(state, reason)
        self._finished.append(state.output(reason, error))
        self._notify_finish(state, reason in (FinishReason.ANSWERED, FinishReason.LENGTH), end)

    def _notify_finish(self, state: RequestState, succeeded: bool, end: Node | None = None) -> None:
        """Tells the predictor; what fails there does no harm to any request. `end`: where its cached KV ends."""
        counted, state.in_workflow = state.in_workflow, False
        try:
            if succeeded and end is not None:
                self.predictor.on_answer(state.request, end)
            if counted:
                seconds = self.tiers.clock() - state.times.arrived
                self.predictor.on_finish(state.request, state.number, seconds, succeeded)
        except Exception:
            logger.exception("the end of the request %r is not counted in its workflow", state.request.id)

    def _count(self, state: RequestState, reason: FinishReason) -> None:
        self.metrics.finished[reason] += 1
        self.metrics.events += 1
        self.metrics.cached_tokens += state.cached_tokens
        self.metrics.loaded_tokens += state.loaded_tokens
        self.metrics.recomputed_tokens += state.recomputed_tokens

    def close(self, reason: str = "the scheduler was closed") -> None:
        """Ends every request as CANCELLED, also those of the batch in flight, and refuses new ones.

        The cache stays open. `reason` becomes the error of the requests.
        """
        with self.tiers.lock:
            self._closed = reason
            if self._in_flight is not None:
                for item in (*self._in_flight.prefills, *self._in_flight.decodes):
                    item.state.in_batch = False
                self._in_flight = None
            for state in list(self._requests.values()):
                self._end(state, *(state.pending_outcome or (FinishReason.CANCELLED, reason)))
            if self.prefetcher is not None:
                self.prefetcher.close()
            self._changed = True
        self.tiers.interrupt()

    # Time -------------------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> None:
        """Blocks until `next_batch` may return something new: a transfer, a request, a timer, or after `timeout_s`."""
        with self.tiers.lock:
            due = self.next_time()
            if self._changed or self._finished:
                return
            seen = self._transfers_seen
        if due is not None:
            timeout_s = min(timeout_s, max(0.0, due - self.tiers.clock()))
        self.tiers.wait(seen, timeout_s)

    def next_time(self) -> float | None:
        """The next moment at which something happens without the driver, in seconds on the cache's clock.

        That is the end of a transfer (in virtual time), a timeout, or a prefetch that becomes due; it is now, while
        predictions are being read again.
        """
        with self.tiers.lock:
            if self._predicting:
                return self.tiers.clock()
            copies, timers = self.tiers.next_time(), self._timers.next_time()
            prefetches = None if self.prefetcher is None else self.prefetcher.next_time()
            return min((time for time in (copies, timers, prefetches) if time is not None), default=None)

    def check(self) -> None:
        """Raises AssertionError unless requests, handles and bytes agree; not while another thread computes a batch."""
        with self.tiers.lock:
            self.tiers.check()
            self._admission.check()
            self._check_requests()
            if self.prefetcher is not None:
                assert self.prefetcher.handle_ids() <= self.tiers.handles.keys(), "handles of prefetches are live"

    def _check_requests(self) -> None:
        admission, running, states = self._admission, self._running, list(self._requests.values())
        places = [*admission.queue, *admission.overdue, *admission.shared, *admission.loading, *admission.loading.ready]
        places += running
        assert len(places) == len(set(places)) and set(places) == set(states), "a request is in one place"
        reserved = sum(state.reserved_bytes for state in states)
        assert self.tiers.reserved_bytes == reserved, "reserved bytes belong to requests"
        handles = {state.handle.id for state in states if state.handle is not None}
        assert handles <= self.tiers.handles.keys(), "handles of requests are live"
        assert len(running) <= self.config.max_num_seqs, "no more are computed than may be"
        for state in running:
            required = self._memory.required(state, state.num_computed_tokens)
            assert state.reserved_bytes >= required, "what has been computed has memory"
        for state in running.prefilling:
            assert state.status is RequestStatus.PREFILL and state.handle is not None
        for state in running.decoding:
            assert state.status is RequestStatus.DECODE and state.handle is not None
