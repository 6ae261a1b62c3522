"""All requests that are not over, and how they come to an end."""

from __future__ import annotations

from collections import deque

from ..node import Tier
from ..outlook import Outlook
from .admission import Admission
from .batch import Batch
from .entry import Entry, State
from .request import Ended, RequestOutcome
from .timers import Timers


class Registry:
    """Every request is in it from its arrival to its end, and in one place of admission or batch meanwhile.

    Attributes:
        entries: by the requests' ids. over: the ends that nobody has been told yet.
    """

    def __init__(self, admission: Admission, batch: Batch, outlook: Outlook, timers: Timers) -> None:
        self.admission, self.batch, self.outlook, self.timers = admission, batch, outlook, timers
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

    def end(self, entry: Entry, outcome: RequestOutcome, error: str | None) -> None:
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
            self.outlook.answered(entry.request, now - entry.times.arrived, outcome is RequestOutcome.ANSWERED)
        self.over.append(entry.ended(outcome, error))

    def _count(self, entry: Entry, outcome: RequestOutcome) -> None:
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
                self.end(entry, RequestOutcome.TIMED_OUT, told)
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
        assert admission.tiers.pools[Tier.DEVICE].reserved == reserved, "reserved bytes belong to requests"
        leases = {entry.lease.number for entry in entries if entry.lease is not None}
        assert leases <= admission.tiers.leases.keys(), "leases of requests are live"
        assert len(batch) <= admission.limits.running, "no more are computed than may be"
        for entry in batch.prefilling:
            assert entry.state is State.PREFILL and entry.lease is not None
        for entry in batch.decoding:
            assert entry.state is State.DECODE and entry.lease is not None
