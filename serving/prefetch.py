"""Loads fixed prompts to the device ahead of their agents' calls: within budgets, in time, or not at all.

`PrefetchQueue` orders the prompts that should be on the device, `InFlightPrefetches` holds those whose loads are in
progress, and the `Prefetcher`, driven by the scheduler, moves them from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from tenure.checked import Count, Positive, Range, verify

from .kvcache.base import LoadState, Tier, Urgency
from .kvcache.estimates import Estimates
from .kvcache.radix_tree import TOKEN_BYTES, Node, Pages, encode
from .kvcache.tiered_cache import CacheHandle, TieredCache
from .kvcache.transfer_queue import Outcome, TransferJob
from .lazy_heap import LazyHeap
from .prediction import NextCallPredictor


@dataclass(frozen=True)
class PrefetchConfig:
    """Budgets and tuned numbers of a `Prefetcher`.

    Attributes:
        look_ahead_steps: steps; agents called within this many are prefetched (KVFlow's code: 2). A prompt loaded
            earlier displaces one that is called hardly later and has to be reloaded.
        look_ahead_s, min_reuse: for predictions by time, maximum of the expected seconds to the call and minimum of the
            expected discounted reuse, 0 to 1; the default is that of a call certain to come in three mean steps.
        max_in_flight: prompts loaded concurrently.
        max_device_fraction: of the device's bytes, that loads in flight may take, 0 to 1.
        max_link_s: seconds of a link's time, that loads in flight may take.
        ageing: seconds of advance in the queue per second of waiting in it.
        max_failures: failed loads of one prompt, after which it waits for a new prediction.
        max_registered: registered prompts stored until a request of the agent stores them in the cache; also agents
            whose arrived prompt has not been called yet.

    Raises:
        ValueError: a number that is not above 0 and finite, or `min_reuse` above 1.
    """

    look_ahead_steps: Positive = 2.0
    look_ahead_s: Positive = 30.0
    min_reuse: Annotated[float, Range(0, 1, above=True)] = math.exp(-7.5)
    max_in_flight: Count = 4
    max_device_fraction: Positive = 0.5
    max_link_s: Positive = 5.0
    ageing: Positive = 0.1
    max_failures: Count = 2
    max_registered: Count = 10_000

    def __post_init__(self) -> None:
        verify(self)


@dataclass
class PrefetchMetrics:
    """Counts since the prefetcher was made.

    Attributes:
        started: prompts whose loads were started; each then has `arrived`, is `cancelled` because its prediction
            changed, `displaced` by a demand for memory, or `failed`.
        used: prompts that arrived and were still on the device when their agent was called.
        too_late: not started, because computing would have been faster.
        no_room: not started, because nothing of lower rank could be evicted.
        over_budget: not started, because the prompt alone exceeds the budget.
        bytes: of the started prompts.
    """

    started: int = 0
    arrived: int = 0
    cancelled: int = 0
    displaced: int = 0
    failed: int = 0
    used: int = 0
    too_late: int = 0
    no_room: int = 0
    over_budget: int = 0
    bytes: int = 0

    @property
    def unused_bytes(self) -> float:
        """Bytes of prompts that arrived and were not used, at the mean size of a prompt."""
        return self.bytes * max(0, self.arrived - self.used) / self.started if self.started else 0.0


@dataclass(eq=False)
class PrefetchRequest:
    """An agent whose prompt should be on the device.

    Attributes:
        in_sight_since: seconds on the clock.
        due: seconds on the clock at which the call is expected.
        priority: place in the queue, smaller first: `due`, minus `ageing` times the time in sight, so that nothing
            starves. (If `due` of the first moment in sight were kept instead, a branch that was not taken would precede
            the one that was.)
    """

    agent: str
    in_sight_since: float
    due: float
    priority: float
    failures: int = 0


class PrefetchQueue:
    """Prefetch requests by priority, and agents that come into sight by time alone.

    A request is current from `request` to `discard`; meanwhile it is queued, or its load is in flight or deferred.
    """

    def __init__(self, ageing: float) -> None:
        self.ageing = ageing
        self._current: dict[str, PrefetchRequest] = {}
        self._queue: LazyHeap[PrefetchRequest] = LazyHeap()
        self._checks: LazyHeap[str] = LazyHeap()  # by (seconds on the clock, agent)

    def request(self, agent: str, now: float, due: float) -> PrefetchRequest:
        """Returns the current request of `agent`, made if there is none, with the expected time `due`; not queued."""
        self._checks.discard(agent)
        request = self._current.get(agent)
        if request is None:
            request = self._current[agent] = PrefetchRequest(agent, now, due, due)
        request.due, request.failures = due, 0
        request.priority = due - self.ageing * (now - request.in_sight_since)
        return request

    def push(self, request: PrefetchRequest) -> None:
        """Queues a request, or moves it to its new priority."""
        self._queue.push(request, request.priority)

    def peek(self) -> PrefetchRequest | None:
        return self._queue.peek()

    def is_current(self, request: PrefetchRequest) -> bool:
        return self._current.get(request.agent) is request

    def is_queued(self, request: PrefetchRequest) -> bool:
        return request in self._queue

    def dequeue(self, request: PrefetchRequest) -> None:
        self._queue.discard(request)

    def schedule_check(self, agent: str, time: float) -> None:
        """`agent` is out of sight until `time`, without further events."""
        self._checks.push(agent, (time, agent))

    def discard_request(self, agent: str) -> None:
        """Drops the request of `agent`, if any."""
        request = self._current.pop(agent, None)
        if request is not None:
            self._queue.discard(request)

    def discard(self, agent: str) -> None:
        """Drops the request and the scheduled check of `agent`, if any."""
        self.discard_request(agent)
        self._checks.discard(agent)

    def pop_checks(self, now: float) -> Iterator[str]:
        """Removes and yields the agents whose checks are due."""
        while (time := self.next_time()) is not None and time <= now:
            agent = self._checks.pop()
            assert agent is not None
            yield agent

    def next_time(self) -> float | None:
        """Time of the next check in seconds on the clock."""
        first = self._checks.peek_priority()
        return None if first is None else first[0]

    def clear(self) -> None:
        self._current.clear()
        self._queue.clear()
        self._checks.clear()


@dataclass(eq=False)
class InFlightPrefetch:
    """A prompt that is being loaded. Its handle, which this object owns, protects the prompt until it has arrived."""

    request: PrefetchRequest
    handle: CacheHandle
    nbytes: int
    seconds: float
    client: str


class InFlightPrefetches:
    """The prefetches in flight by agent, by handle and by client, and the requests deferred until one of them ends.

    Attributes:
        nbytes, seconds: of all of them together.
    """

    def __init__(self) -> None:
        self.nbytes, self.seconds = 0, 0.0
        self._by_agent: dict[str, InFlightPrefetch] = {}
        self._by_handle: dict[int, InFlightPrefetch] = {}
        self._deferred: dict[str, dict[PrefetchRequest, None]] = {}

    def __len__(self) -> int:
        return len(self._by_agent)

    def __iter__(self) -> Iterator[InFlightPrefetch]:
        return iter(list(self._by_agent.values()))

    def __contains__(self, agent: str) -> bool:
        return agent in self._by_agent

    def __getitem__(self, agent: str) -> InFlightPrefetch:
        return self._by_agent[agent]

    def by_handle(self, handle_id: int) -> InFlightPrefetch | None:
        return self._by_handle.get(handle_id)

    def handle_ids(self) -> set[int]:
        return set(self._by_handle)

    def client_bytes(self, client: str) -> int:
        return sum(prefetch.nbytes for prefetch in self._by_agent.values() if prefetch.client == client)

    def add(self, prefetch: InFlightPrefetch) -> None:
        self._by_agent[prefetch.request.agent] = self._by_handle[prefetch.handle.id] = prefetch
        self.nbytes, self.seconds = self.nbytes + prefetch.nbytes, self.seconds + prefetch.seconds

    def defer(self, request: PrefetchRequest, client: str) -> None:
        """Holds a request over the quota of `client` until a prefetch of the client has ended."""
        self._deferred.setdefault(client, {})[request] = None

    def remove(self, prefetch: InFlightPrefetch) -> list[PrefetchRequest]:
        """Removes a prefetch that has ended; returns the requests that were deferred for it."""
        del self._by_agent[prefetch.request.agent], self._by_handle[prefetch.handle.id]
        self.nbytes, self.seconds = self.nbytes - prefetch.nbytes, self.seconds - prefetch.seconds
        return list(self._deferred.pop(prefetch.client, {}))


class _StartResult(Enum):
    """Result of trying to start the first request of the queue."""

    STARTED = "its loads are in flight"
    DROPPED = "there is nothing to do until the prediction changes"
    DEFERRED = "its client has reached its quota; others may pass"
    BLOCKED = "it has to wait, and requests behind it as well"


class Prefetcher:
    """Driven by a scheduler: `values_changed` after predictions, `start_prefetches` whenever loads may be started.

    It only takes memory that is free or evictable below the rank of the prompt. It holds a handle on a prompt while the
    load is in flight; afterwards only the eviction policy protects the prompt.

    Args:
        only_lower_ranked: False: evict as a demand load does, for eviction policies that know no agents, where a
            prompt that is called next may rank last.
        touch_on_arrival: an arrival counts as a use, for eviction policies by recency.
    """

    def __init__(
        self, tiers: TieredCache, estimates: Estimates, predictor: NextCallPredictor,
        config: PrefetchConfig | None = None, only_lower_ranked: bool = True, touch_on_arrival: bool = False,
    ) -> None:  # fmt: skip
        self.tiers, self.estimates, self.predictor = tiers, estimates, predictor
        self.config = config or PrefetchConfig()
        self.only_lower_ranked, self.touch_on_arrival = only_lower_ranked, touch_on_arrival
        self.statistics = PrefetchMetrics()
        self._queue = PrefetchQueue(self.config.ageing)
        self._in_flight = InFlightPrefetches()
        self._ended_jobs: dict[InFlightPrefetch, TransferJob] = {}  # since the last `start_prefetches`
        self._arrived: dict[str, None] = {}
        self._registered: dict[str, tuple[Pages, Hashable]] = {}
        self._may_start = False  # something has changed that may let a load start
        tiers.add_transfer_listener(self._on_transfer_end)

    def register(self, agent: str, prompt: Sequence[int] | Any, namespace: Hashable = None) -> None:
        """Gives the fixed prompt of `agent` before any of its requests has.

        Raises:
            ValueError: see `radix_tree.encode`.
        """
        with self.tiers.lock:
            if agent not in self._registered and len(self._registered) >= self.config.max_registered:
                del self._registered[next(iter(self._registered))]
            self._registered[agent] = Pages(encode(prompt, self.tiers.page_size)), namespace
            self.values_changed([agent])

    # Requests ---------------------------------------------------------------------------------------------------

    def values_changed(self, agents: Iterable[str]) -> None:
        """The predictions of these agents have changed: updates their requests and cancels loads that are obsolete."""
        for agent in agents:
            self._update(agent)
        self._may_start = True

    def on_request(self, agent: str) -> None:
        """A request of `agent` has arrived: counts whether its prefetched prompt is still on the device."""
        if agent in self._arrived:
            del self._arrived[agent]
            end = self.tiers.lookup_agent(agent)
            self.statistics.used += end is not None and end.copies[Tier.DEVICE] is not None

    def _update(self, agent: str) -> None:
        """Makes, moves or drops the request of `agent` according to its prediction."""
        now, config, predictor = self.tiers.clock(), self.config, self.predictor
        if predictor.next_steps(agent) > config.look_ahead_steps and not predictor.is_observed_successor(agent):
            self._cancel(agent)
            return
        seconds = predictor.seconds_to_call(agent)
        wait = predictor.seconds_to_sight(agent, seconds, config.look_ahead_s, config.min_reuse)
        if wait:
            self._cancel(agent)
            if wait < min(seconds, math.inf):
                self._queue.schedule_check(agent, now + wait)
            return
        end = self.tiers.lookup_agent(agent)
        if end is None and agent not in self._registered:
            return  # nothing of its prompt is cached
        if (
            end is not None
            and agent not in self._in_flight
            and all(node.on_or_loading_into(Tier.DEVICE) for node in end.path())
        ):
            self._queue.discard(agent)  # it is on the device
            return
        request = self._queue.request(agent, now, now + seconds)
        if agent not in self._in_flight:
            self._queue.push(request)

    def _cancel(self, agent: str) -> None:
        """Drops the request of `agent` and stops its load, unless another handle needs it."""
        self._queue.discard(agent)
        if agent in self._in_flight:
            self._end(self._in_flight[agent])
            self.statistics.cancelled += 1

    # Loads ------------------------------------------------------------------------------------------------------

    def start_prefetches(self, paused: bool = False, room_freed: bool = False) -> None:
        """Processes loads that have ended, and starts the most urgent ones that the budgets allow.

        Args:
            paused: start nothing, because requests wait for memory.
            room_freed: memory may have become available since the last call.
        """
        self._may_start = self._may_start or room_freed
        for prefetch, job in list(self._ended_jobs.items()):
            del self._ended_jobs[prefetch]
            self._on_job_end(prefetch, job)
        for agent in self._queue.pop_checks(self.tiers.clock()):
            self._update(agent)
            self._may_start = True
        if paused or not self._may_start:
            return
        self._may_start = False
        over_quota: set[str] = set()
        while len(self._in_flight) < self.config.max_in_flight and (request := self._queue.peek()) is not None:
            client = self.predictor.quotas.owner(request.agent)
            result = _StartResult.DEFERRED if client in over_quota else self._start(request, client)
            if result is _StartResult.BLOCKED:
                return
            if result is _StartResult.DEFERRED:
                over_quota.add(client)
                self._queue.dequeue(request)
                self._in_flight.defer(request, client)

    def _start(self, request: PrefetchRequest, client: str) -> _StartResult:
        if self._cannot_make_room(request.agent):
            self.statistics.no_room += 1
            return _StartResult.BLOCKED
        handle = self._open(request.agent)
        missing = (
            []
            if handle is None
            else [node for node in handle.nodes() or () if not node.on_or_loading_into(Tier.DEVICE)]
        )
        if handle is None or not missing:
            self._drop(request, handle)
            return _StartResult.DROPPED
        nbytes, seconds = sum(node.nbytes for node in missing), self.estimates.load_s(missing)
        refusal = self._check_budgets(request, client, handle, missing, nbytes, seconds)
        if refusal is not None:
            handle.release()
            if refusal is _StartResult.DROPPED:
                self._drop(request, None)
            return refusal
        with self.tiers.history.acting_for(client, request.agent.removesuffix(f"@{client}")):
            state = handle.load(Urgency.PREFETCH, request.priority, only_lower_ranked=self.only_lower_ranked)
        if state is LoadState.LOADING:
            self._queue.dequeue(request)
            self._in_flight.add(InFlightPrefetch(request, handle, nbytes, seconds, client))
            self.statistics.started += 1
            self.statistics.bytes += nbytes
            return _StartResult.STARTED
        handle.release()
        self.statistics.no_room += state is LoadState.NO_ROOM
        if state in (LoadState.WAITING, LoadState.NO_ROOM):
            return _StartResult.BLOCKED
        self._drop(request, None)
        return _StartResult.DROPPED

    def _cannot_make_room(self, agent: str) -> bool:
        """Whether no memory is free and nothing ranks below the prompt; without a handle, as it is called often."""
        end = self.tiers.lookup_agent(agent)
        if end is None or not self.only_lower_ranked or end.on_or_loading_into(Tier.DEVICE):
            return False
        return not self.tiers.can_make_room(end)

    def _check_budgets(
        self, request: PrefetchRequest, client: str, handle: CacheHandle, missing: list[Node], nbytes: int,
        seconds: float,
    ) -> _StartResult | None:  # fmt: skip
        """Why the loads must not start now; None if they may."""
        budget = self.config.max_device_fraction * self.tiers.capacity()
        statistics, in_flight = self.statistics, self._in_flight
        if nbytes > budget:
            statistics.over_budget += 1
            return _StartResult.DROPPED
        begin = missing[0].end - missing[0].covers
        computed = self.estimates.costs.recompute_s(begin, handle.length)
        now = self.tiers.clock()
        if now + in_flight.seconds + seconds > max(request.due, now) + computed:
            statistics.too_late += 1
            return _StartResult.DROPPED
        own = in_flight.client_bytes(client) if client else 0
        if own and own + nbytes > budget * self.predictor.quotas.fraction(client):
            return _StartResult.DEFERRED
        full = in_flight.nbytes + nbytes > budget or in_flight.seconds + seconds > self.config.max_link_s
        return _StartResult.BLOCKED if full and len(in_flight) else None

    def _open(self, agent: str) -> CacheHandle | None:
        """A handle on the fixed prompt of `agent`, tagged if it was only registered; None if nothing is cached."""
        handle = self.tiers.open_agent(agent)
        if handle is not None or agent not in self._registered:
            return handle
        prompt, namespace = self._registered[agent]
        with self.tiers.open(prompt, namespace, retry=True) as found:
            if found.length == 0:
                return None
            self.tiers.store(found, Pages(prompt[: found.length * TOKEN_BYTES]), None, agent, found.length)
        return self.tiers.open_agent(agent)

    def _drop(self, request: PrefetchRequest, handle: CacheHandle | None) -> None:
        """Drops a request until the prediction of its agent changes, and releases `handle`."""
        self._queue.dequeue(request)
        if self._queue.is_current(request):
            self._queue.discard_request(request.agent)
        if handle is not None:
            handle.release()

    def _on_transfer_end(self, job: TransferJob) -> None:
        self._may_start = True  # there may be room
        for handle_id in job.waiters:
            if (prefetch := self._in_flight.by_handle(handle_id)) is not None:
                self._ended_jobs[prefetch] = job

    def _on_job_end(self, prefetch: InFlightPrefetch, job: TransferJob) -> None:
        """One of its transfers has ended: the prompt has arrived, more is to come, or the load has failed."""
        if self._in_flight.by_handle(prefetch.handle.id) is not prefetch:
            return
        chain = prefetch.handle.nodes()
        missing = None if chain is None else [node for node in chain if node.copies[Tier.DEVICE] is None]
        request, statistics = prefetch.request, self.statistics
        if missing and job.outcome is Outcome.DONE and all(node.in_transfer for node in missing):
            return
        if missing == []:
            statistics.arrived += 1
            self._arrived[request.agent] = None
            if len(self._arrived) > self.config.max_registered:
                del self._arrived[next(iter(self._arrived))]
            if self.touch_on_arrival:
                prefetch.handle.touch()
            self._end(prefetch)
            self._drop(request, None)
            return
        statistics.displaced += job.outcome is Outcome.CANCELLED
        statistics.failed += job.outcome is not Outcome.CANCELLED
        request.failures += 1
        self._end(prefetch)
        if request.failures < self.config.max_failures and self._queue.is_current(request):
            self._queue.push(request)
        else:
            self._drop(request, None)

    def _end(self, prefetch: InFlightPrefetch) -> None:
        """Removes a prefetch, queues the requests deferred for it, and releases its handle."""
        queue = self._queue
        for request in self._in_flight.remove(prefetch):
            if queue.is_current(request) and not queue.is_queued(request) and request.agent not in self._in_flight:
                queue.push(request)
        self._ended_jobs.pop(prefetch, None)
        prefetch.handle.release()

    # Time -------------------------------------------------------------------------------------------------------

    def next_time(self) -> float | None:
        """When an agent next comes into sight, in seconds on the clock, without further events."""
        return self._queue.next_time()

    def handle_ids(self) -> set[int]:
        return self._in_flight.handle_ids()

    def close(self) -> None:
        """Cancels all loads in flight and drops all requests."""
        for prefetch in self._in_flight:
            self._end(prefetch)
        self._queue.clear()
