"""How long a load will take, and whether computing would be sooner.

A lease: one user of a prompt's cached part, from the match to the release.

The cache of prompts: a prefix tree over tiers of memory, used through leases.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Any

from ..metrics import TierMetrics
from .base import KVPayload, Link, Tier, Urgency
from .eviction_policy import AllocStatus, Costs, EvictionPolicy, TierPolicy
from .evictor import Evictor, WriteBackAhead
from .memory_pool import Pool
from .radix_tree import TOKEN_BYTES, Agent, AgentIndex, Match, Node, PrefixTree, encode, fastest, find
from .tier_storage import TierStorage, node_at
from .transfer import TransferManager
from .transfer_queue import TransferBackend, TransferJob


@dataclass(frozen=True)
class Choice:
    """How the KV of a prompt is had soonest.

    Attributes:
        nodes: of the cached chain, how many are used; those of them that are not on the device are loaded.
        load_s, compute_s: estimated seconds of the loads, and of computing the rest.
        alternative_s: of computing everything that is not on the device.
    """

    nodes: int
    load_s: float
    compute_s: float
    alternative_s: float


class Estimates:
    """Reads what is under way; changes nothing.

    Args:
        costs: seconds to compute or to reload, without waiting.
        transfers: the copies under way.
    """

    def __init__(self, costs: Costs, transfers: TransferManager) -> None:
        self.costs, self.transfers = costs, transfers

    def choose(self, chain: Sequence[Node], size: int, compute: bool = False, others: int = 0) -> Choice:
        """Where to stop loading a prompt of `size` tokens whose cached part is `chain`.

        Loads run one after the other on a link, behind those that other requests wait for, and computing begins when
        they are done. A second of computing keeps all others waiting as well and counts for each of them: if every
        request only saw to itself, a busy link would have them compute, and the device would be the slower for all.

        Args:
            compute: do not load at all.
            others: requests that are being computed, or wait to be.
        """
        used, begin = 0, 0
        while used < len(chain) and chain[used].copies[Tier.DEVICE] is not None:
            begin, used = chain[used].end, used + 1
        alternative = self.costs.recompute_s(begin, size)
        best = Choice(used, 0.0, alternative, alternative)
        if compute or used == len(chain):
            return best
        seconds: dict[Link, float] = {}
        for number in range(used, len(chain)):
            node = chain[number]
            if node.copies[Tier.DEVICE] is None:
                self._add(node, seconds)
            load = max(seconds.values())
            rest = self.costs.recompute_s(node.end, size)
            if load + (1 + others) * rest <= best.load_s + (1 + others) * best.compute_s:
                best = Choice(number + 1, load, rest, alternative)
        return best

    def load_s(self, nodes: Sequence[Node]) -> float:
        """Seconds until these would be on the device if their copies were asked for on demand now."""
        seconds: dict[Link, float] = {}
        for node in nodes:
            if node.copies[Tier.DEVICE] is None:
                self._add(node, seconds)
        return max(seconds.values(), default=0.0)

    def link_s(self, nbytes: int, link: Link) -> float:
        """Seconds that `nbytes` take on a link into the device. A file's way is as slow as its way into the host."""
        return self.costs.reload_s(nbytes, Tier.DEVICE if link[0] is Tier.HOST else Tier.HOST)

    def _add(self, node: Node, seconds: dict[Link, float]) -> None:
        """Adds the copy of `node` to the seconds of its link, which begin with what is waited for already."""
        flight = node.flight
        source = fastest(node)
        assert source is not None, "a chain has data"
        coming = flight is not None and flight.target is Tier.DEVICE
        link = flight.link if flight is not None and coming else (source, Tier.DEVICE)
        if link not in seconds:
            ahead = self.transfers.demanded.get(link, 0)
            seconds[link] = self.link_s(ahead, link) if ahead else 0.0
        if flight is None or not coming:
            seconds[link] += self.link_s(node.nbytes, link)
        elif flight.urgency is not Urgency.DEMAND:  # those have been counted
            seconds[link] += self.link_s(sum(flight.payload.layers[flight.done :]), link)


class LoadState(Enum):
    READY = "everything is on the device"
    LOADING = "copies are under way; ask again"
    WAITING = "room on the device is being made; ask again"
    NO_ROOM = "the device has no room, and nothing may go: compute it, or ask again when others are done"
    LOST = "a part cannot be read back: release the lease and open the prompt anew"


class CacheHandle:
    """Keeps the first `length` tokens of a prompt from being evicted, from the tiers that hold them.

    Made by `TieredCache.open`. Its methods may be called from any thread.

    Attributes:
        number: among the leases of the tree.
        node: where the leased part ends; the root if it is empty.
    """

    def __init__(self, tiers: TieredCache, number: int, node: Node) -> None:
        self._tiers, self.number, self.node = tiers, number, node

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
        return self.number in self._tiers.handles

    def nodes(self) -> list[Node] | None:
        """The nodes that hold the KV, in order; None if a part was lost."""
        with self._tiers.lock:
            return self.node.chain()

    def load(self, urgency: Urgency = Urgency.DEMAND, priority: float = 0.0, only_below: bool = False) -> LoadState:
        """Sees to it that everything leased comes to the device; to be called until it is READY.

        Either all that is missing has room and its copies begin, or none does. A demand takes the room of prefetches
        that are under way if there is no other. What is being loaded already is not
        loaded twice, but becomes as urgent as asked for here.

        Args:
            urgency, priority: of the copies, see `TransferJob`.
            only_below: evict only what the order lets go for the leased prompt (`EvictionPolicy.displaced`); for
                prefetching.
        """
        tiers = self._tiers
        with tiers.lock:
            self._require_live()
            tiers.poll()
            chain = self.node.chain()
            if chain is None:
                return LoadState.LOST
            missing = [node for node in chain if node.copies[Tier.DEVICE] is None]
            if not missing:
                return LoadState.READY
            for node in missing:
                self._join(node.flight, urgency, priority)
            return self._begin([node for node in missing if node.flight is None], urgency, priority, only_below)

    def _join(self, flight: TransferJob | None, urgency: Urgency, priority: float) -> None:
        transfers = self._tiers.transfers
        if flight is None:
            return
        flight.waiters.add(self.number)
        if flight.target is not Tier.DEVICE:
            transfers.mover.cancel(flight)  # on its way from the host to the disk; it keeps the copy it has
        elif (urgency, priority) < (flight.urgency, flight.priority):
            transfers.promote(flight, urgency, priority)

    def _begin(self, nodes: list[Node], urgency: Urgency, priority: float, only_below: bool) -> LoadState:
        tiers = self._tiers
        pool = tiers.pools[Tier.DEVICE]
        payloads = [node.copies[source] for node in nodes if (source := fastest(node)) is not None]
        needed = sum(pool.charge(payload) for payload in payloads if payload is not None)
        below = None
        if only_below:
            below = tiers.eviction.policy.order.displaced(tiers.storage.candidates[Tier.DEVICE].rank(self.node))
        room = tiers.eviction.make_room(Tier.DEVICE, needed, below, hurry=urgency is Urgency.DEMAND)
        if (
            room is AllocStatus.REFUSED
            and urgency is Urgency.DEMAND
            and tiers.transfers.cancel_prefetches(Tier.DEVICE, needed)
        ):
            return LoadState.WAITING
        if room is not AllocStatus.READY:
            return LoadState.WAITING if room is AllocStatus.PENDING else LoadState.NO_ROOM
        for node in nodes:
            if not tiers.transfers.start(node, Tier.DEVICE, urgency, priority):
                return LoadState.NO_ROOM
            if node.flight is not None:
                node.flight.waiters.add(self.number)
        return LoadState.LOADING

    def wait(self, timeout_s: float) -> LoadState:
        """Loads on demand and waits until the state is final, or for that long; returns the last state."""
        tiers = self._tiers
        deadline = tiers.clock() + timeout_s
        while True:
            ended = tiers.transfers.mover.ended
            state = self.load()
            left = deadline - tiers.clock()
            if state not in (LoadState.LOADING, LoadState.WAITING) or left <= 0:
                return state
            tiers.transfers.mover.wait(ended, left)

    def payloads(self) -> list[KVPayload]:
        """What the device holds of the leased tokens, in order; to be read before the release.

        Raises:
            ValueError: the lease is not READY.
        """
        with self._tiers.lock:
            self._require_live()
            chain = self.node.chain()
            found = [] if chain is None else [node.copies[Tier.DEVICE] for node in chain]
            payloads = [payload for payload in found if payload is not None]
            if chain is None or len(payloads) < len(chain):
                raise ValueError("the leased prompt is not on the device: call load() until it says READY")
            return payloads

    def shorten(self, node: Node) -> None:
        """Covers only what ends at `node`, one of `nodes()` or their root; the rest may be evicted again."""
        with self._tiers.lock:
            self._require_live()
            self.cancel()
            before, self.node = self.node, node
            self._tiers.storage.unlock(before, above=node)

    def cancel(self) -> None:
        """This lease does not wait for loads any more; those that nobody else waits for are cancelled."""
        with self._tiers.lock:
            for node in self.node.path():
                flight = node.flight
                if flight is not None and self.number in flight.waiters:
                    flight.waiters.remove(self.number)
                    if not flight.waiters:
                        self._tiers.transfers.mover.cancel(flight)

    def release(self) -> None:
        """Ends the lease, and its loads as `cancel`; nothing happens the second time."""
        with self._tiers.lock:
            if self._tiers.handles.pop(self.number, None) is not None:
                self.cancel()
                self._tiers.storage.unlock(self.node)
                self._tiers.save_ahead()

    def _require_live(self) -> None:
        if not self.live:
            raise ValueError("this lease has been released")


class TieredCache:
    """KV of prompts in a device pool, a host pool and on disk; any of the latter two may be missing.

    All methods may be called from any thread. What copies have done shows after `poll`, which everything here that
    needs it calls first.

    Args:
        pools: by tier; DEVICE is needed. Closed with the tree.
        mover: moves bytes between them, in real or in virtual time. Closed with the tree.
        policy: who goes first and what is saved below.
        page_size: tokens a page.
        clock: seconds; one that is shared with `mover` if that is virtual.
    """

    def __init__(
        self,
        pools: Mapping[Tier, Pool],
        mover: TransferBackend,
        policy: TierPolicy,
        page_size: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if Tier.DEVICE not in pools:
            raise ValueError(f"got pools for {sorted(pools)}; a pool for Tier.DEVICE is needed")
        self.lock, self.clock, self.policy = threading.RLock(), clock, policy
        self.statistics = TierMetrics()
        self.tree = PrefixTree(page_size, AgentIndex(policy.order.value))
        self.storage = TierStorage(self.tree, pools, policy.order, clock)
        self.transfers = TransferManager(self.storage, mover, self.statistics)
        self.eviction = Evictor(self.storage, self.transfers, policy)
        self._ahead = WriteBackAhead(self.storage, self.transfers) if policy.ahead else None
        self.handles: dict[int, CacheHandle] = {}
        self._numbers = count(1)

    @property
    def pools(self) -> dict[Tier, Pool]:
        return self.storage.pools

    @property
    def order(self) -> EvictionPolicy:
        return self.policy.order

    def whole_pages(self, tokens: int) -> int:
        """The largest number of tokens up to `tokens` that fills pages."""
        return tokens - tokens % self.tree.page_size

    # Prompts ----------------------------------------------------------------------------------------------------

    def match(self, token_ids: Sequence[int] | Any, namespace: Hashable = None) -> Match:
        """What the tree has of a prompt, in whatever tiers; changes nothing.

        Raises:
            ValueError: see `pages.encode`.
        """
        key = encode(token_ids, self.tree.page_size)
        with self.lock:
            self.poll()
            return find(self.tree, key, namespace)

    def open(self, token_ids: Sequence[int] | Any, namespace: Hashable = None, again: bool = False) -> CacheHandle:
        """Leases what the tree has of a prompt: until its release nothing of that is evicted.

        The lease may cover no tokens at all; what it covers may have to be loaded (`CacheHandle.load`). What is opened
        `again`, after it has been refused room, is not counted in the statistics a second time.
        """
        key = encode(token_ids, self.tree.page_size)
        with self.lock:
            self.poll()
            found = find(self.tree, key, namespace)
            node = found.nodes[-1] if found.nodes else self.tree.root(namespace)
            if found.part:
                node = self.storage.split(node, found.part)
                if node.chain() is None:  # the halves would not have fitted
                    node = found.nodes[-2] if len(found.nodes) > 1 else self.tree.root(namespace)
            if not again:
                self.statistics.tokens_asked += len(key) // TOKEN_BYTES
                self.statistics.tokens_found += node.end
            return self._lease(node)

    def open_agent(self, agent: Agent) -> CacheHandle | None:
        """Leases the fixed prompt of `agent`; None if the tree has no usable one. Not counted as a use."""
        with self.lock:
            self.poll()
            node = self.tree.ends.get(agent)
            if node is None or node.chain() is None:
                return None
            return self._lease(node, used=False)

    def _lease(self, node: Node, used: bool = True) -> CacheHandle:
        number, now = next(self._numbers), self.clock()
        for each in node.path() if used else ():
            each.last_used = now
            each.hits += 1
        self.storage.lock(node)
        handle = self.handles[number] = CacheHandle(self, number, node)
        return handle

    def insert(
        self,
        handle: CacheHandle,
        token_ids: Sequence[int] | Any,
        payload: KVPayload | None,
        agent: Agent | None = None,
        fixed_tokens: int = 0,
    ) -> AllocStatus:
        """Stores the KV of a prompt whose first `handle.length` tokens are leased; the lease then covers it all.

        Args:
            lease: from `open` with the same prompt.
            token_ids: the prompt.
            payload: KV of its tokens from `handle.length` to its last whole page, in the memory of the device tier. The
                tree owns it from now on if it is stored. None if there are no such tokens.
            agent, fixed_tokens: whose fixed prompt the first `fixed_tokens` are (down to a whole page); 0: nobody's.

        Returns:
            READY: it is stored. PENDING, REFUSED: it is not, and the lease is what it was; after the former there will
            be room once copies have ended.
        Raises:
            ValueError: the payload is not of that length, or of a type that a pool cannot hold; the prompt is not the
                lease's.
        """
        key = encode(token_ids, self.tree.page_size)
        end, new = len(key) // TOKEN_BYTES, len(key) // TOKEN_BYTES - handle.length
        if (0 if payload is None else payload.tokens) != max(0, new):
            given = "no payload" if payload is None else f"a payload of {payload.tokens} tokens"
            raise ValueError(f"got {given}; accepted: one of the {max(0, new)} tokens in [{handle.length}, {end})")
        if payload is not None:
            for pool in self.pools.values():
                pool.require(payload)
        with self.lock:
            self.poll()
            if not self.tree.spells(key, handle.node):
                raise ValueError("the prompt does not begin with what the lease covers")
            room = AllocStatus.READY if payload is None else self._store(handle, key, payload)
            if room is AllocStatus.READY and agent is not None and fixed_tokens:
                self._tag(agent, key[: self.whole_pages(fixed_tokens) * TOKEN_BYTES], handle.node.root)
            self.statistics.inserted += payload is not None and room is AllocStatus.READY
            self.statistics.refused += room is AllocStatus.REFUSED
            if self._ahead is not None and room is AllocStatus.READY:
                self._ahead.inserted(handle.node)
            return room

    def _store(self, handle: CacheHandle, key: bytes, payload: KVPayload) -> AllocStatus:
        room = self.eviction.make_room(Tier.DEVICE, self.pools[Tier.DEVICE].charge(payload), hurry=True)
        if room is not AllocStatus.READY:
            return room
        node = node_at(self.storage, key, handle.node)
        self.storage.lock(node, above=handle.node)
        self.storage.lay(node, {Tier.DEVICE: payload}, node.end - handle.length)
        if node.chain() is None:  # the prompt had in parts what cannot be completed by a payload that cannot be cut
            self.storage.unlock(node, above=handle.node)
            return AllocStatus.REFUSED
        node.last_used = self.clock()
        handle.node = node
        return room

    def reserve(self, nbytes: int, beside: int = 0) -> AllocStatus:
        """Takes `nbytes` of the device for a request that is computed, evicting for it; `release` gives them back.

        Args:
            beside: bytes for which there must be room as well, e.g. for what the request will load.

        Returns:
            READY: they are taken. PENDING, REFUSED: nothing is; after the former there will be room once copies have
            ended.
        """
        with self.lock:
            self.poll()
            room = self.eviction.make_room(Tier.DEVICE, nbytes + beside, hurry=True)
            if room is AllocStatus.READY:
                self.pools[Tier.DEVICE].reserve(nbytes)
            return room

    def release(self, nbytes: int) -> None:
        """Gives reserved bytes back."""
        with self.lock:
            self.pools[Tier.DEVICE].unreserve(nbytes)

    def merge_spans(self) -> int:
        """Joins idle nodes that no branch keeps apart any more; for quiet times, as it copies data.

        Returns:
            How many nodes there are less.
        """
        with self.lock:
            self.poll()
            # Parents come first in the tree's order; from the last one up, a chain of any length becomes one node.
            return sum(self.storage.merge(node) for node in reversed(list(self.tree)))

    # Agents -----------------------------------------------------------------------------------------------------

    def _tag(self, agent: Agent, key: bytes, root: Node) -> None:
        for node in self.tree.tag(agent, node_at(self.storage, key, root)):
            self.storage.refresh(node)

    def forget_agent(self, agent: Agent) -> None:
        """`agent` has no fixed prompt any more; its nodes stay until they are evicted."""
        with self.lock:
            for node in self.tree.tag(agent, None):
                self.storage.refresh(node)

    def values_changed(self, agents: Iterable[Agent] | None = None) -> None:
        """The order's values of these agents (None: of all) are new: O(log n) for each, however many nodes it has."""
        with self.lock:
            groups = self.tree.groups.changed(agents)
            for candidates in self.storage.candidates.values():
                candidates.revalue(groups)

    # Copies -----------------------------------------------------------------------------------------------------

    def poll(self) -> list[Node]:
        """Takes in the copies that have ended; returns their nodes."""
        with self.lock:
            ended = self.transfers.poll()
            if ended and self._ahead is not None:
                self._ahead.begin()
            return ended

    def save_ahead(self) -> None:
        """Begins to save what will have to be saved, where the policy says so and nothing else uses the link."""
        with self.lock:
            if self._ahead is not None:
                self._ahead.begin()

    def close(self) -> None:
        """Ends all copies, lets go of the memory and closes the pools; leases are worth nothing afterwards."""
        self.transfers.mover.close()
        with self.lock:
            self.transfers.poll()  # `poll` might begin more
            self.storage.empty()
        for pool in self.pools.values():
            pool.close()

    def check(self) -> None:
        """Raises AssertionError unless tree, copies, bytes, users and candidates agree."""
        with self.lock:
            self.tree.check()
            self.transfers.check()
            self.storage.check([handle.node for handle in self.handles.values()])
