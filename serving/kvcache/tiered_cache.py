"""The prefix cache in tiers: `TieredCache`, and the handles that keep prompts in it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from .agent_index import Agent, AgentIndex
from .base import KVPayload, LoadState, Tier, Urgency
from .disk_pool import DiskPool
from .eviction_history import EvictionHistory, EvictionHistoryConfig
from .eviction_policy import AllocStatus, TierPolicy
from .evictor import EagerWriteBack, Evictor
from .memory_pool import MemoryPool, Pool
from .radix_tree import TOKEN_BYTES, Match, Node, PrefixTree, encode
from .tier_storage import TierStorage
from .transfer import TierMetrics, TransferManager
from .transfer_queue import TransferBackend, TransferJob


class TieredCache:
    """KV of prompts in a device pool and, optionally, a host pool and on disk.

    A handle from `open` holds references on a prompt's cached prefix; what has none may be evicted. Methods may be
    called from any thread: all state is guarded by `lock`, which is reentrant, so a caller may hold it over several
    calls. Ended transfers take effect in `poll`, which the methods that depend on it call first.

    Args:
        pools: by tier; DEVICE is required. The cache owns and closes them.
        backend: moves bytes between them, in real or in virtual time. The cache owns and closes it.
        policy: what is evicted first, and what is written back.
        page_size: tokens a page. clock: seconds; the one of `backend` if that is virtual.
        history: bounds of the record of what has left the cache.
    Attributes:
        handles: the live ones by id.
        history: why tokens that were cached are not any more.

    Raises:
        ValueError: no pool for the device, or a page size below 1.
    """

    def __init__(
        self, pools: Mapping[Tier, Pool], backend: TransferBackend, policy: TierPolicy, page_size: int = 16,
        clock: Callable[[], float] = time.monotonic, history: EvictionHistoryConfig | None = None,
    ) -> None:  # fmt: skip
        if Tier.DEVICE not in pools:
            raise ValueError(f"got pools for {sorted(pools)}; a pool for Tier.DEVICE is needed")
        self.lock, self.clock, self.policy = threading.RLock(), clock, policy
        self.statistics = TierMetrics()
        self.tree = PrefixTree(page_size, AgentIndex(policy.eviction.value))
        self.history = EvictionHistory(self.tree.page_bytes, history or EvictionHistoryConfig())
        self.storage = TierStorage(self.tree, pools, policy.eviction, clock, self.history)
        self.transfers = TransferManager(self.storage, backend, self.statistics)
        self.evictor = Evictor(self.storage, self.transfers, policy)
        self._eager = None if policy.eager is None else EagerWriteBack(
            self.storage, self.transfers, self.evictor, policy.eager
        )  # fmt: skip
        self.handles: dict[int, CacheHandle] = {}
        self._ids = count(1)
        self.restore_disk()

    @property
    def pools(self) -> dict[Tier, Pool]:
        return self.storage.pools

    @property
    def page_size(self) -> int:
        return self.tree.page_size

    def capacity(self, tier: Tier = Tier.DEVICE) -> int:
        """Bytes of the pool of `tier`."""
        return self.pools[tier].capacity

    def whole_pages(self, tokens: int) -> int:
        """The largest number of tokens up to `tokens` that fills pages."""
        return tokens - tokens % self.page_size

    # Prompts ----------------------------------------------------------------------------------------------------

    def lookup(self, token_ids: Sequence[int] | Any, namespace: Hashable = None) -> Match:
        """The longest cached prefix of a prompt, in whatever tiers. Does not count as a use.

        Raises:
            ValueError: see `encode`.
        """
        key = encode(token_ids, self.tree.page_size)
        with self.lock:
            self.poll()
            return self.tree.find(key, namespace)

    def open(self, token_ids: Sequence[int] | Any, namespace: Hashable = None, retry: bool = False) -> CacheHandle:
        """A handle on the longest cached prefix of a prompt, which is not evicted until the handle is released.

        The prefix may be empty, and may have to be loaded (`CacheHandle.load`).

        Args:
            retry: the prompt was opened before and refused memory: it is not counted in the statistics again.

        Raises:
            ValueError: see `encode`.
        """
        key = encode(token_ids, self.tree.page_size)
        with self.lock:
            self.poll()
            found = self.tree.find(key, namespace)
            node = found.nodes[-1] if found.nodes else self.tree.root(namespace)
            if found.part:
                node = self.storage.split(node, found.part)
                if node.chain() is None:  # there was no room for the halves
                    node = found.nodes[-2] if len(found.nodes) > 1 else self.tree.root(namespace)
            if not retry:
                self.statistics.tokens_asked += len(key) // TOKEN_BYTES
                self.statistics.tokens_found += node.end
            return self._new_handle(node)

    def open_agent(self, agent: Agent) -> CacheHandle | None:
        """A handle on the fixed prompt of `agent`; None if it is not cached as a whole. Does not count as a use."""
        with self.lock:
            self.poll()
            node = self.lookup_agent(agent)
            return None if node is None or node.chain() is None else self._new_handle(node, used=False)

    def _new_handle(self, node: Node, used: bool = True) -> CacheHandle:
        now = self.clock()
        for each in node.path() if used else ():
            each.last_used = now
            each.hits += 1
        self.storage.acquire(node)
        handle = CacheHandle(self, next(self._ids), node)
        self.handles[handle.id] = handle
        return handle

    def store(
        self, handle: CacheHandle, token_ids: Sequence[int] | Any, payload: KVPayload | None,
        agent: Agent | None = None, fixed_tokens: int = 0, reserved: int = 0,
    ) -> AllocStatus:  # fmt: skip
        """Stores the KV of a prompt beyond its first `handle.length` tokens; the handle then covers all of it.

        The leaf that the handle ends at is extended if nobody else needs its end and the payloads join freely;
        otherwise it gets a child. KV that is cached already is not stored again.

        Args:
            handle: from `open` with the same prompt.
            token_ids: the prompt.
            payload: KV of its tokens from `handle.length` to its last whole page, in the memory of the device tier. The
                cache owns it if it is stored. None if there are no such tokens.
            agent, fixed_tokens: the first `fixed_tokens` (rounded down to pages) are the fixed prompt of `agent`; 0:
                nobody's.
            reserved: of the bytes that the caller has reserved, those that `payload` takes. If it is stored they are
                unreserved, except the bytes of what was cached already: that part of `payload` stays the caller's.

        Returns:
            READY: it is stored, and on the device. Otherwise it is not, or only a beginning of it, which the handle
            covers then; after PENDING there will be room when transfers have ended.

        Raises:
            ValueError: the payload is not of that length, of a type that a pool cannot hold, or elsewhere than the
                memory of the device tier; the prompt does not begin with what the handle covers. Nothing is changed
                then.
        """
        key = encode(token_ids, self.tree.page_size)
        end, new = len(key) // TOKEN_BYTES, len(key) // TOKEN_BYTES - handle.length
        if (0 if payload is None else payload.tokens) != max(0, new):
            given = "no payload" if payload is None else f"a payload of {payload.tokens} tokens"
            raise ValueError(f"got {given}; accepted: one of the {max(0, new)} tokens in [{handle.length}, {end})")
        if payload is not None:
            for pool in self.pools.values():
                pool.validate(payload)
            self._check_device(payload)
        with self.lock:
            self.poll()
            if not self.tree.spells(key, handle.node):
                raise ValueError("the prompt does not begin with what the handle covers")
            status = AllocStatus.READY if payload is None else self._store(handle, key, payload, reserved)
            if status is AllocStatus.READY and agent is not None and fixed_tokens and not handle.node.root.retired:
                fixed = key[: self.whole_pages(fixed_tokens) * TOKEN_BYTES]
                self._set_agent_prompt(agent, self.storage.get_or_create(fixed, handle.node.root))
            self.statistics.inserted += payload is not None and status is AllocStatus.READY
            self.statistics.refused += status is AllocStatus.REFUSED
            if self._eager is not None and status is AllocStatus.READY:
                self._eager.on_store(handle.node)
            return status

    def _check_device(self, payload: KVPayload) -> None:
        pool = self.pools[Tier.DEVICE]
        if isinstance(pool, MemoryPool) and payload.device is not None and not pool.holds(payload.device):
            raise ValueError(f"got a payload on {payload.device}; accepted: {pool.device}, as the device tier's pool")

    def _store(self, handle: CacheHandle, key: bytes, payload: KVPayload, reserved: int) -> AllocStatus:
        pool = self.pools[Tier.DEVICE]
        needed, kept = pool.charge(payload), reserved
        pool.unreserve(reserved)
        try:
            status = self.evictor.make_room(Tier.DEVICE, needed, urgent=True)
            if status is AllocStatus.READY:
                used = pool.used
                handle.node = self.storage.insert(handle.node, key, payload)
                if handle.length < len(key) // TOKEN_BYTES:
                    status = AllocStatus.REFUSED
                taken = max(0, pool.used - used)
                kept = (min(reserved, needed) if status is AllocStatus.READY else reserved) - taken
        finally:
            pool.reserve(max(0, min(kept, pool.available)))
        if status is AllocStatus.READY:
            handle.node.last_used = self.clock()
            self.storage.merge_path(handle.node)
        return status

    def merge_spans(self) -> int:
        """Merges unreferenced nodes that no branch separates any more. Copies data, so it is for idle times.

        Returns:
            The number of nodes that were merged into others.
        """
        with self.lock:
            self.poll()
            # The tree iterates over parents first; from the last node up, a chain of any length becomes one node.
            return sum(self.storage.merge(node) for node in reversed(list(self.tree)))

    def restore_disk(self) -> int:
        """Adds the prompts that an earlier process has left on disk to the tree; called when the cache is created.

        To be called again after a `DiskPool` was bound to a fingerprint. Those used last are kept, as far as the pool
        has room; the others are removed. A prompt whose beginning is not on disk is kept as well: it is found again
        when the beginning has been computed.

        Returns:
            The number of tokens on disk now, of whichever call.
        """
        pool = self.pools.get(Tier.DISK)
        if not isinstance(pool, DiskPool):
            return 0
        with self.lock:
            for prompt, payload, last_use in pool.restored():
                last_used = self.clock() - max(0.0, time.time() - last_use)
                node = self.storage.restore(pool, prompt, payload, last_used)
                whole = node is not None and node.end * TOKEN_BYTES == len(prompt.key)
                for agent in prompt.agents if whole else ():
                    if agent not in self.tree.prompt_ends:
                        self._set_agent_prompt(agent, node)
            return sum(node.covers for node in self.tree if node.copies[Tier.DISK] is not None)

    def flush(self, fingerprint: str | None = None) -> None:
        """Nothing stored so far is ever found again, in no tier: what makes the KV has changed.

        Handles keep what they cover, and requests in progress can use it and store what follows, which is not found
        either; it is discarded as soon as nothing references it. Loads that handles wait for continue, other transfers
        are cancelled. Handles opened from now on cover only what is stored through them or other new ones.

        Args:
            fingerprint: of what makes the KV from now on, see `DiskPool`; None: what is stored on disk from now on is
                not found after a restart. If it is the one from before, a process that starts after this one was killed
                may find what handles still cover.

        Raises:
            ValueError: an empty fingerprint.
        """
        with self.lock:
            self.poll()
            disk = self.pools.get(Tier.DISK)
            if isinstance(disk, DiskPool):
                disk.rebind(fingerprint)
            for job in list(self.transfers.jobs.values()):
                if not job.waiters:
                    self.transfers.backend.cancel(job)
            self.storage.retire()

    # Device memory ----------------------------------------------------------------------------------------------

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the device that are reserved for requests."""
        return self.pools[Tier.DEVICE].reserved

    def reserve(self, nbytes: int, extra: int = 0, headroom: int = 0) -> AllocStatus:
        """Reserves `nbytes` of the device for a request's KV, evicting if necessary; the caller owns them until
        `unreserve`.

        Args:
            extra: bytes that must be available as well, e.g. for what the request will load.
            headroom: bytes beyond these that could be made available later; nothing is evicted for them yet.

        Returns:
            READY: they are reserved. Otherwise nothing is; after PENDING there will be room when transfers have ended.
        """
        with self.lock:
            self.poll()
            if headroom and nbytes + extra + headroom > self.transfers.reclaimable(Tier.DEVICE):
                return AllocStatus.REFUSED
            status = self.evictor.make_room(Tier.DEVICE, nbytes + extra, urgent=True)
            if status is AllocStatus.READY:
                self.pools[Tier.DEVICE].reserve(nbytes)
            return status

    def unreserve(self, nbytes: int) -> None:
        """Frees reserved bytes."""
        with self.lock:
            self.pools[Tier.DEVICE].unreserve(nbytes)

    def bytes_to_load(self, nodes: Iterable[Node]) -> int:
        """Bytes of the device that loading `nodes` will allocate; those that are being loaded have theirs."""
        pool, total = self.pools[Tier.DEVICE], 0
        for node in nodes:
            if not node.loading_into(Tier.DEVICE):
                source = node.fastest_tier
                payload = None if source is None else node.copies[source]
                assert payload is not None, "only nodes with data are loaded"
                total += pool.charge(payload)
        return total

    def can_make_room(self, node: Node) -> bool:
        """Whether prefetching the prompt that ends at `node` could get memory: available, or of nodes that rank low
        enough (`EvictionPolicy.prefetch_bound`). A cheap necessary condition, without side effects."""
        with self.lock:
            pool = self.pools[Tier.DEVICE]
            if node.nbytes <= pool.available + pool.pending_free:
                return True
            first = self.evictor.first_rank(Tier.DEVICE)
            return first is not None and first < self._prefetch_bound(node)

    def _prefetch_bound(self, node: Node) -> tuple[float, ...]:
        return self.policy.eviction.prefetch_bound(self.storage.queues[Tier.DEVICE].rank(node))

    def cancel_prefetches(self, nbytes: int) -> bool:
        """Cancels prefetches, the least urgent first, if that can make `nbytes` of the device available.

        Returns:
            Whether it can; the bytes are available when the transfers have ended.
        """
        with self.lock:
            return self.transfers.cancel_prefetches(Tier.DEVICE, nbytes)

    # Agents -----------------------------------------------------------------------------------------------------

    def agents(self) -> list[Agent]:
        """The agents with a fixed prompt in the tree."""
        with self.lock:
            return list(self.tree.agent_index.agents)

    def lookup_agent(self, agent: Agent) -> Node | None:
        """The node at which the fixed prompt of `agent` ends; None if the tree has none."""
        return self.tree.prompt_ends.get(agent)

    def take_moved_agents(self) -> list[Agent]:
        """The agents whose fixed prompt ends at another node than at the last call; for one caller."""
        with self.lock:
            moved = list(self.tree.moved_agents)
            self.tree.moved_agents.clear()
            return moved

    def _set_agent_prompt(self, agent: Agent, node: Node | None) -> None:
        for each in self.tree.set_agent_prompt(agent, node):
            self.storage.refresh(each)

    def forget_agent(self, agent: Agent) -> None:
        """`agent` no longer has a fixed prompt; its nodes remain until they are evicted."""
        with self.lock:
            self._set_agent_prompt(agent, None)

    def demote(self, token_ids: Sequence[int] | Any, namespace: Hashable = None) -> None:
        """Ranks the end of a prompt as if it had never been used, as far as no other prompt continues it and it
        belongs to no agent's fixed prompt; the next use ranks it as usual.

        Raises:
            ValueError: see `encode`.
        """
        key = encode(token_ids, self.tree.page_size)
        with self.lock:
            found = self.tree.find(key, namespace)
            below = 0
            for node in reversed(found.nodes[: -1 if found.part else None]):
                if node.fixed or len(node.children) > below:
                    break
                node.last_used, below = -math.inf, 1
                self.storage.refresh(node)

    def values_changed(self, agents: Iterable[Agent] | None = None) -> None:
        """Reads the policy's values of these agents (None: of all) again: O(log n) each, however many nodes it has."""
        with self.lock:
            groups = self.tree.agent_index.refresh(agents)
            for queue in self.storage.queues.values():
                queue.groups_changed(groups)

    # Transfers --------------------------------------------------------------------------------------------------

    @property
    def has_transfers(self) -> bool:
        """Whether transfers are in progress, or have ended and are not polled yet."""
        return bool(self.transfers.jobs)

    def poll(self) -> list[Node]:
        """Completes the transfers that have ended; returns their nodes."""
        with self.lock:
            ended = self.transfers.poll()
            if ended:
                self.write_back_eagerly()
            return ended

    def write_back_eagerly(self) -> None:
        """Starts eager write-backs if the policy has them; see `EagerWriteBack`."""
        with self.lock:
            if self._eager is not None:
                self._eager.start_transfers()

    def add_transfer_listener(self, listener: Callable[[TransferJob], None]) -> None:
        """`listener` is called, under the lock, with each job that has ended, once the tree has its result."""
        with self.lock:
            self.transfers.listeners.append(listener)

    @property
    def num_events(self) -> int:
        """Transfers that have ended, and interrupts; to be read before the state that a `wait` is based on."""
        return self.transfers.backend.num_events

    def wait(self, num_events: int, timeout_s: float) -> bool:
        """Waits until `self.num_events` exceeds `num_events`, without the lock; False on timeout."""
        return self.transfers.backend.wait(num_events, timeout_s)

    def interrupt(self) -> None:
        """Ends the waiting of all threads in `wait`."""
        self.transfers.backend.interrupt()

    def next_time(self) -> float | None:
        """When the next transfer will end, in seconds; None if there is none, or only real time will tell."""
        return self.transfers.backend.next_time()

    def close(self) -> None:
        """Ends all transfers, drops all copies and closes the pools; handles are useless afterwards.

        What is on disk stays there for the next process, if the pool has a fingerprint. May be called from any thread.
        """
        self.transfers.backend.close()
        with self.lock:
            self.transfers.poll()  # `self.poll` might start more
            self.storage.clear()
        for pool in self.pools.values():
            pool.close()

    def check(self) -> None:
        """Raises AssertionError unless tree, copies, bytes, references and queues agree."""
        with self.lock:
            self.tree.check()
            self.transfers.check()
            self.storage.check([handle.node for handle in self.handles.values()])


class CacheHandle:
    """Holds a reference on every node of the first `length` tokens of a prompt, which keeps them from being evicted.

    Created by `TieredCache.open`, owned by the caller until `release`. Methods may be called from any thread. `node` is
    the one at which the covered prefix ends; a root if it is empty.
    """

    def __init__(self, cache: TieredCache, number: int, node: Node) -> None:
        self._cache, self.id, self.node = cache, number, node

    def __enter__(self) -> CacheHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def length(self) -> int:
        """Tokens covered, from the beginning of the prompt."""
        return self.node.end

    @property
    def live(self) -> bool:
        """Whether it has not been released."""
        return self.id in self._cache.handles

    def nodes(self) -> list[Node] | None:
        """The nodes that hold the KV, in order; None if a part was lost."""
        with self._cache.lock:
            return self.node.chain()

    def load(
        self, urgency: Urgency = Urgency.DEMAND, priority: float = 0.0, only_lower_ranked: bool = False
    ) -> LoadState:
        """Loads everything covered onto the device; to be called until it returns READY.

        Either everything missing gets memory and its transfers start, or nothing does. A demand cancels prefetches if
        there is no other memory. Transfers in progress are not duplicated, but become as urgent as asked for here.

        Args:
            urgency, priority: of the transfers, see `TransferJob`.
            only_lower_ranked: evict only nodes below `EvictionPolicy.prefetch_bound`; for prefetching.

        Raises:
            ValueError: the handle has been released.
        """
        cache = self._cache
        with cache.lock:
            self._require_live()
            cache.poll()
            chain = self.node.chain()
            if chain is None:
                return LoadState.LOST
            missing = [node for node in chain if node.copies[Tier.DEVICE] is None]
            if not missing:
                return LoadState.READY
            for node in missing:
                self._join_transfer(node, urgency, priority)
            return self._start([node for node in missing if not node.in_transfer], urgency, priority, only_lower_ranked)

    def _join_transfer(self, node: Node, urgency: Urgency, priority: float) -> None:
        transfers = self._cache.transfers
        job = transfers.job_of(node)
        if job is None:
            return
        job.waiters.add(self.id)
        if job.target is not Tier.DEVICE:
            transfers.backend.cancel(job)  # from host to disk: the node keeps the copy it has
        elif (urgency, priority) < (job.urgency, job.priority):
            transfers.promote(job, urgency, priority)

    def _start(self, nodes: list[Node], urgency: Urgency, priority: float, only_lower_ranked: bool) -> LoadState:
        cache = self._cache
        needed = cache.bytes_to_load(nodes)
        bound = cache._prefetch_bound(self.node) if only_lower_ranked else None
        status = cache.evictor.make_room(Tier.DEVICE, needed, bound, urgent=urgency is Urgency.DEMAND)
        if status is AllocStatus.REFUSED and urgency is Urgency.DEMAND and cache.cancel_prefetches(needed):
            return LoadState.WAITING
        if status is not AllocStatus.READY:
            return LoadState.WAITING if status is AllocStatus.PENDING else LoadState.NO_ROOM
        for node in nodes:
            job = cache.transfers.start(node, Tier.DEVICE, urgency, priority)
            if job is None:
                return LoadState.NO_ROOM
            job.waiters.add(self.id)
        return LoadState.LOADING

    def wait(self, timeout_s: float) -> LoadState:
        """Loads on demand and waits until the state is final or `timeout_s` have passed; returns the last state."""
        cache = self._cache
        deadline = cache.clock() + timeout_s
        while True:
            num_events = cache.num_events
            state = self.load()
            left = deadline - cache.clock()
            if state not in (LoadState.LOADING, LoadState.WAITING) or left <= 0:
                return state
            cache.wait(num_events, left)

    def payloads(self) -> list[KVPayload]:
        """The covered KV on the device, in order; only to be read while the handle is live.

        Raises:
            ValueError: the handle has been released, or `load` has not returned READY.
        """
        with self._cache.lock:
            self._require_live()
            chain = self.node.chain()
            found = [] if chain is None else [node.copies[Tier.DEVICE] for node in chain]
            payloads = [payload for payload in found if payload is not None]
            if chain is None or len(payloads) < len(chain):
                raise ValueError("the covered prompt is not on the device: call load() until it returns READY")
            return payloads

    def touch(self) -> None:
        """Counts as a use now; the nodes are ranked by it when the handle is released."""
        with self._cache.lock:
            now = self._cache.clock()
            for node in self.node.path():
                node.last_used = now

    def truncate(self, node: Node) -> None:
        """Covers only the prompt that ends at `node`, one of `nodes()` or their root; the rest may be evicted again.

        Raises:
            ValueError: the handle has been released.
        """
        with self._cache.lock:
            self._require_live()
            self.cancel_loads()
            before, self.node = self.node, node
            self._cache.storage.release(before, above=node)

    def cancel_loads(self) -> None:
        """This handle does not wait for transfers any more; those that nobody else waits for are cancelled."""
        transfers = self._cache.transfers
        with self._cache.lock:
            for node in self.node.path():
                job = transfers.job_of(node)
                if job is not None and self.id in job.waiters:
                    job.waiters.remove(self.id)
                    if not job.waiters:
                        transfers.backend.cancel(job)

    def release(self) -> None:
        """Drops the references and cancels the loads; no effect the second time."""
        with self._cache.lock:
            if self._cache.handles.pop(self.id, None) is not None:
                self.cancel_loads()
                self._cache.storage.release(self.node)
                self._cache.storage.merge_path(self.node)
                self._cache.write_back_eagerly()

    def _require_live(self) -> None:
        if not self.live:
            raise ValueError("this handle has been released")
