"""Starts transfers between tiers and, when the backend returns them, attaches the results to the tree."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from .base import Link, LostPayloadError, Tier, Urgency
from .radix_tree import Node
from .tier_storage import TierStorage
from .transfer_queue import Outcome, TransferBackend, TransferJob

logger = logging.getLogger(__name__)


@dataclass
class TierMetrics:
    """Counters of a cache since it was created.

    Attributes:
        tokens_asked, tokens_found: of the prompts opened, and of their cached prefixes.
        inserted, refused: prompts stored, and prompts that there was no memory for.
        bytes_moved, bytes_wasted: for each link, of transfers that were done, and of those that failed or were
            cancelled.
        evicted_copies: copies evicted from a tier; another tier may have the data.
        dropped: of these, the last copies.
        copies_failed, copies_lost, copies_cancelled: transfers that ended so. The source of a lost one is missing or
            damaged; it is counted as failed as well.
    """

    tokens_asked: int = 0
    tokens_found: int = 0
    inserted: int = 0
    refused: int = 0
    bytes_moved: dict[Link, int] = field(default_factory=dict)
    bytes_wasted: dict[Link, int] = field(default_factory=dict)
    evicted_copies: int = 0
    dropped: int = 0
    copies_failed: int = 0
    copies_lost: int = 0
    copies_cancelled: int = 0

    def record_moved(self, link: Link, nbytes: int, done: bool) -> None:
        counts = self.bytes_moved if done else self.bytes_wasted
        counts[link] = counts.get(link, 0) + nbytes


class TransferManager:
    """Transfers in progress, at most one a node; each holds a reference on its node's path, which keeps that in memory.

    It owns the bytes allocated in a transfer's target until the transfer ends: they then pass to the storage with the
    copy, or are freed if it failed. A transfer that is part of an eviction also frees its source when it is done.

    Called under the cache's lock.

    Attributes:
        jobs: transfers in progress by id, in the order of their start.
        demand_bytes: for each link, bytes of the transfers in progress that requests wait for.
        listeners: called with each job that has ended, once the tree has its result.
    """

    def __init__(self, storage: TierStorage, backend: TransferBackend, statistics: TierMetrics) -> None:
        self.storage, self.backend, self.statistics = storage, backend, statistics
        self.jobs: dict[int, TransferJob] = {}
        self.demand_bytes: dict[Link, int] = {}
        self.listeners: list[Callable[[TransferJob], None]] = []
        self._ids = count(1)

    def job_of(self, node: Node) -> TransferJob | None:
        """The transfer of `node` that is in progress."""
        return self.jobs.get(node.transfer_id)

    def start(
        self, node: Node, target: Tier, urgency: Urgency, priority: float = 0.0, frees_source: bool = False
    ) -> TransferJob | None:
        """Starts copying `node` into `target` from the fastest tier that has it; room has been made.

        Returns None if memory cannot be allocated although the pool has room.
        """
        assert not node.in_transfer and node.copies[target] is None, "one transfer of a node at a time"
        source = node.fastest_tier
        assert source is not None, "there is something to copy"
        payload, pool = node.copies[source], self.storage.pools[target]
        assert payload is not None
        nbytes = self.storage.needed_bytes(node, target, payload)
        pool.allocate(nbytes)
        try:
            if pool.persistent:
                builder = pool.new_builder(payload, self.storage.tree.prompt_of(node))
            else:
                builder = pool.new_builder(payload)
        except (OSError, RuntimeError, MemoryError) as error:
            logger.warning("the pool of %s has less memory than its capacity: %s", target.name, error)
            pool.free(nbytes)
            return None
        job = TransferJob(
            next(self._ids), node, source, target, payload, builder, urgency, priority, nbytes, frees_source
        )
        node.transfer_id, node.transfer_link = job.id, job.link
        self.jobs[job.id] = job
        self.storage.acquire(node)
        if frees_source:
            self.storage.pools[source].pending_free += node.allocated[source]
        if urgency is Urgency.DEMAND:
            self._count_demand(job, +1)
        self.backend.submit(job)
        return job

    def promote(self, job: TransferJob, urgency: Urgency, priority: float) -> None:
        self._count_demand(job, (urgency is Urgency.DEMAND) - (job.urgency is Urgency.DEMAND))
        self.backend.promote(job, urgency, priority)

    def _count_demand(self, job: TransferJob, change: int) -> None:
        self.demand_bytes[job.link] = self.demand_bytes.get(job.link, 0) + change * job.payload.nbytes

    def eager_job(self, tier: Tier) -> TransferJob | None:
        """The eager write-back out of `tier`, if its node would be evictable without it."""
        for job in self.jobs.values():
            if job.urgency is Urgency.EAGER and job.source == tier and not job.cancelled:
                node: Node = job.owner
                return job if node.ref_count == 1 and node.cached_children[tier] == 0 else None
        return None

    def convert_to_eviction(self, job: TransferJob) -> None:
        """Makes an eager write-back part of an eviction: its source is freed when it is done."""
        job.frees_source = True
        self.storage.pools[job.source].pending_free += job.owner.allocated[job.source]
        self.statistics.evicted_copies += 1
        self.promote(job, Urgency.WRITE_BACK, 0.0)

    def reclaimable(self, tier: Tier) -> int:
        """Bytes of `tier` that are available or would be if everything unreferenced were evicted."""
        pool, job = self.storage.pools[tier], self.eager_job(tier)
        eager = 0 if job is None else job.owner.allocated[tier]
        return pool.available + pool.pending_free + pool.evictable + eager

    def cancel_prefetches(self, tier: Tier, nbytes: int) -> bool:
        """Cancels prefetches into `tier`, the least urgent first, if that can make `nbytes` available there.

        Returns whether it can; the bytes are available once the transfers have ended.
        """
        jobs = [job for job in self.jobs.values() if job.target == tier and job.urgency is Urgency.PREFETCH]
        missing = nbytes - self.reclaimable(tier)
        if missing > sum(job.allocated for job in jobs):
            return False
        for job in sorted(jobs, key=lambda job: job.priority, reverse=True):
            if missing > 0:
                self.backend.cancel(job)
                missing -= job.allocated
        return True

    def poll(self) -> list[Node]:
        """Completes the transfers that have ended; returns their nodes, some of which may have left the tree."""
        jobs = self.backend.poll()
        for job in jobs:
            self._complete(job)
            for listener in self.listeners:
                listener(job)
        return [job.owner for job in jobs]

    def _complete(self, job: TransferJob) -> None:
        node: Node = job.owner
        storage = self.storage
        del self.jobs[job.id]
        node.transfer_id, node.transfer_link = 0, None
        if job.urgency is Urgency.DEMAND:
            self._count_demand(job, -1)
        if job.frees_source:
            storage.pools[job.source].pending_free -= node.allocated[job.source]
        if job.outcome is Outcome.DONE:
            assert job.result is not None
            storage.attach(node, job.target, job.result, job.allocated)
        else:
            storage.pools[job.target].free(job.allocated)
        self._count(job)
        if isinstance(job.error, LostPayloadError):
            logger.warning("a cached copy is lost: %s", job.error)
            storage.lose(node, job.source)
        elif job.outcome is Outcome.FAILED:
            logger.warning("copying %s from %s to %s failed: %r", node, job.source.name, job.target.name, job.error)
        storage.release(node)
        # An eviction proceeds without the copy below if that failed: its memory was promised, and a cache may forget.
        if job.frees_source and job.outcome is not Outcome.CANCELLED and node.evictable(job.source):
            storage.evict(node, job.source)
        storage.split_if_possible(node)

    def _count(self, job: TransferJob) -> None:
        moved = sum(job.payload.layers[: job.layers_done])
        self.statistics.record_moved(job.link, moved, job.outcome is Outcome.DONE)
        self.statistics.copies_failed += job.outcome is Outcome.FAILED
        self.statistics.copies_lost += isinstance(job.error, LostPayloadError)
        self.statistics.copies_cancelled += job.outcome is Outcome.CANCELLED

    def check(self) -> None:
        """Raises AssertionError unless nodes and jobs agree and the bytes of all pools are accounted for."""
        nodes = list(self.storage.tree)
        moving = {node.transfer_id: node for node in nodes if node.in_transfer}
        assert moving == {job.id: job.owner for job in self.jobs.values()}, "transfers belong to nodes of the tree"
        assert all(node.transfer_link == self.jobs[number].link for number, node in moving.items())
        jobs = self.jobs.values()
        for tier, pool in self.storage.pools.items():
            stored = sum(node.allocated[tier] for node in nodes)
            arriving = sum(job.allocated for job in jobs if job.target == tier)
            assert pool.used == stored + arriving + pool.reserved, "the bytes of a pool are those of its copies"
            assert 0 <= pool.used <= pool.capacity, "a pool stays within its capacity"
            evictable = sum(node.allocated[tier] for node in nodes if not node.ref_count)
            assert pool.evictable == evictable, "evictable bytes are counted"
            pending = sum(job.owner.allocated[tier] for job in jobs if job.frees_source and job.source == tier)
            assert pool.pending_free == pending, "bytes that transfers will free are counted"
        for link, nbytes in self.demand_bytes.items():
            waited_for = [job for job in jobs if job.link == link and job.urgency is Urgency.DEMAND]
            assert nbytes == sum(job.payload.nbytes for job in waited_for), "bytes waited for are counted"
