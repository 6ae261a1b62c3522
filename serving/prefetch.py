"""Brings fixed prompts to the device ahead of their agents' calls: within budgets, in time, or not at all."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from enum import Enum
from typing import Any

from .copies import CopyJob, Outcome, Urgency
from .estimates import Estimates
from .flights import Flight, Flights
from .lease import Lease, LoadState
from .node import Node, Tier
from .outlook import Outlook
from .pages import TOKEN_BYTES, Pages, encode
from .prefetch_limits import PrefetchLimits, PrefetchStatistics
from .tiers import TieredTree
from .wishes import Wish, Wishes

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
        tiers: TieredTree,
        estimates: Estimates,
        outlook: Outlook,
        limits: PrefetchLimits | None = None,
        only_below: bool = True,
        counts_as_use: bool = False,
    ) -> None:
        self.tiers, self.estimates, self.outlook = tiers, estimates, outlook
        self.limits = limits or PrefetchLimits()
        self.only_below, self.counts_as_use = only_below, counts_as_use
        self.statistics = PrefetchStatistics()
        self._wishes = Wishes()
        self._flights = Flights()
        self._landed: dict[Flight, CopyJob] = {}
        self._arrived: dict[str, None] = {}
        self._registered: dict[str, tuple[Pages, Hashable]] = {}
        self._news = False
        tiers.transfers.listeners.append(self._on_copy)

    def register(self, agent: str, prompt: Sequence[int] | Any, namespace: Hashable = None) -> None:
        """`prompt` is the fixed prompt of `agent`, of which no request has told yet.

        Raises:
            ValueError: see `pages.encode`.
        """
        with self.tiers.lock:
            if agent not in self._registered and len(self._registered) >= MAX_REGISTERED:
                del self._registered[next(iter(self._registered))]
            self._registered[agent] = Pages(encode(prompt, self.tiers.tree.page_size)), namespace
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
            end = self.tiers.tree.ends.get(agent)
            self.statistics.used += end is not None and end.copies[Tier.DEVICE] is not None  # not evicted meanwhile

    def _consider(self, agent: str) -> None:
        now, limits = self.tiers.clock(), self.limits
        if self.outlook.next_steps(agent) > limits.look_ahead_steps and not self.outlook.is_near(agent):
            self._forget(agent)
            return
        seconds = self.outlook.due(agent)
        wait = self.outlook.wait(agent, seconds, limits.look_ahead_s, limits.least_reuse)
        if wait:
            self._forget(agent)
            if wait < min(seconds, math.inf):
                self._wishes.look_at(agent, now + wait)
            return
        end = self.tiers.tree.ends.get(agent)
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
            client = self.outlook.shares.owner(wish.agent)
            verdict = _Verdict.PARKED if client in beyond else self._begin(wish, client)
            if verdict is _Verdict.WAIT:
                return
            if verdict is _Verdict.PARKED:
                beyond.add(client)
                wish.stamp = 0
                self._flights.park(wish, client)

    def _begin(self, wish: Wish, client: str) -> _Verdict:
        """Begins the copies for a wish, or finds why not."""
        if self._is_hopeless(wish.agent):
            self.statistics.no_room += 1
            return _Verdict.WAIT
        lease = self._open(wish.agent)
        missing = [] if lease is None else [node for node in lease.nodes() or () if not _comes(node)]
        if lease is None or not missing:
            self._drop(wish, lease)
            return _Verdict.DROPPED
        nbytes, seconds = sum(node.nbytes for node in missing), self.estimates.load_s(missing)
        verdict = self._may_begin(wish, client, lease, missing, nbytes, seconds)
        if verdict is not _Verdict.BEGUN:
            lease.release()
            if verdict is _Verdict.DROPPED:
                self._drop(wish, None)
            return verdict
        state = lease.load(Urgency.PREFETCH, wish.key, only_below=self.only_below)
        if state is LoadState.LOADING:
            wish.stamp = 0
            self._flights.add(Flight(wish, lease, nbytes, seconds, client))
            self.statistics.begun += 1
            self.statistics.bytes += nbytes
            return _Verdict.BEGUN
        lease.release()
        self.statistics.no_room += state is LoadState.NO_ROOM
        if state in (LoadState.WAITING, LoadState.NO_ROOM):
            return _Verdict.WAIT
        self._drop(wish, None)
        return _Verdict.DROPPED

    def _is_hopeless(self, agent: str) -> bool:
        """Whether there is no room and nothing that ranks below: found without a lease, as it is asked often."""
        end, pool = self.tiers.tree.ends.get(agent), self.tiers.pools[Tier.DEVICE]
        if end is None or not self.only_below or _comes(end) or end.nbytes <= pool.free + pool.leaving:
            return False
        eviction, rank = self.tiers.eviction, self.tiers.residency.candidates[Tier.DEVICE].rank(end)
        first = eviction.first_rank(Tier.DEVICE)
        return first is None or first >= eviction.policy.order.displaced(rank)

    def _may_begin(
        self, wish: Wish, client: str, lease: Lease, missing: list[Node], nbytes: int, seconds: float
    ) -> _Verdict:
        """BEGUN: it may."""
        budget = self.limits.share * self.tiers.pools[Tier.DEVICE].capacity
        statistics, flights = self.statistics, self._flights
        if nbytes > budget:
            statistics.over_budget += 1
            return _Verdict.DROPPED
        begin = missing[0].end - missing[0].covers
        computed = self.estimates.costs.recompute_s(begin, lease.length)
        if self.tiers.clock() + flights.seconds + seconds > max(wish.due, self.tiers.clock()) + computed:
            statistics.too_late += 1
            return _Verdict.DROPPED
        mine = flights.of_client(client) if client else 0
        if mine and mine + nbytes > budget * self.outlook.shares.part(client):
            return _Verdict.PARKED
        full = flights.nbytes + nbytes > budget or flights.seconds + seconds > self.limits.seconds
        return _Verdict.WAIT if full and len(flights) else _Verdict.BEGUN

    def _open(self, agent: str) -> Lease | None:
        lease = self.tiers.open_agent(agent)
        if lease is not None or agent not in self._registered:
            return lease
        prompt, namespace = self._registered[agent]
        with self.tiers.open(prompt, namespace, again=True) as found:
            if found.length == 0:
                return None
            self.tiers.insert(found, Pages(prompt[: found.length * TOKEN_BYTES]), None, agent, found.length)
        return self.tiers.open_agent(agent)

    def _drop(self, wish: Wish, lease: Lease | None) -> None:
        """Nothing is to be done for it until there is news of its agent."""
        wish.stamp = 0
        if self._wishes.holds(wish):
            self._wishes.drop(wish.agent)
        if lease is not None:
            lease.release()

    def _on_copy(self, job: CopyJob) -> None:
        self._news = True  # there may be room
        for number in job.waiters:
            if (flight := self._flights.of_lease(number)) is not None:
                self._landed[flight] = job

    def _land(self, flight: Flight, job: CopyJob) -> None:
        """One of its copies has ended."""
        if self._flights.of_lease(flight.lease.number) is not flight:
            return
        chain = flight.lease.nodes()
        missing = None if chain is None else [node for node in chain if node.copies[Tier.DEVICE] is None]
        wish, statistics = flight.wish, self.statistics
        if missing and job.outcome is Outcome.DONE and all(node.flight is not None for node in missing):
            return
        if missing == []:
            statistics.arrived += 1
            self._arrived[wish.agent] = None
            if len(self._arrived) > MAX_REGISTERED:
                del self._arrived[next(iter(self._arrived))]
            if self.counts_as_use:
                self._touch(flight.lease)
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

    def _touch(self, lease: Lease) -> None:
        """The leased nodes have been used now; their places in the order are taken note of at the release."""
        now = self.tiers.clock()
        for node in lease.node.path():
            node.last_used = now

    def _end(self, flight: Flight) -> None:
        for wish in self._flights.remove(flight):
            if self._wishes.holds(wish) and not wish.stamp and wish.agent not in self._flights:
                self._wishes.enter(wish)
        self._landed.pop(flight, None)
        flight.lease.release()

    # Time -------------------------------------------------------------------------------------------------------

    def next_time(self) -> float | None:
        """When an agent comes into sight without other news."""
        return self._wishes.next_time()

    def leases(self) -> set[int]:
        """The numbers of the leases that it holds."""
        return self._flights.leases()

    def close(self) -> None:
        """Gives up everything that is under way."""
        for flight in self._flights:
            self._end(flight)
        self._wishes.clear()


def _comes(node: Node) -> bool:
    """Whether it is on the device, or on its way there."""
    return node.copies[Tier.DEVICE] is not None or (node.flight is not None and node.flight.target is Tier.DEVICE)
