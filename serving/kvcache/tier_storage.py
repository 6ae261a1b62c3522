"""Which tier holds what: copies on nodes, the bytes of the pools, users, and who may be evicted.

Every change of a node's copies or users goes through here, so pools, candidates and the counts above a node always
agree. Nothing here decides: `storage.py` keeps spans and copies together, `eviction.py` says who goes.

Keeps spans and copies together: what happens to a node's copies when it is cut, joined, filled or forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from .base import TIERS, KVPayload, Tier
from .eviction_policy import EvictionPolicy
from .eviction_queue import EvictionQueue
from .memory_pool import Pool
from .radix_tree import TOKEN_BYTES, Node, PrefixTree


class Ledger:
    """The copies of a tree's nodes.

    Args:
        tree: the nodes.
        pools: of the tiers that exist; each pool's bytes are taken and given back here alone.
        order: of eviction.
        now: the clock, seconds.
    """

    def __init__(
        self, tree: PrefixTree, pools: Mapping[Tier, Pool], order: EvictionPolicy, now: Callable[[], float]
    ) -> None:
        self.tree, self.pools = tree, dict(pools)
        self.candidates = {tier: EvictionQueue(tier, order, tree.groups, now) for tier in self.pools}

    def lock(self, node: Node, above: Node | None = None) -> None:
        """One more user of the prompt that ends at `node`.

        Args:
            above: an ancestor that the user has locked already; only what is below it is locked.
        """
        for each in node.path(above):
            each.ref_count += 1
            if each.ref_count == 1:
                for tier, pool in self.pools.items():
                    pool.idle -= each.held[tier]
                    self.candidates[tier].withdraw(each)

    def unlock(self, node: Node, above: Node | None = None) -> None:
        """One user less; `above` as in `lock`."""
        for each in node.path(above):
            each.ref_count -= 1
            assert each.ref_count >= 0, "who unlocks has locked"
            if each.ref_count == 0:
                for tier, pool in self.pools.items():
                    pool.idle += each.held[tier]
                self.refresh(each)

    def refresh(self, node: Node) -> None:
        """Takes note of a new place of `node` in the order: it was used, or its agents changed."""
        for tier in self.pools:
            if node.copies[tier] is not None:
                self.candidates[tier].update(node)

    def put(self, node: Node, tier: Tier, payload: KVPayload, held: int) -> None:
        """`node` has a copy in `tier` now; its `held` bytes have been taken from the pool."""
        assert node.copies[tier] is None, "one copy a tier"
        node.copies[tier], node.held[tier] = payload, held
        if node.ref_count == 0:
            self.pools[tier].idle += held
        if node.below[tier] == 0:
            self._count_above(node, tier, +1)
        self.candidates[tier].update(node)

    def pull(self, node: Node, tier: Tier) -> KVPayload:
        """Takes the copy off `node`; its bytes are free, the payload is the caller's to use or discard."""
        payload, held, pool = node.copies[tier], node.held[tier], self.pools[tier]
        assert payload is not None, "there is a copy"
        node.copies[tier], node.held[tier] = None, 0
        pool.give(held)
        if node.ref_count == 0:
            pool.idle -= held
        self.candidates[tier].withdraw(node)
        if node.below[tier] == 0:
            self._count_above(node, tier, -1)
        return payload

    def drop(self, node: Node, tier: Tier) -> None:
        """Discards the copy of `node` in `tier`; whether that was the last one is the caller's to look at."""
        self.pools[tier].discard(self.pull(node, tier))
        if not node.has_data and node.flight is None:
            node.covers = node.length

    def _count_above(self, node: Node, tier: Tier, change: int) -> None:
        """`node` or something below it has come into `tier`, as the first, or left it, as the last."""
        parent = node.parent
        while parent is not None:
            parent.below[tier] += change
            if parent.below[tier] != (1 if change > 0 else 0):
                return  # there are others below
            if parent.copies[tier] is not None:
                self.candidates[tier].update(parent)  # it became a leaf of the tier, or is none any more
                return
            parent = parent.parent

    def check(self, leased: Iterable[Node]) -> None:
        """Raises AssertionError unless users and the counts above nodes add up; `leased` has a node for each lease."""
        ref_count: dict[Node, int] = {}
        nodes = list(self.tree)
        for end in [*leased, *(node for node in nodes if node.flight is not None)]:
            for node in end.path():
                ref_count[node] = ref_count.get(node, 0) + 1
        for node in nodes:
            assert node.ref_count == ref_count.get(node, 0), "users are leases and copies under way"
            assert node.has_data or node.children or node.ref_count, "what nothing needs is not in the tree"
            assert node.has_data or node.covers == node.length, "no copies cover the span alone"
            ends = {node.start, *(each.start for each in node.path())}
            assert node.covers >= node.length and node.end - node.covers in ends, "copies begin where a span does"
            for tier in TIERS:
                inside = [child.copies[tier] is not None or child.below[tier] > 0 for child in node.children.values()]
                assert node.below[tier] == sum(inside), "children with copies are counted"
                payload = node.copies[tier]
                assert payload is None or payload.tokens == node.covers, "copies are of the tokens they cover"
                assert not (node.ref_count and node.stamps[tier]), "nothing is both evictable and locked"
        for candidates in self.candidates.values():
            candidates.check(nodes)


class TierStorage(Ledger):
    """A ledger whose nodes come and go.

    Cutting and joining copy the data within the device: while that runs, a node's bytes exist twice.
    """

    def unlock(self, node: Node, above: Node | None = None) -> None:
        """One user less; nodes that nobody needs any more leave the tree."""
        super().unlock(node, above)
        self.prune(node)

    def split(self, node: Node, pages: int) -> Node:
        """Cuts `node` after `pages` pages, and its copies with it if that is possible now; returns the new upper node.

        Where it is not, the upper node stays without data until `settle` succeeds: then a match that ends there is
        shorter, never wrong.
        """
        head = self.tree.split(node, pages)
        self.settle(node)
        self.refresh(node)
        return head

    def settle(self, node: Node) -> None:
        """Cuts copies that cover ancestors' spans too and hands out the parts, if all of them can be cut.

        A copy under way is left alone. A file stays whole: it is dropped if memory has the data too.
        """
        memory = [tier for tier in self.pools if tier != Tier.DISK and node.copies[tier] is not None]
        whole = [copy for copy in (node.copies[tier] for tier in memory) if copy is not None]
        if node.covers == node.length or node.flight is not None or not whole:
            return
        if not all(copy.divisible for copy in whole):
            return
        cut = node.covers - node.length
        parts = {}
        for tier, copy in zip(memory, whole, strict=True):
            pool, halves = self.pools[tier], copy.split(cut)
            if sum(map(pool.charge, halves)) > node.held[tier] + pool.free:
                return  # rounding makes two halves larger than the whole
            parts[tier] = halves
        if node.copies[Tier.DISK] is not None:
            self.drop(node, Tier.DISK)
        for tier in memory:
            self.pull(node, tier)
        node.covers = node.length
        for tier, (_, tail) in parts.items():
            self._place(node, tier, tail)
        parent = node.parent
        assert parent is not None
        upper = {tier: head for tier, (head, _) in parts.items()}
        self.lay(parent, upper, cut)

    def lay(self, node: Node, copies: Mapping[Tier, KVPayload], covers: int) -> None:
        """Gives `node` copies of the `covers` tokens that end with it, and its ancestors their parts of them.

        What a node has already, or a pool has no room for, is not stored twice; it goes with the last reference.
        """
        alike = not node.has_data or node.covers == covers
        if node.flight is None and alike:
            for tier, payload in copies.items():
                if not node.has_data:
                    node.covers = covers
                if node.copies[tier] is None:
                    self._place(node, tier, payload)
            self.settle(node)
            return
        if covers > node.length and all(payload.divisible for payload in copies.values()):
            assert node.parent is not None
            cut = covers - node.length
            self.lay(node.parent, {tier: payload.split(cut)[0] for tier, payload in copies.items()}, cut)

    def _place(self, node: Node, tier: Tier, payload: KVPayload) -> None:
        pool = self.pools[tier]
        held = pool.charge(payload)
        if pool.can_take(held):
            pool.take(held)
            self.put(node, tier, payload, held)
        elif not node.has_data:
            node.covers = node.length

    def prune(self, node: Node) -> None:
        """Removes `node` and its ancestors as far as nothing needs them; undoes a split that is needed no more.

        Only one that costs nothing: copying a long prompt each time a branch below it goes would be a bad bargain.
        """
        removed = False
        while node.parent is not None and not (node.children or node.has_data or node.ref_count):
            node, removed = self.tree.remove_leaf(node), True
        if removed and node.parent is not None and len(node.children) == 1:
            self.merge(node, copying=False)

    def lose(self, node: Node, tier: Tier) -> None:
        """Discards the copy of `node` in `tier`; with the last one of an idle node, everything that builds on it."""
        self.drop(node, tier)
        if not node.has_data and not node.ref_count:
            self._forget_below(node)
            self.prune(node)

    def _forget_below(self, node: Node) -> None:
        """Drops what cannot be used without `node`; nothing below an idle node has users."""
        lost, waiting = [], list(node.children.values())
        while waiting:
            each = waiting.pop()
            if each.has_data and each.end - each.covers < node.end:
                continue  # its copies reach over `node`
            lost.append(each)
            waiting += each.children.values()
        for each in reversed(lost):
            for tier in self.pools:
                if each.copies[tier] is not None:
                    self.drop(each, tier)
            if not each.children:
                self.tree.remove_leaf(each)

    def empty(self) -> None:
        """Drops all copies, and nodes without a user: as nodes know each other, they would wait for the collector."""
        for node in reversed(list(self.tree)):
            for tier in self.pools:
                if node.copies[tier] is not None:
                    self.drop(node, tier)
            node.covers = node.length
            if not (node.children or node.ref_count):
                self.tree.remove_leaf(node)

    def merge(self, upper: Node, copying: bool = True) -> bool:
        """Joins `upper` and its only child where both are alike: the same agents, idle, copies in the same tiers.

        Args:
            copying: also where both have data, which is copied together; not if any of it is on disk.
        """
        if upper.parent is None or len(upper.children) != 1:
            return False
        (lower,) = upper.children.values()
        if lower.ref_count or upper.ref_count or upper.group.agents.keys() != lower.group.agents.keys():
            return False
        if not upper.has_data:
            if (lower.has_data and lower.covers < upper.length + lower.length) or _begin_at(lower):
                return False
            self.tree.merge(upper)
        else:
            joined = self._joined(upper, lower) if copying and not _begin_at(lower) else None
            if joined is None:
                return False
            for tier in joined:
                self.pull(lower, tier)
                self.pull(upper, tier)
            self.tree.merge(upper)
            for tier, whole in joined.items():
                self._place(lower, tier, whole)
        self.refresh(lower)
        return True

    def _joined(self, upper: Node, lower: Node) -> dict[Tier, KVPayload] | None:
        """Both nodes' copies in one, for each tier; None if that cannot be."""
        tiers = [tier for tier in TIERS if upper.copies[tier] is not None]
        if Tier.DISK in tiers or tiers != [tier for tier in TIERS if lower.copies[tier] is not None]:
            return None
        if (upper.covers, lower.covers) != (upper.length, lower.length):
            return None
        joined = {}
        for tier in tiers:
            first, second, pool = upper.copies[tier], lower.copies[tier], self.pools[tier]
            assert first is not None and second is not None
            whole = first.join(second)
            if whole is None or pool.charge(whole) > upper.held[tier] + lower.held[tier] + pool.free:
                return None
            joined[tier] = whole
        return joined


def _begin_at(node: Node) -> bool:
    """Whether some copy below `node` covers its span and begins where that begins: its parent must stay apart then."""
    waiting = list(node.children.values())
    while waiting:
        each = waiting.pop()
        if each.has_data and each.end - each.covers == node.start:
            return True
        waiting += each.children.values()
    return False


def node_at(storage: TierStorage, key: bytes, begin: Node) -> Node:
    """The node that ends where `key` does, at or below `begin`; made, and without data, if there is none."""
    tree = storage.tree
    path, part = tree.walk(key, begin)
    node = path[-1] if path else begin
    if part:
        node = storage.split(tree.next_child(node, key), part)
    at = node.end * TOKEN_BYTES
    return tree.add_leaf(node, key[at:]) if at < len(key) else node
