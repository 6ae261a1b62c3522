"""Saves fixed prompts in the tier below while nothing waits for that: an eviction then need not wait for it.

Makes room in a tier: the victims of its order leave it, into the tier below where the policy saves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from .base import TIERS, Tier, Urgency
from .eviction_policy import AllocStatus, Rank, TierPolicy
from .radix_tree import Node
from .tier_storage import TierStorage
from .transfer import TransferManager
from .transfer_queue import Outcome, TransferJob

MAX_UNSAVED = 4096  # nodes of a tier that are remembered, the oldest first to be forgotten
LOOKS = 64  # of these, from which the next one is chosen


class WriteBackAhead:
    """Whatever a full tier will have to evict next, for a load or a request, it then has at once.

    It begins a copy only where the tier has no room for one more of that size, even without the suffixes in it, on a
    link on which nothing else is copied, and into room that is free below; each node is tried once after it has come.
    If an eviction wants the node meanwhile, the copy becomes a part of that (`TransferManager.adopt`).

    Used under the lock of the tiers.
    """

    def __init__(self, storage: TierStorage, transfers: TransferManager) -> None:
        self.storage, self.transfers = storage, transfers
        self._unsaved: dict[Tier, dict[Node, None]] = {
            tier: {} for tier in storage.pools if _below(tier, storage) is not None
        }
        self._largest = dict.fromkeys(self._unsaved, 0)  # bytes of any node that has come so far
        transfers.listeners.append(self._on_copy)

    def inserted(self, node: Node) -> None:
        """The prompt that ends at `node` has been stored on the device."""
        for each in node.path():
            self._came(each, Tier.DEVICE)

    def _on_copy(self, job: TransferJob) -> None:
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
            lower = _below(tier, self.storage)
            assert lower is not None, "only tiers above another one are looked at"
            idle = all(job.link != (tier, lower) for job in self.transfers.under_way)
            if idle and not self._has_room(tier, self._largest[tier]):
                self._begin(tier, lower)

    def _has_room(self, tier: Tier, nbytes: int) -> bool:
        """Whether `tier` has room for so much, or needs no prompt to go for it."""
        pool = self.storage.pools[tier]
        return self.storage.candidates[tier].has_loose(nbytes - pool.free - pool.leaving)

    def _begin(self, tier: Tier, lower: Tier) -> None:
        node = min(self._evictable(tier), key=self.storage.candidates[tier].rank, default=None)
        if node is None or self._has_room(tier, node.held[tier]):
            return
        below, payload = self.storage.pools[lower], node.copies[tier]
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


def _below(tier: Tier, storage: TierStorage) -> Tier | None:
    """The next tier below that exists."""
    return next((lower for lower in TIERS[tier + 1 :] if lower in storage.pools), None)


def _saved(node: Node, tier: Tier) -> bool:
    """Whether a tier below has a copy."""
    return any(node.copies[lower] is not None for lower in TIERS[tier + 1 :])


class Evictor:
    """Applies a `TierPolicy`."""

    def __init__(self, storage: TierStorage, transfers: TransferManager, policy: TierPolicy) -> None:
        self.storage, self.transfers, self.policy = storage, transfers, policy

    def make_room(self, tier: Tier, nbytes: int, below: Rank | None = None, hurry: bool = False) -> AllocStatus:
        """Evicts from `tier` until `nbytes` are free there, or will be.

        Args:
            below: evict only what ranks below this.
            hurry: a request waits for it; what need not be saved first may be evicted before what does
                (`EvictionPolicy.rather`).
        """
        pool, candidates = self.storage.pools[tier], self.storage.candidates[tier]
        if pool.can_take(nbytes):
            return AllocStatus.READY
        if nbytes > self.transfers.can_leave(tier):
            return AllocStatus.REFUSED
        while pool.free + pool.leaving < nbytes:
            victim = candidates.first()
            if hurry and (other := self._at_once(tier, victim)) is not None:
                self.evict(other, tier)
                continue
            if self._adopts(tier, victim, below):
                continue
            if victim is None or (below is not None and candidates.rank(victim) >= below):
                return AllocStatus.REFUSED
            if self._follows(victim, tier):
                return AllocStatus.PENDING
            if self.evict(victim, tier) is AllocStatus.PENDING:
                return AllocStatus.PENDING
        return AllocStatus.READY if pool.can_take(nbytes) else AllocStatus.PENDING

    def _at_once(self, tier: Tier, victim: Node | None) -> Node | None:
        """Who may rather leave `tier` without a copy, where the one that goes next would have to be saved first."""
        if not self.policy.ahead:
            return None
        candidates, job = self.storage.candidates[tier], self.transfers.ahead(tier)
        if job is not None and (victim is None or candidates.rank(job.node) <= candidates.rank(victim)):
            saved = sum(job.payload.layers[job.done :])
        elif victim is not None and not victim.has_spare and self.policy.saves(victim, tier):
            saved = victim.held[tier]
        else:
            return None
        other = candidates.first_with_another_copy()
        if other is None or not self.policy.order.rather(candidates.rank(other), other.nbytes, saved, tier):
            return None
        return other

    def _adopts(self, tier: Tier, victim: Node | None, below: Rank | None) -> bool:
        """Whether a node that is being saved already goes rather than `victim`; then its copy is an eviction now."""
        if not self.policy.ahead or (job := self.transfers.ahead(tier)) is None:
            return False
        candidates = self.storage.candidates[tier]
        rank = candidates.rank(job.node)
        if (victim is not None and candidates.rank(victim) < rank) or (below is not None and rank >= below):
            return False
        self.transfers.adopt(job)
        return True

    def first_rank(self, tier: Tier) -> Rank | None:
        """The rank of the next victim, be it that it is being saved already."""
        candidates, job = self.storage.candidates[tier], self.transfers.ahead(tier)
        first = candidates.first_rank()
        if job is None:
            return first
        rank = candidates.rank(job.node)
        return rank if first is None else min(first, rank)

    def _follows(self, victim: Node, tier: Tier) -> bool:
        """Whether a node that ranks below `victim` becomes a candidate as soon as what builds on it has been saved."""
        rank = self.storage.candidates[tier].rank
        for job in self.transfers.under_way:
            parent = job.node.parent
            if not job.frees_source or job.source != tier or parent is None or parent.copies[tier] is None:
                continue
            if parent.ref_count == 1 and parent.below[tier] == 1 and rank(parent) < rank(victim):
                return True
        return False

    def evict(self, node: Node, tier: Tier) -> AllocStatus:
        """Has a candidate leave `tier`: at once, or when it has been copied into the tier below.

        Returns:
            PENDING, and nothing is done yet, if the tier below will have room once copies have ended; else READY.
        """
        room, suffixes = self._evict(node, tier), self.policy.suffixes
        if suffixes is not None and room is AllocStatus.READY and tier is Tier.DEVICE and not node.fixed:
            suffixes.left(node)
        return room

    def _evict(self, node: Node, tier: Tier) -> AllocStatus:
        only_copy = not node.has_spare
        if only_copy and self.policy.saves(node, tier):
            room = self._save(node, tier)
            if room is not AllocStatus.REFUSED:
                return room
        elif only_copy and self.policy.suffixes is not None:
            self.policy.suffixes.dropped()
        statistics = self.transfers.statistics
        statistics.evicted_copies += 1
        statistics.dropped += only_copy
        self.storage.lose(node, tier)
        return AllocStatus.READY

    def _save(self, node: Node, tier: Tier) -> AllocStatus:
        """Begins to copy `node` out of `tier` into the next one below that has room for it; READY if that is so."""
        for lower in TIERS[tier + 1 :]:
            if lower not in self.storage.pools:
                continue
            payload = node.copies[tier]
            assert payload is not None
            needed = self.storage.pools[lower].charge(payload)
            room = self.make_room(lower, needed, self.storage.candidates[lower].rank(node))
            if node.copies[tier] is None:
                return AllocStatus.READY  # what went from the tier below took with it what was built on it
            if room is AllocStatus.PENDING:
                return room
            if room is AllocStatus.READY and self.transfers.start(node, lower, Urgency.WRITE_BACK, frees_source=True):
                self.transfers.statistics.evicted_copies += 1
                if self.policy.suffixes is not None and not node.fixed:
                    self.policy.suffixes.saved(node)
                return room
        return AllocStatus.REFUSED
