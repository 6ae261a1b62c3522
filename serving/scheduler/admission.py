"""The requests whose KV is on its way to the device, or has come and waits for a place in the batch.

Which waiting requests get memory, and whether their KV is loaded or computed.

Memory is taken all at once: what a request will compute until its end is reserved before its loads begin, so whoever is
admitted can finish whatever the others do, and nobody holds one part while waiting for another.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from itertools import islice

from ..kvcache.base import Tier, Urgency
from ..kvcache.estimates import Estimates, LoadChoice
from ..kvcache.eviction_policy import AllocStatus
from ..kvcache.radix_tree import Node
from ..kvcache.tiered_cache import CacheHandle, LoadState, TieredCache
from ..kvcache.transfer_queue import Outcome, TransferJob
from ..metrics import SchedulerMetrics
from ..prediction import NextCallPredictor
from .config import SchedulerConfig
from .fair_queue import FairQueue
from .request_state import Entry, State, Timers


class PendingLoads:
    """Found by their leases when copies end, so nobody asks all of them.

    Attributes:
        ready: requests whose loads are done, in that order; they load no more, but keep lease and memory.
        ended: copies, of whatever kind, have ended since this was last set to False.
    """

    def __init__(self) -> None:
        self.ended = False
        self.ready: dict[Entry, None] = {}
        self._entries: dict[Entry, None] = {}
        self._by_lease: dict[int, Entry] = {}
        self._landed: dict[Entry, None] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def add(self, entry: Entry) -> None:
        assert entry.handle is not None, "what is loaded is leased"
        entry.state = State.LOADING
        self._entries[entry] = None
        self._by_lease[entry.handle.id] = entry

    def remove(self, entry: Entry) -> None:
        """It loads nothing any more; its lease is still there."""
        if entry in self._entries:
            assert entry.handle is not None, "what is loaded is leased"
            del self._entries[entry], self._by_lease[entry.handle.id]
            self._landed.pop(entry, None)
        self.ready.pop(entry, None)

    def done(self, entry: Entry) -> None:
        """All that it leases is on the device."""
        self.remove(entry)
        entry.state = State.LOADED
        self.ready[entry] = None

    def take_ready(self, count: int) -> list[Entry]:
        """The first of `ready`, so many at most, out of it."""
        taken = list(islice(self.ready, count))
        for entry in taken:
            del self.ready[entry]
        return taken

    def on_copy(self, job: TransferJob) -> None:
        """A copy has ended; its failure is counted with everybody who waited for it."""
        self.ended = True
        for number in job.waiters:
            entry = self._by_lease.get(number)
            if entry is not None:
                entry.failures += job.outcome is Outcome.FAILED
                self._landed[entry] = None

    def has_landed(self, entry: Entry) -> bool:
        """Whether a copy of it has ended that `take_landed` has not told yet."""
        return entry in self._landed

    def take_landed(self) -> list[Entry]:
        """Those for which a copy has ended since the last call."""
        landed = list(self._landed)
        self._landed.clear()
        return landed

    def check(self) -> None:
        """Raises AssertionError unless entries and leases agree."""
        for entry in self._entries:
            assert entry.state is State.LOADING and entry.handle is not None and entry.handle.live
            assert self._by_lease[entry.handle.id] is entry
        assert len(self._by_lease) == len(self._entries), "only what loads is found by its lease"
        assert self._landed.keys() <= self._entries.keys()
        for entry in self.ready:
            assert entry.state is State.LOADED and entry.handle is not None
            assert len(entry.handle.payloads()) == len(entry.handle.nodes() or ()), "what has come stays on the device"


FAILURES = 2  # of a request's loads, after which its prompt is computed
ANSWER_WEIGHT = 2  # a token of an answer counts as so many of a prompt (Sheng et al. 2024, section 5.1)


class Attempt(Enum):
    ADMITTED = "everything it needs is on the device"
    LOADING = "its loads have begun"
    REFUSED = "there is no room now"
    ASIDE = "it needs a load, and as many as may be are under way"


class Admission:
    """The requests that wait, and those whose KV is on its way or has just come.

    Args:
        outlook: told which requests wait, and of each just before its prompt is looked up for the first time.
    Attributes:
        overdue: requests that have been refused room for longer than patience: they come first, and nobody passes
            them but while it is a load that they wait for.
        changed: something has happened since the last admission that may have made room.
        starved: somebody was refused room in it.
    """

    def __init__(
        self,
        tiers: TieredCache,
        estimates: Estimates,
        limits: SchedulerConfig,
        statistics: SchedulerMetrics,
        timers: Timers,
        predictor: NextCallPredictor,
    ) -> None:
        self.tiers, self.estimates, self.limits = tiers, estimates, limits
        self.statistics, self.timers, self.predictor = statistics, timers, predictor
        self.queue = FairQueue()
        self.overdue: dict[Entry, None] = {}
        self.loading = PendingLoads()
        self.changed = self.starved = False
        tiers.add_transfer_listener(self.loading.on_copy)

    def __len__(self) -> int:
        """Requests that wait to be admitted."""
        return len(self.queue) + len(self.overdue)

    def add(self, entry: Entry) -> None:
        entry.state = State.WAITING
        self.queue.push(entry)
        self._wait(entry, True)
        self.changed = True

    def _wait(self, entry: Entry, yes: bool) -> None:
        """The prompt of what waits must not be the first to go; of what is admitted, the lease keeps it."""
        if entry.waits != yes:
            entry.waits = yes
            (self.predictor.on_wait if yes else self.predictor.on_admit)(entry.agent)

    def remove(self, entry: Entry) -> None:
        """It is over: nothing of it stays here, its lease and its bytes included."""
        self.queue.remove(entry)
        self.overdue.pop(entry, None)
        self._wait(entry, False)
        self.withdraw(entry)

    def withdraw(self, entry: Entry) -> None:
        """Takes memory, loads and lease from a request."""
        self.loading.remove(entry)
        if entry.handle is not None:
            entry.handle.release()
            entry.handle = None
        if entry.reserved:
            self.tiers.unreserve(entry.reserved)
            entry.reserved = 0
        self.changed = True

    def admit(self, slots: int, idle: bool) -> list[Entry]:
        """The requests that can be computed from now on.

        Args:
            slots: how many there may be at most.
            idle: nothing is being computed.
        """
        self._land()
        ready = self.loading.take_ready(slots)
        self._computing = self.limits.running - slots + len(ready)
        idle = idle and not ready
        self.changed = self.changed or self.loading.ended
        self.loading.ended = False
        if not self.changed and not (idle and not self.loading):
            return ready
        self.changed = False
        self.starved = False
        refused: list[Entry] = []
        looked: set[Entry] = set()  # overdue ones that wait for a load to end
        while len(ready) < slots and len(refused) < self.limits.looks:
            entry = self._next(looked)
            if entry is None:
                break
            attempt = self._attempt(entry, idle and not ready and not self.loading)
            if attempt is Attempt.ASIDE:
                self._put_aside(entry, refused, looked)
                continue
            entry.aside = False
            if attempt is Attempt.REFUSED:
                if self._refuse(entry, refused):
                    break
                continue
            self.overdue.pop(entry, None)
            self._wait(entry, False)
            self._charge(entry)
            if attempt is Attempt.ADMITTED:
                ready.append(entry)
        for entry in refused:
            self.queue.push(entry)
        return ready

    def _next(self, looked: set[Entry]) -> Entry | None:
        """The next one to look at. While no load can begin, those aside come last: their KV may have come meanwhile."""
        overdue = next((entry for entry in self.overdue if entry not in looked), None)
        if overdue is not None:
            return overdue
        can_load = len(self.loading) < self.limits.loading
        return self.queue.pop(aside=can_load) or self.queue.pop(aside=True)

    def _put_aside(self, entry: Entry, refused: list[Entry], looked: set[Entry]) -> None:
        """It keeps its place among those that wait for a load to end; each is put there once, so this has no bound."""
        if entry in self.overdue:
            looked.add(entry)
        elif entry.aside:
            refused.append(entry)
        else:
            entry.aside = True
            self.queue.push(entry)

    def _refuse(self, entry: Entry, refused: list[Entry]) -> bool:
        """Notes a refusal; whether nobody else is to be looked at."""
        now = self.tiers.clock()
        self.starved = True
        self.statistics.refusals += 1
        if entry.refused_at is None:
            entry.refused_at = now
        if entry in self.overdue:
            return True
        if now - entry.refused_at > self.limits.room_patience_s:
            self.overdue[entry] = None
            return True
        refused.append(entry)
        return False

    def _charge(self, entry: Entry) -> None:
        request, handle = entry.request, entry.handle
        assert handle is not None
        answer = min(request.expected_tokens or request.max_new_tokens, request.max_new_tokens)
        self.queue.charge(entry, entry.size - handle.length + ANSWER_WEIGHT * answer - entry.charged)

    def settle(self, entry: Entry) -> None:
        """Corrects the charge of a request that is over by what was really computed."""
        self.queue.charge(entry, entry.computed + ANSWER_WEIGHT * entry.produced - entry.charged)

    def _attempt(self, entry: Entry, alone: bool) -> Attempt:
        """Looks a prompt up and, if there is room for all it needs, admits it or begins its loads."""
        tiers = self.tiers
        if not entry.opened:
            self.predictor.on_lookup()
        handle = entry.handle = tiers.open(entry.lookup, entry.request.namespace, retry=entry.opened)
        entry.opened = True
        found, choice, missing = self._choose(entry, handle)
        if missing and len(self.loading) >= self.limits.loading:
            self._let_go(entry)
            return Attempt.ASIDE
        beside = tiers.bytes_to_load(missing)
        room = tiers.reserve(entry.needed, beside)
        wanted = entry.needed + beside
        cancelled = room is AllocStatus.REFUSED and tiers.cancel_prefetches(wanted)
        if room is AllocStatus.REFUSED and not cancelled and alone and handle.length:
            handle.truncate(handle.node.root)  # what is cached of it is itself in the way
            missing = []
            room = tiers.reserve(entry.needed)
        if room is not AllocStatus.READY:
            self._let_go(entry)
            return Attempt.REFUSED
        entry.reserved = entry.needed
        self.statistics.events += 1
        return self._begin(entry, handle, missing, found, choice)

    def _let_go(self, entry: Entry) -> None:
        """As `withdraw`, of a request that was refused: no room has come of it."""
        changed = self.changed
        self.withdraw(entry)
        self.changed = changed

    def _choose(self, entry: Entry, handle: CacheHandle) -> tuple[int, LoadChoice, list[Node]]:
        """Shortens the lease to what is used.

        Returns:
            Tokens that were found, the choice, and the nodes that have to be loaded.
        """
        chain = handle.nodes()
        assert chain is not None, "what was just opened is whole"
        choice = self.estimates.choose(chain, entry.size, entry.compute, self._computing + len(self))
        found = handle.length
        if choice.nodes < len(chain):
            handle.truncate(chain[choice.nodes - 1] if choice.nodes else handle.node.root)
        return found, choice, [node for node in chain[: choice.nodes] if node.copies[Tier.DEVICE] is None]

    def _begin(self, entry: Entry, handle: CacheHandle, missing: list[Node], found: int, choice: LoadChoice) -> Attempt:
        """The memory is there; loads what is missing."""
        now = self.tiers.clock()
        if missing:
            state = handle.load(Urgency.DEMAND, entry.times.arrived)
            if state is not LoadState.LOADING:
                entry.failures += 1
                entry.compute = entry.failures >= FAILURES
                self.withdraw(entry)
                return Attempt.REFUSED
            entry.load_began = now
            entry.give_up_at = now + self.limits.load_patience * max(choice.load_s, choice.alternative_s)
            self.timers.set(entry.give_up_at, entry)
            self.loading.add(entry)
        self._count(entry, handle, missing, found)
        return Attempt.LOADING if missing else Attempt.ADMITTED

    def _count(self, entry: Entry, handle: CacheHandle, missing: list[Node], found: int) -> None:
        statistics = self.statistics
        entry.cached = handle.length
        entry.loaded = sum(node.covers for node in missing)
        entry.recomputed = found - handle.length
        if entry.recomputed:
            statistics.recomputed_refused += entry.compute
            statistics.recomputed_late += not entry.compute

    def _land(self) -> None:
        """Sorts those with an ended copy: all is there, or more is to come, or they wait for another try."""
        for entry in self.loading.take_landed():
            assert entry.handle is not None and entry.state is State.LOADING, "what loads has a lease"
            failed = entry.failures >= FAILURES
            state = LoadState.NO_ROOM if failed else entry.handle.load(Urgency.DEMAND, entry.times.arrived)
            if state is LoadState.READY:
                self._stall(entry)
                self.loading.done(entry)
            elif state is not LoadState.LOADING:
                self._try_again(entry, compute=failed)
            elif self.tiers.clock() >= entry.give_up_at:  # its timer has passed: `give_up` left it to this
                self._try_again(entry, compute=True)

    def _stall(self, entry: Entry) -> None:
        waited = max(0.0, self.tiers.clock() - entry.load_began)
        entry.stalled_s += waited
        self.statistics.stalled_s += waited
        self.statistics.events += 1

    def give_up(self, entry: Entry) -> None:
        """Its loads have taken too long; if one has just ended, `_land` sees whether it was the last."""
        if not self.loading.has_landed(entry):
            self._try_again(entry, compute=True)

    def _try_again(self, entry: Entry, compute: bool) -> None:
        """Gives up the loads of a request; it waits anew, in its old place, and is computed next time if need be."""
        self._stall(entry)
        self.withdraw(entry)
        entry.compute = entry.compute or compute
        self.add(entry)

    def check(self) -> None:
        """Raises AssertionError unless states, leases and queues agree."""
        self.queue.check()
        self.loading.check()
        for entry in (*self.queue, *self.overdue):
            assert entry.state is State.WAITING and entry.waits, "who waits is known to"
            assert entry.handle is None and not entry.reserved, "who waits holds nothing"
