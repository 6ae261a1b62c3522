"""Budgets of a prefetcher, and what it has done with them.

Which agents' prompts are wanted on the device, and in which order they are brought there.

The prompts that a prefetcher has on their way to the device, and what waits for a client's flights to end.

Brings fixed prompts to the device ahead of their agents' calls: within budgets, in time, or not at all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Any

from .kvcache.base import Tier, Urgency
from .kvcache.estimates import Estimates
from .kvcache.radix_tree import TOKEN_BYTES, Node, Pages, encode
from .kvcache.tiered_cache import CacheHandle, LoadState, TieredCache
from .kvcache.transfer_queue import Outcome, TransferJob
from .prediction import NextCallPredictor


@dataclass(frozen=True)
class PrefetchConfig:
    """Budgets of a `Prefetcher`.

    Attributes:
        look_ahead_steps: agents that may be called within so many steps are wanted (KVFlow's code: 2). What is brought
            earlier displaces what is called hardly later, and has to be brought back.
        look_ahead_s, least_reuse: where calls are expected by time, only those within so many seconds, and with so much
            expected discounted reuse, 0 to 1: by default that of a call which is certain to come in three mean steps.
        copies: prompts that are on their way at once.
        share: of the device's bytes, that those may take.
        seconds: of a link's time, that those may take.
    """

    look_ahead_steps: float = 2.0
    look_ahead_s: float = 30.0
    least_reuse: float = math.exp(-7.5)
    copies: int = 4
    share: float = 0.5
    seconds: float = 5.0

    def __post_init__(self) -> None:
        for name in ("look_ahead_steps", "look_ahead_s", "least_reuse", "copies", "share", "seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"got {name}={getattr(self, name)}; accepted: a finite number above 0")
        if self.least_reuse > 1:
            raise ValueError(f"got least_reuse={self.least_reuse}; accepted: above 0 and up to 1")


@dataclass
class PrefetchMetrics:
    """Counts since the prefetcher was made.

    Attributes:
        begun: prompts whose copies were begun; each then has `arrived`, is `cancelled` because the plan changed,
            `displaced` by a demand for the room, or `failed`.
        used: those that arrived and were there when their agent was called.
        too_late: not begun, as computing would have been sooner. no_room: nothing that ranks below could go.
            over_budget: not begun, as it alone is more than the budget.
        bytes: of the prompts that were begun.
    """

    begun: int = 0
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
        """Of prompts that arrived and were not there when their agents were called, at the mean size of a prompt."""
        return self.bytes * max(0, self.arrived - self.used) / self.begun if self.begun else 0.0


AGEING = 0.1  # seconds that a second in sight is worth in the order of the wishes


@dataclass(eq=False)
class PrefetchRequest:
    """An agent whose prompt should be on the device.

    Attributes:
        since: when it came into sight. due: when it is expected to be called.
        key: of its place among the wishes, smaller first: when it is due, and the sooner the longer it has been in
            sight, so that nothing starves. (Were it kept from when it came into sight, a branch that was not taken
            would go before the one that was.)
        stamp: of its valid entry in the heap, 0 = in none.
    """

    agent: str
    since: float
    due: float
    key: float
    stamp: int = 0
    failures: int = 0


class PrefetchQueue:
    """Wishes by key, and the agents that come into sight with time alone."""

    def __init__(self) -> None:
        self._wishes: dict[str, PrefetchRequest] = {}
        self._heap: list[tuple[float, int, PrefetchRequest]] = []
        self._looks: dict[str, float] = {}
        self._later: list[tuple[float, str]] = []
        self._numbers = count(1)

    def want(self, agent: str, now: float, due: float) -> PrefetchRequest:
        """`agent` is in sight and expected to be called at `due`."""
        self._looks.pop(agent, None)
        wish = self._wishes.get(agent)
        if wish is None:
            wish = self._wishes[agent] = PrefetchRequest(agent, now, due, due)
        wish.due, wish.key, wish.failures = due, due - AGEING * (now - wish.since), 0
        return wish

    def enter(self, wish: PrefetchRequest) -> None:
        """It is to be granted, in its turn."""
        wish.stamp = next(self._numbers)
        heapq.heappush(self._heap, (wish.key, wish.stamp, wish))
        if len(self._heap) > 4 * len(self._wishes) + 64:  # most are stale
            self._heap = [(w.key, w.stamp, w) for w in self._wishes.values() if w.stamp]
            heapq.heapify(self._heap)

    def first(self) -> PrefetchRequest | None:
        """The one whose turn it is; it stays."""
        while self._heap and self._heap[0][2].stamp != self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def holds(self, wish: PrefetchRequest) -> bool:
        """Whether it is still wished."""
        return self._wishes.get(wish.agent) is wish

    def drop(self, agent: str) -> None:
        """Nothing is to be done for `agent` until there is news of it."""
        wish = self._wishes.pop(agent, None)
        if wish is not None:
            wish.stamp = 0

    def look_at(self, agent: str, time: float) -> None:
        """`agent` is out of sight until then, if nothing changes."""
        if self._looks.get(agent) != time:
            self._looks[agent] = time
            heapq.heappush(self._later, (time, agent))
            if len(self._later) > 4 * len(self._looks) + 64:  # most are stale
                self._later = [(time, agent) for agent, time in self._looks.items()]
                heapq.heapify(self._later)

    def forget(self, agent: str) -> None:
        """`agent` is out of sight."""
        self.drop(agent)
        self._looks.pop(agent, None)

    def due(self, now: float) -> Iterator[str]:
        """The agents to be looked at now, out of the list of these."""
        while self._later and self._later[0][0] <= now:
            time, agent = heapq.heappop(self._later)
            if self._looks.get(agent) == time:
                del self._looks[agent]
                yield agent

    def next_time(self) -> float | None:
        """When an agent is to be looked at next."""
        while self._later and self._looks.get(self._later[0][1]) != self._later[0][0]:
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else None

    def clear(self) -> None:
        for each in (self._wishes, self._heap, self._looks, self._later):
            each.clear()


@dataclass(eq=False)
class InFlightPrefetch:
    """A prompt on its way; the lease keeps it until it has arrived."""

    wish: PrefetchRequest
    handle: CacheHandle
    nbytes: int
    seconds: float
    client: str


class InFlightPrefetches:
    """By agent, by lease, and by client.

    Attributes:
        nbytes, seconds: of all of them together.
    """

    def __init__(self) -> None:
        self.nbytes, self.seconds = 0, 0.0
        self._by_agent: dict[str, InFlightPrefetch] = {}
        self._by_lease: dict[int, InFlightPrefetch] = {}
        self._parked: dict[str, dict[PrefetchRequest, None]] = {}

    def __len__(self) -> int:
        return len(self._by_agent)

    def __iter__(self) -> Iterator[InFlightPrefetch]:
        return iter(list(self._by_agent.values()))

    def __contains__(self, agent: str) -> bool:
        return agent in self._by_agent

    def __getitem__(self, agent: str) -> InFlightPrefetch:
        return self._by_agent[agent]

    def of_lease(self, number: int) -> InFlightPrefetch | None:
        return self._by_lease.get(number)

    def handles(self) -> set[int]:
        """The numbers of their leases."""
        return set(self._by_lease)

    def of_client(self, client: str) -> int:
        """Bytes on their way for `client`."""
        return sum(flight.nbytes for flight in self._by_agent.values() if flight.client == client)

    def add(self, flight: InFlightPrefetch) -> None:
        self._by_agent[flight.wish.agent] = self._by_lease[flight.handle.id] = flight
        self.nbytes, self.seconds = self.nbytes + flight.nbytes, self.seconds + flight.seconds

    def park(self, wish: PrefetchRequest, client: str) -> None:
        """It is beyond the share of `client`, which has flights: it waits for one of them to end."""
        self._parked.setdefault(client, {})[wish] = None

    def remove(self, flight: InFlightPrefetch) -> list[PrefetchRequest]:
        """It is over; returns the wishes that waited for it."""
        del self._by_agent[flight.wish.agent], self._by_lease[flight.handle.id]
        self.nbytes, self.seconds = self.nbytes - flight.nbytes, self.seconds - flight.seconds
        return list(self._parked.pop(flight.client, {}))


MAX_REGISTERED = 10_000  # agents that are remembered until a request of theirs comes
FAILURES = 2  # of one wish, after which it waits for news of its agent


class _Verdict(Enum):
    """What has become of a wish whose turn it was."""

    BEGUN = "its copies are under way"
    DROPPED = "there is nothing to do before there is news of its agent"
    PARKED = "its client has its share under way already; others may pass"
    WAIT = "it has to wait, and what is wanted less with it"


class Prefetcher:
    """Driven by a scheduler: `changed` when values have, `pump` whenever copies may be begun.

    It takes only memory that is free or that holds what ranks below the prompt in the order of eviction, and it holds
    a lease only while the prompt is on its way; afterwards the order alone keeps it.

    Args:
        only_below: False: as a demand, it evicts whatever the order puts first (for orders that know no agents, under
            which a prompt that is called next may rank last).
        counts_as_use: an arrival counts as a use, for orders that go by the last use.
    """

    def __init__(
        self,
        tiers: TieredCache,
        estimates: Estimates,
        predictor: NextCallPredictor,
        limits: PrefetchConfig | None = None,
        only_below: bool = True,
        counts_as_use: bool = False,
    ) -> None:
        self.tiers, self.estimates, self.predictor = tiers, estimates, predictor
        self.limits = limits or PrefetchConfig()
        self.only_below, self.counts_as_use = only_below, counts_as_use
        self.statistics = PrefetchMetrics()
        self._wishes = PrefetchQueue()
        self._flights = InFlightPrefetches()
        self._landed: dict[InFlightPrefetch, TransferJob] = {}
        self._arrived: dict[str, None] = {}
        self._registered: dict[str, tuple[Pages, Hashable]] = {}
        self._news = False
        tiers.add_transfer_listener(self._on_copy)

    def register(self, agent: str, prompt: Sequence[int] | Any, namespace: Hashable = None) -> None:
        """`prompt` is the fixed prompt of `agent`, of which no request has told yet.

        Raises:
            ValueError: see `pages.encode`.
        """
        with self.tiers.lock:
            if agent not in self._registered and len(self._registered) >= MAX_REGISTERED:
                del self._registered[next(iter(self._registered))]
            self._registered[agent] = Pages(encode(prompt, self.tiers.page_size)), namespace
            self.changed([agent])

    # Wishes -----------------------------------------------------------------------------------------------------

    def changed(self, agents: Iterable[str]) -> None:
        """The outlook of these agents is a new one: wishes come and go, and copies for what is not wanted stop."""
        for agent in agents:
            self._consider(agent)
        self._news = True

    def called(self, agent: str) -> None:
        """A request of `agent` has come."""
        if agent in self._arrived:
            del self._arrived[agent]
            end = self.tiers.lookup_agent(agent)
            self.statistics.used += end is not None and end.copies[Tier.DEVICE] is not None  # not evicted meanwhile

    def _consider(self, agent: str) -> None:
        now, limits = self.tiers.clock(), self.limits
        if self.predictor.next_steps(agent) > limits.look_ahead_steps and not self.predictor.is_near(agent):
            self._forget(agent)
            return
        seconds = self.predictor.due(agent)
        wait = self.predictor.wait(agent, seconds, limits.look_ahead_s, limits.least_reuse)
        if wait:
            self._forget(agent)
            if wait < min(seconds, math.inf):
                self._wishes.look_at(agent, now + wait)
            return
        end = self.tiers.lookup_agent(agent)
        if end is None and agent not in self._registered:
            return  # nothing of it is cached
        if end is not None and agent not in self._flights and all(_comes(node) for node in end.path()):
            self._wishes.forget(agent)  # it is there
            return
        wish = self._wishes.want(agent, now, now + seconds)
        if agent not in self._flights:
            self._wishes.enter(wish)

    def _forget(self, agent: str) -> None:
        """It is not wanted any more; a copy that is under way for it alone stops."""
        self._wishes.forget(agent)
        if agent in self._flights:
            flight = self._flights[agent]
            self._end(flight)
            self.statistics.cancelled += 1

    # Copies -----------------------------------------------------------------------------------------------------

    def pump(self, hold: bool = False, room: bool = False) -> None:
        """Takes in what has arrived, and begins the most urgent copies that the budgets allow.

        Args:
            hold: begin nothing: requests wait for memory.
            room: there may be some that there was not at the last call.
        """
        self._news = self._news or room
        for flight, job in list(self._landed.items()):
            del self._landed[flight]
            self._land(flight, job)
        for agent in self._wishes.due(self.tiers.clock()):
            self._consider(agent)
            self._news = True
        if hold or not self._news:
            return
        self._news = False
        beyond: set[str] = set()
        while len(self._flights) < self.limits.copies and (wish := self._wishes.first()) is not None:
            client = self.predictor.shares.owner(wish.agent)
            verdict = _Verdict.PARKED if client in beyond else self._begin(wish, client)
            if verdict is _Verdict.WAIT:
                return
            if verdict is _Verdict.PARKED:
                beyond.add(client)
                wish.stamp = 0
                self._flights.park(wish, client)

    def _begin(self, wish: PrefetchRequest, client: str) -> _Verdict:
        """Begins the copies for a wish, or finds why not."""
        if self._is_hopeless(wish.agent):
            self.statistics.no_room += 1
            return _Verdict.WAIT
        handle = self._open(wish.agent)
        missing = [] if handle is None else [node for node in handle.nodes() or () if not _comes(node)]
        if handle is None or not missing:
            self._drop(wish, handle)
            return _Verdict.DROPPED
        nbytes, seconds = sum(node.nbytes for node in missing), self.estimates.load_s(missing)
        verdict = self._may_begin(wish, client, handle, missing, nbytes, seconds)
        if verdict is not _Verdict.BEGUN:
            handle.release()
            if verdict is _Verdict.DROPPED:
                self._drop(wish, None)
            return verdict
        state = handle.load(Urgency.PREFETCH, wish.key, only_lower_ranked=self.only_below)
        if state is LoadState.LOADING:
            wish.stamp = 0
            self._flights.add(InFlightPrefetch(wish, handle, nbytes, seconds, client))
            self.statistics.begun += 1
            self.statistics.bytes += nbytes
            return _Verdict.BEGUN
        handle.release()
        self.statistics.no_room += state is LoadState.NO_ROOM
        if state in (LoadState.WAITING, LoadState.NO_ROOM):
            return _Verdict.WAIT
        self._drop(wish, None)
        return _Verdict.DROPPED

    def _is_hopeless(self, agent: str) -> bool:
        """Whether there is no room and nothing that ranks below: found without a lease, as it is asked often."""
        end = self.tiers.lookup_agent(agent)
        if end is None or not self.only_below or _comes(end):
            return False
        return not self.tiers.can_make_room(end)

    def _may_begin(
        self, wish: PrefetchRequest, client: str, handle: CacheHandle, missing: list[Node], nbytes: int, seconds: float
    ) -> _Verdict:
        """BEGUN: it may."""
        budget = self.limits.share * self.tiers.capacity()
        statistics, flights = self.statistics, self._flights
        if nbytes > budget:
            statistics.over_budget += 1
            return _Verdict.DROPPED
        begin = missing[0].end - missing[0].covers
        computed = self.estimates.costs.recompute_s(begin, handle.length)
        if self.tiers.clock() + flights.seconds + seconds > max(wish.due, self.tiers.clock()) + computed:
            statistics.too_late += 1
            return _Verdict.DROPPED
        mine = flights.of_client(client) if client else 0
        if mine and mine + nbytes > budget * self.predictor.shares.part(client):
            return _Verdict.PARKED
        full = flights.nbytes + nbytes > budget or flights.seconds + seconds > self.limits.seconds
        return _Verdict.WAIT if full and len(flights) else _Verdict.BEGUN

    def _open(self, agent: str) -> CacheHandle | None:
        handle = self.tiers.open_agent(agent)
        if handle is not None or agent not in self._registered:
            return handle
        prompt, namespace = self._registered[agent]
        with self.tiers.open(prompt, namespace, retry=True) as found:
            if found.length == 0:
                return None
            self.tiers.store(found, Pages(prompt[: found.length * TOKEN_BYTES]), None, agent, found.length)
        return self.tiers.open_agent(agent)

    def _drop(self, wish: PrefetchRequest, handle: CacheHandle | None) -> None:
        """Nothing is to be done for it until there is news of its agent."""
        wish.stamp = 0
        if self._wishes.holds(wish):
            self._wishes.drop(wish.agent)
        if handle is not None:
            handle.release()

    def _on_copy(self, job: TransferJob) -> None:
        self._news = True  # there may be room
        for number in job.waiters:
            if (flight := self._flights.of_lease(number)) is not None:
                self._landed[flight] = job

    def _land(self, flight: InFlightPrefetch, job: TransferJob) -> None:
        """One of its copies has ended."""
        if self._flights.of_lease(flight.handle.id) is not flight:
            return
        chain = flight.handle.nodes()
        missing = None if chain is None else [node for node in chain if node.copies[Tier.DEVICE] is None]
        wish, statistics = flight.wish, self.statistics
        if missing and job.outcome is Outcome.DONE and all(node.in_transfer for node in missing):
            return
        if missing == []:
            statistics.arrived += 1
            self._arrived[wish.agent] = None
            if len(self._arrived) > MAX_REGISTERED:
                del self._arrived[next(iter(self._arrived))]
            if self.counts_as_use:
                flight.handle.touch()
            self._end(flight)
            self._drop(wish, None)
            return
        statistics.displaced += job.outcome is Outcome.CANCELLED
        statistics.failed += job.outcome is not Outcome.CANCELLED
        wish.failures += 1
        self._end(flight)
        if wish.failures < FAILURES and self._wishes.holds(wish):
            self._wishes.enter(wish)
        else:
            self._drop(wish, None)

    def _end(self, flight: InFlightPrefetch) -> None:
        for wish in self._flights.remove(flight):
            if self._wishes.holds(wish) and not wish.stamp and wish.agent not in self._flights:
                self._wishes.enter(wish)
        self._landed.pop(flight, None)
        flight.handle.release()

    # Time -------------------------------------------------------------------------------------------------------

    def next_time(self) -> float | None:
        """When an agent comes into sight without other news."""
        return self._wishes.next_time()

    def handles(self) -> set[int]:
        """The numbers of the leases that it holds."""
        return self._flights.handles()

    def close(self) -> None:
        """Gives up everything that is under way."""
        for flight in self._flights:
            self._end(flight)
        self._wishes.clear()


def _comes(node: Node) -> bool:
    """Whether it is on the device, or on its way there."""
    return node.on_or_loading_into(Tier.DEVICE)
