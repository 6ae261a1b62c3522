"""Keeps spans and copies together: what happens to a node's copies when it is cut, joined, filled or forgotten."""

from __future__ import annotations

from collections.abc import Mapping

from .ledger import Ledger
from .node import TIERS, Node, Tier
from .payload import Payload


class Residency(Ledger):
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

    def lay(self, node: Node, copies: Mapping[Tier, Payload], covers: int) -> None:
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

    def _place(self, node: Node, tier: Tier, payload: Payload) -> None:
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
        while node.parent is not None and not (node.children or node.has_data or node.users):
            node, removed = self.tree.remove_leaf(node), True
        if removed and node.parent is not None and len(node.children) == 1:
            self.merge(node, copying=False)

    def lose(self, node: Node, tier: Tier) -> None:
        """Discards the copy of `node` in `tier`; with the last one of an idle node, everything that builds on it."""
        self.drop(node, tier)
        if not node.has_data and not node.users:
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
            if not (node.children or node.users):
                self.tree.remove_leaf(node)

    def merge(self, upper: Node, copying: bool = True) -> bool:
        """Joins `upper` and its only child where both are alike: the same agents, idle, copies in the same tiers.

        Args:
            copying: also where both have data, which is copied together; not if any of it is on disk.
        """
        if upper.parent is None or len(upper.children) != 1:
            return False
        (lower,) = upper.children.values()
        if lower.users or upper.users or upper.group.agents.keys() != lower.group.agents.keys():
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

    def _joined(self, upper: Node, lower: Node) -> dict[Tier, Payload] | None:
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
