"""Admission of waiting requests: memory for each, and whether its cached KV is loaded or recomputed.

The memory of what a request computes before the first token of its answer is reserved all at once, before its loads
begin, with a head-room for the answer: none holds part of its memory while waiting for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from enum import Enum
from itertools import islice

from ..cache_report import AdmittedPrompt, part_of_page
from ..client_namespaces import ClientNamespaces
from ..kvcache.base import LoadState, Tier, Urgency
from ..kvcache.estimates import Estimates, LoadChoice
from ..kvcache.eviction_history import ComputedSpan, MissReason
from ..kvcache.eviction_policy import AllocStatus
from ..kvcache.miss_reasons import explain_misses
from ..kvcache.radix_tree import TOKEN_BYTES, Node
from ..kvcache.tiered_cache import CacheHandle, TieredCache
from ..kvcache.transfer_queue import Outcome, TransferJob
from ..metrics import SchedulerMetrics
from ..prediction import NextCallPredictor
from .fair_queue import FairQueue
from .request_memory import RequestMemory
from .request_state import RequestState, RequestStatus, RequestTimers
from .scheduler_config import SchedulerConfig
from .shared_pages import SharedPages


class PendingLoads:
    """Requests whose KV is being loaded, and those whose loads are complete but that have no place in a batch yet.

    Transfers find their requests by handle, so the end of one costs O(its waiters). The handles and reserved bytes stay
    the requests'.

    Attributes:
        ready: requests whose loads are complete, in that order.
        transfers_ended: a transfer of any kind has ended since this was last set to False.
    """

    def __init__(self) -> None:
        self.transfers_ended = False
        self.ready: dict[RequestState, None] = {}
        self._loading: dict[RequestState, None] = {}
        self._by_handle: dict[int, RequestState] = {}
        self._updated: dict[RequestState, None] = {}

    def __len__(self) -> int:
        """Requests that are loading."""
        return len(self._loading)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._loading)

    def add(self, state: RequestState) -> None:
        assert state.handle is not None, "a loading request has a handle"
        state.status = RequestStatus.LOADING
        self._loading[state] = None
        self._by_handle[state.handle.id] = state

    def remove(self, state: RequestState) -> None:
        """Forgets a request; its handle must still be there."""
        if state in self._loading:
            assert state.handle is not None, "a loading request has a handle"
            del self._loading[state], self._by_handle[state.handle.id]
            self._updated.pop(state, None)
        self.ready.pop(state, None)

    def complete(self, state: RequestState) -> None:
        """Everything that its handle covers is on the device."""
        self.remove(state)
        state.status = RequestStatus.LOADED
        self.ready[state] = None

    def take_ready(self, count: int) -> list[RequestState]:
        """Removes and returns the first `count` of `ready`, or all if there are fewer."""
        taken = list(islice(self.ready, count))
        for state in taken:
            del self.ready[state]
        return taken

    def on_transfer(self, job: TransferJob) -> None:
        """Called by the cache when a transfer has ended; a failure counts for every request that waited for it."""
        self.transfers_ended = True
        for number in job.waiters:
            state = self._by_handle.get(number)
            if state is not None:
                state.load_failures += job.outcome is Outcome.FAILED
                self._updated[state] = None

    def is_updated(self, state: RequestState) -> bool:
        """Whether one of its transfers has ended since the last `take_updated`."""
        return state in self._updated

    def take_updated(self) -> list[RequestState]:
        updated = list(self._updated)
        self._updated.clear()
        return updated

    def check(self) -> None:
        """Raises AssertionError unless requests and handles agree."""
        for state in self._loading:
            assert state.status is RequestStatus.LOADING and state.handle is not None and state.handle.live
            assert self._by_handle[state.handle.id] is state
        assert len(self._by_handle) == len(self._loading), "only loading requests are found by their handles"
        assert self._updated.keys() <= self._loading.keys()
        for state in self.ready:
            assert state.status is RequestStatus.LOADED and state.handle is not None
            assert len(state.handle.payloads()) == len(state.handle.nodes() or ()), "loaded KV stays on the device"


class AdmissionResult(Enum):
    """Outcome of trying to admit a request."""

    ADMITTED = "everything it needs is on the device"
    LOADING = "its loads have begun"
    REFUSED = "there is no memory now"
    FOLLOWS = "another request computes pages that it needs"
    OUTGROWN = "its prompt and its answer so far exceed the device's memory"
    DEFERRED = "it needs a load, and the limit of concurrent loads is reached"


class Admission:
    """Waiting and loading requests. Used under the cache's lock.

    Args:
        predictor: notified of the waiting requests, and of each lookup just before it is made for the first time.
        memory: what requests reserve.
        fail: ends a request that could not be admitted because of an error.
        outgrown: ends a request that was preempted and has become too long for the device.
    Attributes:
        queue: waiting requests in fair order.
        overdue: requests without memory for longer than `allocation_patience_s`. They precede the queue; while one of
            them finds no memory nobody else is admitted, unless it is only deferred.
        loading: requests with loads.
        namespaces: used by the clients.
        shared: requests that wait for pages that others compute.
        changed: memory may have been freed since the last admission.
        starved: the last admission refused a request for lack of memory.
    """

    def __init__(
        self, tiers: TieredCache, estimates: Estimates, config: SchedulerConfig, metrics: SchedulerMetrics,
        timers: RequestTimers, predictor: NextCallPredictor, memory: RequestMemory,
        fail: Callable[[RequestState, Exception], None], outgrown: Callable[[RequestState], None],
    ) -> None:  # fmt: skip
        self.tiers, self.estimates, self.config = tiers, estimates, config
        self.metrics, self.timers, self.predictor, self.memory = metrics, timers, predictor, memory
        self._fail, self._outgrown = fail, outgrown
        self.queue = FairQueue(config.priority_window_s, config.max_idle_branches)
        self.overdue: dict[RequestState, None] = {}
        self.loading = PendingLoads()
        self.namespaces = ClientNamespaces(config.max_idle_branches, config.max_client_namespaces)
        self.shared = SharedPages(config.page_patience_s, tiers.page_size, timers, tiers.clock)
        self.changed = self.starved = False
        self._running = 0  # requests that compute, during `admit`
        tiers.add_transfer_listener(self.loading.on_transfer)

    def __len__(self) -> int:
        """Requests that wait to be admitted."""
        return len(self.queue) + len(self.overdue) + len(self.shared)

    # Arrival and end --------------------------------------------------------------------------------------------

    def add(self, state: RequestState) -> None:
        state.status = RequestStatus.WAITING
        self.namespaces.observe(state.request.client, state.request.namespace)
        self.queue.push(state)
        self._announce(state, True)
        self.changed = True

    def _announce(self, state: RequestState, waiting: bool) -> None:
        """Tells the predictor that a request waits, which protects its cached prompt; once admitted its handle does."""
        if state.announced != waiting:
            state.announced = waiting
            (self.predictor.on_wait if waiting else self.predictor.on_admit)(state.agent)

    def remove(self, state: RequestState) -> None:
        """Forgets a request that ends, and frees its handle and reserved bytes."""
        self.queue.remove(state)
        self.overdue.pop(state, None)
        self._announce(state, False)
        self.withdraw(state)

    def withdraw(self, state: RequestState) -> None:
        """Cancels a request's loads, releases its handle and returns its reserved bytes to the device pool."""
        self.loading.remove(state)
        self._requeue(self.shared.remove(state))
        if state.handle is not None:
            state.handle.release()
            state.handle = None
        if state.reserved_bytes:
            self.tiers.unreserve(state.reserved_bytes)
        state.reserved_bytes = 0
        self.changed = True

    def preempt(self, state: RequestState) -> None:
        """Gives the memory of an admitted request to others; it waits in its old place, with its answer so far."""
        self.withdraw(state)
        state.requeue()
        state.num_preemptions += 1
        state.preemptible, state.refused_since = False, None
        self.metrics.preemptions += 1
        self.metrics.events += 1
        self.add(state)

    # Shared pages -----------------------------------------------------------------------------------------------

    def computed(self, state: RequestState) -> None:
        """A chunk of its prompt has been computed: requests that waited for its pages are to be admitted."""
        self._requeue(self.shared.progress(state))
        if state.status is not RequestStatus.PREFILL:
            self._requeue(self.shared.remove(state))

    def check_patience(self, state: RequestState) -> None:
        """Queues a request again that waits for pages of one that makes no progress."""
        if state in self.shared and self.shared.has_lost_patience(state):
            self._requeue([state])

    def _requeue(self, followers: list[RequestState]) -> None:
        for state in followers:
            self.queue.push(state)
            self.changed = True

    def settle_charge(self, state: RequestState) -> None:
        """Corrects the charge of a request that has ended to what was computed for it."""
        weighted = state.num_prefilled_tokens + self.config.output_token_weight * state.num_output_tokens
        self.queue.charge(state, weighted - state.charged_tokens)

    # Admission --------------------------------------------------------------------------------------------------

    def admit(self, slots: int, running: Collection[RequestState]) -> list[RequestState]:
        """Returns requests that can be computed from now on, and begins the loads of others.

        Args:
            slots: upper bound on the number of requests returned.
            running: the requests that are being computed.
        """
        idle = not running
        self._collect_loads()
        ready = self.loading.take_ready(slots)
        self._running = self.config.max_num_seqs - slots + len(ready)
        idle = idle and not ready
        self.changed = self.changed or self.loading.transfers_ended
        self.loading.transfers_ended = False
        if not self.changed and not (idle and not self.loading):
            return ready
        self.changed = self.starved = False
        refused: list[RequestState] = []
        deferred_overdue: set[RequestState] = set()
        admitted = [*running, *self.loading, *self.loading.ready, *ready]
        while len(ready) < slots and len(refused) < self.config.max_refusals_per_step:
            state = self._next(deferred_overdue)
            if state is None:
                break
            try:
                with self.tiers.history.acting_for(state.request.client, state.request.agent):
                    result = self._try_admit(state, idle and not ready and not self.loading, admitted)
            except Exception as error:
                self._fail(state, error)
                continue
            if result is AdmissionResult.DEFERRED:
                self._defer(state, refused, deferred_overdue)
                continue
            if result in (AdmissionResult.FOLLOWS, AdmissionResult.OUTGROWN):
                self.overdue.pop(state, None)
                if result is AdmissionResult.OUTGROWN:
                    self._outgrown(state)
                continue
            state.deferred = False
            if result is AdmissionResult.REFUSED:
                if self._refuse(state, refused):
                    break
                continue
            self.overdue.pop(state, None)
            self._announce(state, False)
            self._charge(state)
            self.shared.lead(state)
            admitted.append(state)
            if result is AdmissionResult.ADMITTED:
                ready.append(state)
        for state in refused:
            self.queue.push(state)
        return ready

    def _next(self, deferred_overdue: set[RequestState]) -> RequestState | None:
        """The next candidate. While no load can begin, deferred requests come last: their KV may be there meanwhile."""
        overdue = next((state for state in self.overdue if state not in deferred_overdue), None)
        if overdue is not None:
            return overdue
        can_load = len(self.loading) < self.config.max_concurrent_loads
        return self.queue.pop(deferred=can_load) or self.queue.pop(deferred=True)

    def _defer(self, state: RequestState, refused: list[RequestState], deferred_overdue: set[RequestState]) -> None:
        """Moves a request to the deferred lane, at the same place; this happens once to each, so it needs no bound."""
        if state in self.overdue:
            deferred_overdue.add(state)
        elif state.deferred:
            refused.append(state)
        else:
            state.deferred = True
            self.queue.push(state)

    def _refuse(self, state: RequestState, refused: list[RequestState]) -> bool:
        """Records a lack of memory; True if the admission ends with it."""
        now = self.tiers.clock()
        self.starved = True
        self.metrics.admissions_refused += 1
        if state.refused_since is None:
            state.refused_since = now
        if state in self.overdue:
            return True
        if now - state.refused_since > self.config.allocation_patience_s:
            self.overdue[state] = None
            return True
        refused.append(state)
        return False

    def _charge(self, state: RequestState) -> None:
        """Charges what an admitted request is expected to compute; `settle_charge` corrects it."""
        request, handle = state.request, state.handle
        assert handle is not None
        answer = min(request.expected_tokens or request.max_new_tokens, request.max_new_tokens)
        weighted = state.prefill_end - handle.length + self.config.output_token_weight * answer
        self.queue.charge(state, weighted - state.charged_tokens)

    def _try_admit(self, state: RequestState, alone: bool, admitted: Iterable[RequestState]) -> AdmissionResult:
        """Looks a prompt up and, if there is memory for all it needs, admits it or begins its loads.

        Args:
            alone: nothing else is computed or loaded, so waiting would not free memory.
            admitted: the requests for whose answers memory must be left.
        """
        tiers = self.tiers
        if not state.looked_up:
            self.predictor.on_lookup()
        handle = state.handle = tiers.open(state.lookup_key, state.request.namespace, retry=state.looked_up)
        state.looked_up = True
        found, choice, chain = self._choose(state, handle)
        missing = [node for node in chain if node.copies[Tier.DEVICE] is None]
        if missing and len(self.loading) >= self.config.max_concurrent_loads:
            self._release_refused(state)
            return AdmissionResult.DEFERRED
        if (found_leader := self.shared.find(state, handle.length)) is not None:
            self._release_refused(state)
            self.shared.follow(state, *found_leader)
            self.metrics.waits_for_pages += 1
            return AdmissionResult.FOLLOWS
        to_load = tiers.bytes_to_load(missing)
        wanted = self.memory.required(state, self.memory.wanted_end(state))
        room = tiers.reserve(wanted, to_load, self.memory.headroom(admitted))
        if room is AllocStatus.REFUSED and not tiers.cancel_prefetches(wanted + to_load) and alone:
            wanted, room = self._reserve_alone(state, handle, to_load)
            missing = [] if not handle.length else missing
        if room is not AllocStatus.READY:
            self._release_refused(state)
            outgrown = room is AllocStatus.REFUSED and alone and wanted > tiers.capacity()
            return AdmissionResult.OUTGROWN if outgrown else AdmissionResult.REFUSED
        state.reserved_bytes = wanted
        self.metrics.events += 1
        return self._begin(state, handle, missing, found, choice)

    def _reserve_alone(self, state: RequestState, handle: CacheHandle, to_load: int) -> tuple[int, AllocStatus]:
        """Reserves without a head-room, or without the cached prefix, which may occupy the memory that is needed.

        Returns:
            The bytes that were asked for last, and whether they are reserved.
        """
        memory, wanted, least = self.memory, self.memory.wanted_end(state), self.memory.least_end(state)
        fits_computed = memory.nbytes(state, wanted) <= self.tiers.capacity()
        if not (handle.length and fits_computed):
            nbytes = memory.required(state, least)
            room = self.tiers.reserve(nbytes, to_load)
            if room is not AllocStatus.REFUSED or not handle.length:
                return nbytes, room
        handle.truncate(handle.node.root)
        nbytes = memory.required(state, wanted if fits_computed else least)
        return nbytes, self.tiers.reserve(nbytes)

    def _release_refused(self, state: RequestState) -> None:
        """As `withdraw`, for a refused request: that frees no memory for others."""
        changed = self.changed
        self.withdraw(state)
        self.changed = changed

    def _choose(self, state: RequestState, handle: CacheHandle) -> tuple[int, LoadChoice, list[Node]]:
        """Cuts the handle to the part that is used, not recomputed; returns tokens found, choice and its nodes."""
        chain = handle.nodes()
        assert chain is not None, "what was just opened is whole"
        queued = self._running + len(self)
        choice = self.estimates.choose(chain, state.prefill_end, state.force_recompute, queued)
        found = handle.length
        if choice.nodes < len(chain):
            handle.truncate(chain[choice.nodes - 1] if choice.nodes else handle.node.root)
        return found, choice, chain[: choice.nodes]

    def _begin(
        self, state: RequestState, handle: CacheHandle, missing: list[Node], found: int, choice: LoadChoice
    ) -> AdmissionResult:
        """Admits a request whose memory is reserved, or begins to load what is missing."""
        now = self.tiers.clock()
        if missing:
            load_state = handle.load(Urgency.DEMAND, state.times.arrived)
            if load_state is not LoadState.LOADING:
                state.load_failures += 1
                state.force_recompute = state.load_failures >= self.config.max_load_failures
                self.withdraw(state)
                return AdmissionResult.REFUSED
            state.load_started = now
            state.load_deadline = now + self.config.load_timeout_factor * max(choice.load_s, choice.alternative_s)
            self.timers.set(state.load_deadline, state)
            self.loading.add(state)
        self._count(state, handle, missing, found, choice)
        return AdmissionResult.LOADING if missing else AdmissionResult.ADMITTED

    def _count(
        self, state: RequestState, handle: CacheHandle, missing: list[Node], found: int, choice: LoadChoice
    ) -> None:
        if not state.num_preemptions:
            state.cached_tokens, state.loaded_tokens = handle.length, 0
        state.loaded_tokens += sum(node.covers for node in missing)
        state.recomputed_tokens = found - handle.length
        if state.request.explain_cache and not state.num_preemptions:
            state.admitted_prompt = self._explain(state, handle, found, choice)
        if state.recomputed_tokens:
            self.metrics.recomputed_refused += state.force_recompute
            self.metrics.recomputed_late += not state.force_recompute

    def _explain(self, state: RequestState, handle: CacheHandle, found: int, choice: LoadChoice) -> AdmittedPrompt:
        """The tiers of what the handle covers, and the reasons why the rest is computed."""
        reused: dict[Tier, int] = {}
        for node in handle.nodes() or ():
            tier = node.fastest_tier
            assert tier is not None, "what a handle covers has data"
            reused[tier] = reused.get(tier, 0) + node.covers
        request, used, whole = state.request, handle.length, len(state.lookup_key) // TOKEN_BYTES
        recomputed = MissReason.LOAD_FAILED if state.force_recompute else MissReason.FASTER
        if choice.nodes and not used:  # see `_reserve_alone`
            recomputed = MissReason.NO_MEMORY
        others = self.namespaces.others(request.client, request.namespace)
        spans = [ComputedSpan(used, found, recomputed)] if used < found else []
        spans += explain_misses(self.tiers, state.lookup_key, request.namespace, found, request.client, others)
        return AdmittedPrompt(reused, (*spans, *part_of_page(whole, state.num_prompt_tokens)))

    # Loads ------------------------------------------------------------------------------------------------------

    def _collect_loads(self) -> None:
        """Advances the requests of which a transfer has ended: complete, still loading, or to be tried again."""
        for state in self.loading.take_updated():
            try:
                self._collect_load(state)
            except Exception as error:
                self._fail(state, error)

    def _collect_load(self, state: RequestState) -> None:
        assert state.handle is not None and state.status is RequestStatus.LOADING, "a loading request has a handle"
        failed = state.load_failures >= self.config.max_load_failures
        load_state = LoadState.NO_ROOM if failed else state.handle.load(Urgency.DEMAND, state.times.arrived)
        if load_state is LoadState.READY:
            self._record_stall(state)
            self.loading.complete(state)
        elif load_state is not LoadState.LOADING:
            self._retry(state, recompute=failed)
        elif self.tiers.clock() >= state.load_deadline:  # `give_up` left the decision to this
            self._retry(state, recompute=True)

    def give_up(self, state: RequestState) -> None:
        """Its loads have passed their deadline. If a transfer has just ended, `_collect_loads` decides instead."""
        if not self.loading.is_updated(state):
            self._retry(state, recompute=True)

    def _retry(self, state: RequestState, recompute: bool) -> None:
        """Gives up a request's loads and queues it again, in its old place; `recompute`: it loads nothing then."""
        self._record_stall(state)
        self.withdraw(state)
        state.force_recompute = state.force_recompute or recompute
        self.add(state)

    def _record_stall(self, state: RequestState) -> None:
        waited = max(0.0, self.tiers.clock() - state.load_started)
        state.stalled_s += waited
        self.metrics.stalled_s += waited
        self.metrics.events += 1

    def check(self) -> None:
        """Raises AssertionError unless states, handles and queues agree."""
        self.queue.check()
        self.loading.check()
        self.shared.check()
        for state in (*self.queue, *self.overdue, *self.shared):
            assert state.status is RequestStatus.WAITING and state.announced, "the predictor knows what waits"
            assert state.handle is None and not state.reserved_bytes, "waiting requests hold nothing"
