"""The requests whose KV is on its way to the device, or has come and waits for a place in the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from ..copies import CopyJob, Outcome
from ..node import Node, Tier
from ..pools import Pool
from ..transfers import fastest
from .entry import Entry, State


class Loads:
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
        assert entry.lease is not None, "what is loaded is leased"
        entry.state = State.LOADING
        self._entries[entry] = None
        self._by_lease[entry.lease.number] = entry

    def remove(self, entry: Entry) -> None:
        """It loads nothing any more; its lease is still there."""
        if entry in self._entries:
            assert entry.lease is not None, "what is loaded is leased"
            del self._entries[entry], self._by_lease[entry.lease.number]
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

    def on_copy(self, job: CopyJob) -> None:
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
            assert entry.state is State.LOADING and entry.lease is not None and entry.lease.live
            assert self._by_lease[entry.lease.number] is entry
        assert len(self._by_lease) == len(self._entries), "only what loads is found by its lease"
        assert self._landed.keys() <= self._entries.keys()
        for entry in self.ready:
            assert entry.state is State.LOADED and entry.lease is not None
            assert len(entry.lease.payloads()) == len(entry.lease.nodes() or ()), "what has come stays on the device"


def bytes_of_loads(missing: Sequence[Node], pool: Pool) -> int:
    """That the device's pool must have for copies that are not under way yet."""
    total = 0
    for node in missing:
        if node.flight is None or node.flight.target is not Tier.DEVICE:
            source = fastest(node)
            payload = None if source is None else node.copies[source]
            assert payload is not None, "a chain has data"
            total += pool.charge(payload)
    return total
