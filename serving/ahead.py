"""Saves fixed prompts in the tier below while nothing waits for that: an eviction then need not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from .copies import CopyJob, Outcome, Urgency
from .node import TIERS, Node, Tier
from .residency import Residency
from .transfers import Transfers

MAX_UNSAVED = 4096  # nodes of a tier that are remembered, the oldest first to be forgotten
LOOKS = 64  # of these, from which the next one is chosen


class SaveAhead:
    """Whatever a full tier will have to evict next, for a load or a request, it then has at once.

    It begins a copy only where the tier has no room for one more of that size, even without the suffixes in it, on a
    link on which nothing else is copied, and into room that is free below; each node is tried once after it has come.
    If an eviction wants the node meanwhile, the copy becomes a part of that (`Transfers.adopt`).

    Used under the lock of the tiers.
    """

    def __init__(self, residency: Residency, transfers: Transfers) -> None:
        self.residency, self.transfers = residency, transfers
        self._unsaved: dict[Tier, dict[Node, None]] = {
            tier: {} for tier in residency.pools if _below(tier, residency) is not None
        }
        self._largest = dict.fromkeys(self._unsaved, 0)  # bytes of any node that has come so far
        transfers.listeners.append(self._on_copy)

    def inserted(self, node: Node) -> None:
        """The prompt that ends at `node` has been stored on the device."""
        for each in node.path():
            self._came(each, Tier.DEVICE)

    def _on_copy(self, job: CopyJob) -> None:
        if job.outcome is Outcome.DONE and job.target != Tier.DEVICE:
            self._came(job.node, job.target)

    def _came(self, node: Node, tier: Tier) -> None:
        if tier in self._unsaved and node.fixed and not _saved(node, tier):
            unsaved = self._unsaved[tier]
            unsaved[node] = None
            self._largest[tier] = max(self._largest[tier], node.held[tier])
            if len(unsaved) > MAX_UNSAVED:
                del unsaved[next(iter(unsaved))]

    def begin(self) -> None:
        """Begins the copies that may be begun now."""
        for tier, unsaved in self._unsaved.items():
            if not unsaved:
                continue
            lower = _below(tier, self.residency)
            assert lower is not None, "only tiers above another one are looked at"
            idle = all(job.link != (tier, lower) for job in self.transfers.under_way)
            if idle and not self._has_room(tier, self._largest[tier]):
                self._begin(tier, lower)

    def _has_room(self, tier: Tier, nbytes: int) -> bool:
        """Whether `tier` has room for so much, or needs no prompt to go for it."""
        pool = self.residency.pools[tier]
        return self.residency.candidates[tier].has_loose(nbytes - pool.free - pool.leaving)

    def _begin(self, tier: Tier, lower: Tier) -> None:
        node = min(self._evictable(tier), key=self.residency.candidates[tier].rank, default=None)
        if node is None or self._has_room(tier, node.held[tier]):
            return
        below, payload = self.residency.pools[lower], node.copies[tier]
        assert payload is not None, "who may be evicted has a copy"
        if below.can_take(below.charge(payload)):
            del self._unsaved[tier][node]
            self.transfers.start(node, lower, Urgency.AHEAD)

    def _evictable(self, tier: Tier) -> Iterator[Node]:
        """Some of the nodes that have to be saved and may be; those that need not be any more are forgotten."""
        unsaved = self._unsaved[tier]
        for node in list(islice(unsaved, LOOKS)):
            if not node.fixed or node.copies[tier] is None or _saved(node, tier):
                del unsaved[node]
            elif node.evictable(tier):
                yield node


def _below(tier: Tier, residency: Residency) -> Tier | None:
    """The next tier below that exists."""
    return next((lower for lower in TIERS[tier + 1 :] if lower in residency.pools), None)


def _saved(node: Node, tier: Tier) -> bool:
    """Whether a tier below has a copy."""
    return any(node.copies[lower] is not None for lower in TIERS[tier + 1 :])
