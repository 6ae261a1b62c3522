"""Makes room in a tier by evicting, with write-back into the tier below, and saves fixed prompts there in advance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

from .base import TIERS, Tier, Urgency
from .eviction_policy import AllocStatus, EagerWriteBackConfig, Rank, TierPolicy
from .radix_tree import Node
from .tier_storage import TierStorage
from .transfer import TransferManager
from .transfer_queue import Outcome, TransferJob


class Evictor:
    """Applies a `TierPolicy`. Called under the cache's lock."""

    def __init__(self, storage: TierStorage, transfers: TransferManager, policy: TierPolicy) -> None:
        self.storage, self.transfers, self.policy = storage, transfers, policy

    def make_room(self, tier: Tier, nbytes: int, rank_bound: Rank | None = None, urgent: bool = False) -> AllocStatus:
        """Evicts from `tier` until `nbytes` are available there, or will be when transfers have ended.

        Args:
            rank_bound: evict only nodes that rank below it.
            urgent: a request waits: nodes that another tier has may be evicted before those that must be written back
                first (`EvictionPolicy.prefers_discard`).
        """
        pool, queue = self.storage.pools[tier], self.storage.queues[tier]
        if pool.can_allocate(nbytes):
            return AllocStatus.READY
        if nbytes > self.transfers.reclaimable(tier):
            return AllocStatus.REFUSED
        while pool.available + pool.pending_free < nbytes:
            if not pool.can_free():
                return AllocStatus.REFUSED  # evicting more would lose copies without making room
            victim = queue.first()
            if urgent and (other := self._discardable(tier, victim)) is not None:
                self.evict(other, tier)
                continue
            if self._convert_eager_job(tier, victim, rank_bound):
                continue
            if victim is None or (rank_bound is not None and queue.rank(victim) >= rank_bound):
                return AllocStatus.REFUSED
            if self._will_outrank(victim, tier):
                return AllocStatus.PENDING
            if self.policy.by_page:
                self._cut(victim, tier, nbytes - pool.available - pool.pending_free)
            if self.evict(victim, tier) is AllocStatus.PENDING:
                return AllocStatus.PENDING
        return AllocStatus.READY if pool.can_allocate(nbytes) else AllocStatus.PENDING

    def _cut(self, victim: Node, tier: Tier, missing_bytes: int) -> None:
        """Splits a victim, if it can be split now, so that only the pages at its end that are needed are evicted."""
        pages = victim.length // self.storage.tree.page_size
        if pages < 2 or victim.covers != victim.length or victim.in_transfer:
            return
        kept = pages - math.ceil(missing_bytes * pages / victim.allocated[tier])
        if kept > 0:
            self.storage.split(victim, kept)

    def _discardable(self, tier: Tier, victim: Node | None) -> Node | None:
        """A replicated node to evict at once, if the next victim would have to be written back first."""
        if self.policy.eager is None:
            return None
        queue, job = self.storage.queues[tier], self.transfers.eager_job(tier)
        if job is not None and (victim is None or queue.rank(job.owner) <= queue.rank(victim)):
            write_back_bytes = job.remaining_bytes
        elif victim is not None and not victim.is_replicated and self.policy.should_write_back(victim, tier):
            write_back_bytes = victim.allocated[tier]
        else:
            return None
        other = queue.first_replicated()
        if other is None or not self.policy.eviction.prefers_discard(
            queue.rank(other), other.nbytes, write_back_bytes, tier
        ):
            return None
        return other

    def _convert_eager_job(self, tier: Tier, victim: Node | None, rank_bound: Rank | None) -> bool:
        """Evicts the node of an eager write-back in progress if it ranks before `victim`; whether it does."""
        if self.policy.eager is None or (job := self.transfers.eager_job(tier)) is None:
            return False
        queue = self.storage.queues[tier]
        rank = queue.rank(job.owner)
        if (victim is not None and queue.rank(victim) < rank) or (rank_bound is not None and rank >= rank_bound):
            return False
        self.transfers.convert_to_eviction(job)
        return True

    def first_rank(self, tier: Tier) -> Rank | None:
        """The rank of the next victim, which may be in an eager write-back."""
        queue, job = self.storage.queues[tier], self.transfers.eager_job(tier)
        first = queue.first_rank()
        if job is None:
            return first
        rank = queue.rank(job.owner)
        return rank if first is None else min(first, rank)

    def _will_outrank(self, victim: Node, tier: Tier) -> bool:
        """Whether a node that ranks before `victim` becomes evictable when a write-back of its child has ended."""
        rank = self.storage.queues[tier].rank
        for job in self.transfers.jobs.values():
            parent = job.owner.parent
            if not job.frees_source or job.source != tier or parent is None or parent.copies[tier] is None:
                continue
            if parent.ref_count == 1 and parent.cached_children[tier] == 1 and rank(parent) < rank(victim):
                return True
        return False

    def evict(self, node: Node, tier: Tier) -> AllocStatus:
        """Evicts an evictable node from `tier`: at once, or when it has been written back into the tier below.

        After PENDING nothing is done yet: the tier below will have room once transfers have ended.
        """
        status, suffix_reuse = self._evict(node, tier), self.policy.suffix_reuse
        if suffix_reuse is not None and status is AllocStatus.READY and tier is Tier.DEVICE and not node.fixed:
            suffix_reuse.record_evicted(node)
        return status

    def _evict(self, node: Node, tier: Tier) -> AllocStatus:
        only_copy = not node.is_replicated
        if only_copy and self.policy.should_write_back(node, tier):
            status = self._write_back(node, tier)
            if status is not AllocStatus.REFUSED:
                return status
        elif only_copy and self.policy.suffix_reuse is not None:
            self.policy.suffix_reuse.record_dropped()
        statistics = self.transfers.statistics
        statistics.evicted_copies += 1
        statistics.dropped += only_copy
        self.storage.evict(node, tier)
        return AllocStatus.READY

    def _write_back(self, node: Node, tier: Tier) -> AllocStatus:
        """Starts copying `node` out of `tier` into the next one below that has room for it; READY if it was started."""
        for lower in TIERS[tier + 1 :]:
            if lower not in self.storage.pools:
                continue
            payload = node.copies[tier]
            assert payload is not None
            needed = self.storage.needed_bytes(node, lower, payload)
            status = self.make_room(lower, needed, self.storage.queues[lower].rank(node))
            if node.copies[tier] is None:
                return AllocStatus.READY  # evicting from the tier below discarded what was built on the victim
            if status is AllocStatus.PENDING:
                return status
            if status is AllocStatus.READY and self.transfers.start(node, lower, Urgency.WRITE_BACK, frees_source=True):
                self.transfers.statistics.evicted_copies += 1
                if self.policy.suffix_reuse is not None and not node.fixed:
                    self.policy.suffix_reuse.record_saved(node)
                return status
        return AllocStatus.REFUSED


class EagerWriteBack:
    """Saves fixed prompts in the tier below while nothing waits for it, so that evicting them later frees at once.

    It starts a transfer only where the tier has no room for one more node of that size, even without the suffixes in
    it, on a link that is idle, and into memory that is available below; each node is tried once after it was stored. If
    an eviction needs the node meanwhile, the transfer becomes part of that (`TransferManager.convert_to_eviction`).

    Independently of room, it copies fixed prompts from the device to a disk that outlives the process
    (`EagerWriteBackConfig.persist`), in place of nodes of lower rank there. One eager transfer leaves a tier at a time.

    Called under the cache's lock.
    """

    def __init__(
        self, storage: TierStorage, transfers: TransferManager, evictor: Evictor, config: EagerWriteBackConfig
    ) -> None:
        self.storage, self.transfers, self.evictor, self.config = storage, transfers, evictor, config
        self._unpersisted: dict[Node, None] = {}
        self._unsaved: dict[Tier, dict[Node, None]] = {
            tier: {} for tier in storage.pools if _below(tier, storage) is not None
        }
        self._largest = dict.fromkeys(self._unsaved, 0)  # bytes of the largest node tracked so far
        transfers.listeners.append(self._on_transfer_end)

    def on_store(self, node: Node) -> None:
        """The prompt that ends at `node` has been stored on the device."""
        for each in node.path():
            self._track(each, Tier.DEVICE)
            if self._persistent and each.fixed and each.copies[Tier.DISK] is None:
                self._unpersisted[each] = None
                if len(self._unpersisted) > self.config.max_tracked:
                    del self._unpersisted[next(iter(self._unpersisted))]

    @property
    def _persistent(self) -> bool:
        """Whether fixed prompts are copied to a disk for the next process; an engine makes its disk persistent."""
        disk = self.storage.pools.get(Tier.DISK)
        return self.config.persist and disk is not None and disk.persistent

    def _on_transfer_end(self, job: TransferJob) -> None:
        if job.outcome is Outcome.DONE and job.target != Tier.DEVICE:
            self._track(job.owner, job.target)

    def _track(self, node: Node, tier: Tier) -> None:
        if tier in self._unsaved and node.fixed and not self._is_saved(node, tier):
            unsaved = self._unsaved[tier]
            unsaved[node] = None
            self._largest[tier] = max(self._largest[tier], node.allocated[tier])
            if len(unsaved) > self.config.max_tracked:
                del unsaved[next(iter(unsaved))]

    def _is_saved(self, node: Node, tier: Tier) -> bool:
        """Whether a tier below has a copy. One on disk for the next process does not replace one in the host's memory.

        Otherwise the copies on disk would keep prompts out of the host's memory, and all would be loaded from disk.
        """
        ignored = Tier.DISK if self._persistent and tier is Tier.DEVICE and Tier.HOST in self.storage.pools else None
        return any(node.copies[lower] is not None for lower in TIERS[tier + 1 :] if lower is not ignored)

    def start_transfers(self) -> None:
        for tier, unsaved in self._unsaved.items():
            if not unsaved:
                continue
            lower = _below(tier, self.storage)
            assert lower is not None, "only tiers above another one are tracked"
            if self._is_idle(tier, lower) and not self._has_room(tier, self._largest[tier]):
                self._start_transfer(tier, lower)
        if self._unpersisted and self._is_idle(Tier.DEVICE, Tier.DISK):
            self._persist()

    def _is_idle(self, tier: Tier, lower: Tier) -> bool:
        """Whether nothing is copied from `tier` to `lower`, nor eagerly to elsewhere."""
        return not any(
            job.source is tier and (job.target is lower or job.urgency is Urgency.EAGER)
            for job in self.transfers.jobs.values()
        )

    def _persist(self) -> None:
        """Starts to copy the oldest tracked node that nothing else moves to disk."""
        for node in list(islice(self._unpersisted, self.config.max_candidates)):
            payload = node.copies[Tier.DEVICE]
            if payload is None or not node.fixed or node.copies[Tier.DISK] is not None:
                del self._unpersisted[node]
                continue
            if node.in_transfer:
                continue
            del self._unpersisted[node]
            needed = self.storage.needed_bytes(node, Tier.DISK, payload)
            bound = self.storage.queues[Tier.DISK].rank(node)
            if self.evictor.make_room(Tier.DISK, needed, bound) is AllocStatus.READY:
                self.transfers.start(node, Tier.DISK, Urgency.EAGER)
                return

    def _has_room(self, tier: Tier, nbytes: int) -> bool:
        """Whether `tier` can provide `nbytes` without evicting a fixed prompt."""
        pool = self.storage.pools[tier]
        return self.storage.queues[tier].has_unowned(nbytes - pool.available - pool.pending_free)

    def _start_transfer(self, tier: Tier, lower: Tier) -> None:
        node = min(self._candidates(tier), key=self.storage.queues[tier].rank, default=None)
        if node is None or self._has_room(tier, node.allocated[tier]):
            return
        below, payload = self.storage.pools[lower], node.copies[tier]
        assert payload is not None, "evictable nodes have a copy"
        if below.can_allocate(self.storage.needed_bytes(node, lower, payload)):
            del self._unsaved[tier][node]
            self.transfers.start(node, lower, Urgency.EAGER)

    def _candidates(self, tier: Tier) -> Iterator[Node]:
        """The evictable ones of the oldest tracked nodes; those that need not be saved any more are dropped."""
        unsaved = self._unsaved[tier]
        for node in list(islice(unsaved, self.config.max_candidates)):
            if not node.fixed or node.copies[tier] is None or self._is_saved(node, tier):
                del unsaved[node]
            elif node.evictable(tier):
                yield node


def _below(tier: Tier, storage: TierStorage) -> Tier | None:
    return next((lower for lower in TIERS[tier + 1 :] if lower in storage.pools), None)
