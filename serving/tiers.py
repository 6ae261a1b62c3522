"""The cache of prompts: a prefix tree over tiers of memory, used through leases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from .ahead import SaveAhead
from .copies import Mover
from .eviction import Eviction, Room, TierPolicy
from .groups import Agent, Groups
from .lease import Lease
from .matching import Match, find, node_at
from .node import Node, Tier
from .orders import Order
from .pages import TOKEN_BYTES, encode
from .payload import Payload
from .pools import Pool
from .residency import Residency
from .statistics import TierStatistics
from .transfers import Transfers
from .tree import PrefixTree


class TieredTree:
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
        mover: Mover,
        policy: TierPolicy,
        page_size: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if Tier.DEVICE not in pools:
            raise ValueError(f"got pools for {sorted(pools)}; a pool for Tier.DEVICE is needed")
        self.lock, self.clock, self.policy = threading.RLock(), clock, policy
        self.statistics = TierStatistics()
        self.tree = PrefixTree(page_size, Groups(policy.order.value))
        self.residency = Residency(self.tree, pools, policy.order, clock)
        self.transfers = Transfers(self.residency, mover, self.statistics)
        self.eviction = Eviction(self.residency, self.transfers, policy)
        self._ahead = SaveAhead(self.residency, self.transfers) if policy.ahead else None
        self.leases: dict[int, Lease] = {}
        self._numbers = count(1)

    @property
    def pools(self) -> dict[Tier, Pool]:
        return self.residency.pools

    @property
    def order(self) -> Order:
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

    def open(self, token_ids: Sequence[int] | Any, namespace: Hashable = None, again: bool = False) -> Lease:
        """Leases what the tree has of a prompt: until its release nothing of that is evicted.

        The lease may cover no tokens at all; what it covers may have to be loaded (`Lease.load`). What is opened
        `again`, after it has been refused room, is not counted in the statistics a second time.
        """
        key = encode(token_ids, self.tree.page_size)
        with self.lock:
            self.poll()
            found = find(self.tree, key, namespace)
            node = found.nodes[-1] if found.nodes else self.tree.root(namespace)
            if found.part:
                node = self.residency.split(node, found.part)
                if node.chain() is None:  # the halves would not have fitted
                    node = found.nodes[-2] if len(found.nodes) > 1 else self.tree.root(namespace)
            if not again:
                self.statistics.tokens_asked += len(key) // TOKEN_BYTES
                self.statistics.tokens_found += node.end
            return self._lease(node)

    def open_agent(self, agent: Agent) -> Lease | None:
        """Leases the fixed prompt of `agent`; None if the tree has no usable one. Not counted as a use."""
        with self.lock:
            self.poll()
            node = self.tree.ends.get(agent)
            if node is None or node.chain() is None:
                return None
            return self._lease(node, used=False)

    def _lease(self, node: Node, used: bool = True) -> Lease:
        number, now = next(self._numbers), self.clock()
        for each in node.path() if used else ():
            each.last_used = now
            each.hits += 1
        self.residency.lock(node)
        lease = self.leases[number] = Lease(self, number, node)
        return lease

    def insert(
        self,
        lease: Lease,
        token_ids: Sequence[int] | Any,
        payload: Payload | None,
        agent: Agent | None = None,
        fixed_tokens: int = 0,
    ) -> Room:
        """Stores the KV of a prompt whose first `lease.length` tokens are leased; the lease then covers it all.

        Args:
            lease: from `open` with the same prompt.
            token_ids: the prompt.
            payload: KV of its tokens from `lease.length` to its last whole page, in the memory of the device tier. The
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
        end, new = len(key) // TOKEN_BYTES, len(key) // TOKEN_BYTES - lease.length
        if (0 if payload is None else payload.tokens) != max(0, new):
            given = "no payload" if payload is None else f"a payload of {payload.tokens} tokens"
            raise ValueError(f"got {given}; accepted: one of the {max(0, new)} tokens in [{lease.length}, {end})")
        if payload is not None:
            for pool in self.pools.values():
                pool.require(payload)
        with self.lock:
            self.poll()
            if not self.tree.spells(key, lease.node):
                raise ValueError("the prompt does not begin with what the lease covers")
            room = Room.READY if payload is None else self._store(lease, key, payload)
            if room is Room.READY and agent is not None and fixed_tokens:
                self._tag(agent, key[: self.whole_pages(fixed_tokens) * TOKEN_BYTES], lease.node.root)
            self.statistics.inserted += payload is not None and room is Room.READY
            self.statistics.refused += room is Room.REFUSED
            if self._ahead is not None and room is Room.READY:
                self._ahead.inserted(lease.node)
            return room

    def _store(self, lease: Lease, key: bytes, payload: Payload) -> Room:
        room = self.eviction.make_room(Tier.DEVICE, self.pools[Tier.DEVICE].charge(payload), hurry=True)
        if room is not Room.READY:
            return room
        node = node_at(self.residency, key, lease.node)
        self.residency.lock(node, above=lease.node)
        self.residency.lay(node, {Tier.DEVICE: payload}, node.end - lease.length)
        if node.chain() is None:  # the prompt had in parts what cannot be completed by a payload that cannot be cut
            self.residency.unlock(node, above=lease.node)
            return Room.REFUSED
        node.last_used = self.clock()
        lease.node = node
        return room

    def reserve(self, nbytes: int, beside: int = 0) -> Room:
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
            if room is Room.READY:
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
            return sum(self.residency.merge(node) for node in reversed(list(self.tree)))

    # Agents -----------------------------------------------------------------------------------------------------

    def _tag(self, agent: Agent, key: bytes, root: Node) -> None:
        for node in self.tree.tag(agent, node_at(self.residency, key, root)):
            self.residency.refresh(node)

    def forget_agent(self, agent: Agent) -> None:
        """`agent` has no fixed prompt any more; its nodes stay until they are evicted."""
        with self.lock:
            for node in self.tree.tag(agent, None):
                self.residency.refresh(node)

    def values_changed(self, agents: Iterable[Agent] | None = None) -> None:
        """The order's values of these agents (None: of all) are new: O(log n) for each, however many nodes it has."""
        with self.lock:
            groups = self.tree.groups.changed(agents)
            for candidates in self.residency.candidates.values():
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
            self.residency.empty()
        for pool in self.pools.values():
            pool.close()

    def check(self) -> None:
        """Raises AssertionError unless tree, copies, bytes, users and candidates agree."""
        with self.lock:
            self.tree.check()
            self.transfers.check()
            self.residency.check([lease.node for lease in self.leases.values()])
