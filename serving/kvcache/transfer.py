"""Starts copies between tiers and, when the mover hands them back, writes the result into the tree."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..metrics import TierMetrics
from .base import Link, LostPayloadError, Tier, Urgency
from .radix_tree import Node, fastest
from .tier_storage import TierStorage
from .transfer_queue import Outcome, TransferBackend, TransferJob

logger = logging.getLogger(__name__)


class TransferManager:
    """At most one copy of a node is under way. It locks the node's path, so nothing it builds on can go meanwhile.

    Args:
        residency: where results go.
        mover: moves the bytes.
        statistics: counts what has been moved.
    Attributes:
        under_way: in the order of their beginnings.
        demanded: by link, bytes of the copies that are under way because a request waits for them.
        listeners: called with every copy that has ended, once the tree has its result.
    """

    def __init__(self, storage: TierStorage, mover: TransferBackend, statistics: TierMetrics) -> None:
        self.storage, self.mover, self.statistics = storage, mover, statistics
        self.under_way: dict[TransferJob, None] = {}
        self.demanded: dict[Link, int] = {}
        self.listeners: list[Callable[[TransferJob], None]] = []

    def start(
        self,
        node: Node,
        target: Tier,
        urgency: Urgency,
        priority: float = 0.0,
        frees_source: bool = False,
    ) -> bool:
        """Begins to copy `node` into `target`, from the fastest tier that has it; the room has been made.

        Returns:
            False if memory cannot be had though the pool has room for it.
        """
        assert node.flight is None and node.copies[target] is None, "one copy of a node at a time"
        source = fastest(node)
        assert source is not None, "there is something to copy"
        payload, pool = node.copies[source], self.storage.pools[target]
        assert payload is not None
        held = pool.charge(payload)
        pool.take(held)
        try:
            builder = pool.begin(payload)
        except (OSError, RuntimeError, MemoryError) as error:
            logger.warning("the pool of %s has less memory than its capacity: %s", target.name, error)
            pool.give(held)
            return False
        job = TransferJob(node, source, target, payload, builder, urgency, priority, held, frees_source)
        node.flight = job
        self.under_way[job] = None
        self.storage.lock(node)
        if frees_source:
            self.storage.pools[source].leaving += node.held[source]
        if urgency is Urgency.DEMAND:
            self._count_demand(job, +1)
        self.mover.submit(job)
        return True

    def promote(self, job: TransferJob, urgency: Urgency, priority: float) -> None:
        """Makes a copy under way that urgent."""
        self._count_demand(job, (urgency is Urgency.DEMAND) - (job.urgency is Urgency.DEMAND))
        self.mover.promote(job, urgency, priority)

    def _count_demand(self, job: TransferJob, change: int) -> None:
        self.demanded[job.link] = self.demanded.get(job.link, 0) + change * job.payload.nbytes

    def ahead(self, tier: Tier) -> TransferJob | None:
        """The copy out of `tier` that was begun ahead of an eviction, if that could be one of its node now."""
        for job in self.under_way:
            if job.urgency is Urgency.AHEAD and job.source == tier and not job.cancelled:
                node = job.node
                return job if node.ref_count == 1 and node.below[tier] == 0 else None
        return None

    def adopt(self, job: TransferJob) -> None:
        """Makes a copy that was begun ahead of an eviction part of one."""
        job.frees_source = True
        self.storage.pools[job.source].leaving += job.node.held[job.source]
        self.statistics.evicted_copies += 1
        self.promote(job, Urgency.WRITE_BACK, 0.0)

    def can_leave(self, tier: Tier) -> int:
        """Bytes that could be free in `tier` if everything without a user left it."""
        pool, ahead = self.storage.pools[tier], self.ahead(tier)
        return pool.free + pool.leaving + pool.idle + (0 if ahead is None else ahead.node.held[tier])

    def cancel_prefetches(self, tier: Tier, nbytes: int) -> bool:
        """Cancels prefetches into `tier`, the least urgent first, if that can make `nbytes` free there.

        Returns:
            Whether it can; the bytes are free once the copies have ended.
        """
        jobs = [job for job in self.under_way if job.target == tier and job.urgency is Urgency.PREFETCH]
        missing = nbytes - self.can_leave(tier)
        if missing > sum(job.held for job in jobs):
            return False
        for job in sorted(jobs, key=lambda job: job.priority, reverse=True):
            if missing > 0:
                self.mover.cancel(job)
                missing -= job.held
        return True

    def poll(self) -> list[Node]:
        """Takes in what has ended.

        Returns:
            The nodes concerned; one that nothing needs any more may have left the tree.
        """
        jobs = self.mover.poll()
        for job in jobs:
            self._take_in(job)
            for listener in self.listeners:
                listener(job)
        return [job.node for job in jobs]

    def _take_in(self, job: TransferJob) -> None:
        node, storage = job.node, self.storage
        del self.under_way[job]
        node.flight = None
        if job.urgency is Urgency.DEMAND:
            self._count_demand(job, -1)
        if job.frees_source:
            storage.pools[job.source].leaving -= node.held[job.source]
        if job.outcome is Outcome.DONE:
            assert job.result is not None
            storage.put(node, job.target, job.result, job.held)
        else:
            storage.pools[job.target].give(job.held)
        self._count(job)
        if isinstance(job.error, LostPayloadError):
            logger.warning("a cached copy is lost: %s", job.error)
            storage.drop(node, job.source)
        elif job.outcome is Outcome.FAILED:
            logger.warning("copying %s from %s to %s failed: %r", node, job.source.name, job.target.name, job.error)
        storage.unlock(node)
        # An eviction that could not save the copy below goes on without: room was promised, and a cache may forget.
        if job.frees_source and job.outcome is not Outcome.CANCELLED and node.evictable(job.source):
            storage.lose(node, job.source)
        storage.settle(node)

    def _count(self, job: TransferJob) -> None:
        moved = sum(job.payload.layers[: job.done])
        self.statistics.moved(job.link, moved, job.outcome is Outcome.DONE)
        self.statistics.copies_failed += job.outcome is Outcome.FAILED
        self.statistics.copies_lost += isinstance(job.error, LostPayloadError)
        self.statistics.copies_cancelled += job.outcome is Outcome.CANCELLED

    def check(self) -> None:
        """Raises AssertionError unless flights are known and the bytes they take and will free are counted."""
        nodes = list(self.storage.tree)
        flights = {node.flight for node in nodes if node.flight is not None}
        assert flights == set(self.under_way), "every copy under way belongs to a node of the tree"
        for tier, pool in self.storage.pools.items():
            stored = sum(node.held[tier] for node in nodes)
            arriving = sum(job.held for job in flights if job.target == tier)
            assert pool.used == stored + arriving + pool.reserved, "the bytes of a pool are those of its copies"
            assert 0 <= pool.used <= pool.capacity, "a pool stays within its capacity"
            idle = sum(node.held[tier] for node in nodes if not node.ref_count)
            assert pool.idle == idle, "idle bytes are counted"
            leaving = sum(job.node.held[tier] for job in flights if job.frees_source and job.source == tier)
            assert pool.leaving == leaving, "leaving bytes are counted"
        for link, nbytes in self.demanded.items():
            waited_for = [job for job in flights if job.link == link and job.urgency is Urgency.DEMAND]
            assert nbytes == sum(job.payload.nbytes for job in waited_for), "bytes waited for are counted"
