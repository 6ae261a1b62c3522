"""Which tier holds what: copies on nodes, the bytes of the pools, users, and who may be evicted.

Every change of a node's copies or users goes through here, so pools, candidates and the counts above a node always
agree. Nothing here decides: `residency.py` keeps spans and copies together, `eviction.py` says who goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from .candidates import Candidates
from .node import TIERS, Node, Tier
from .orders import Order
from .payload import Payload
from .pools import Pool
from .tree import PrefixTree


class Ledger:
    """The copies of a tree's nodes.

    Args:
        tree: the nodes.
        pools: of the tiers that exist; each pool's bytes are taken and given back here alone.
        order: of eviction.
        now: the clock, seconds.
    """

    def __init__(self, tree: PrefixTree, pools: Mapping[Tier, Pool], order: Order, now: Callable[[], float]) -> None:
        self.tree, self.pools = tree, dict(pools)
        self.candidates = {tier: Candidates(tier, order, tree.groups, now) for tier in self.pools}

    def lock(self, node: Node, above: Node | None = None) -> None:
        """One more user of the prompt that ends at `node`.

        Args:
            above: an ancestor that the user has locked already; only what is below it is locked.
        """
        for each in node.path(above):
            each.users += 1
            if each.users == 1:
                for tier, pool in self.pools.items():
                    pool.idle -= each.held[tier]
                    self.candidates[tier].withdraw(each)

    def unlock(self, node: Node, above: Node | None = None) -> None:
        """One user less; `above` as in `lock`."""
        for each in node.path(above):
            each.users -= 1
            assert each.users >= 0, "who unlocks has locked"
            if each.users == 0:
                for tier, pool in self.pools.items():
                    pool.idle += each.held[tier]
                self.refresh(each)

    def refresh(self, node: Node) -> None:
        """Takes note of a new place of `node` in the order: it was used, or its agents changed."""
        for tier in self.pools:
            if node.copies[tier] is not None:
                self.candidates[tier].update(node)

    def put(self, node: Node, tier: Tier, payload: Payload, held: int) -> None:
        """`node` has a copy in `tier` now; its `held` bytes have been taken from the pool."""
        assert node.copies[tier] is None, "one copy a tier"
        node.copies[tier], node.held[tier] = payload, held
        if node.users == 0:
            self.pools[tier].idle += held
        if node.below[tier] == 0:
            self._count_above(node, tier, +1)
        self.candidates[tier].update(node)

    def pull(self, node: Node, tier: Tier) -> Payload:
        """Takes the copy off `node`; its bytes are free, the payload is the caller's to use or discard."""
        payload, held, pool = node.copies[tier], node.held[tier], self.pools[tier]
        assert payload is not None, "there is a copy"
        node.copies[tier], node.held[tier] = None, 0
        pool.give(held)
        if node.users == 0:
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
        users: dict[Node, int] = {}
        nodes = list(self.tree)
        for end in [*leased, *(node for node in nodes if node.flight is not None)]:
            for node in end.path():
                users[node] = users.get(node, 0) + 1
        for node in nodes:
            assert node.users == users.get(node, 0), "users are leases and copies under way"
            assert node.has_data or node.children or node.users, "what nothing needs is not in the tree"
            assert node.has_data or node.covers == node.length, "no copies cover the span alone"
            ends = {node.start, *(each.start for each in node.path())}
            assert node.covers >= node.length and node.end - node.covers in ends, "copies begin where a span does"
            for tier in TIERS:
                inside = [child.copies[tier] is not None or child.below[tier] > 0 for child in node.children.values()]
                assert node.below[tier] == sum(inside), "children with copies are counted"
                payload = node.copies[tier]
                assert payload is None or payload.tokens == node.covers, "copies are of the tokens they cover"
                assert not (node.users and node.stamps[tier]), "nothing is both evictable and locked"
        for candidates in self.candidates.values():
            candidates.check(nodes)
