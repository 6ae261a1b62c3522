"""The copies of the tree's nodes in the tiers: their bytes, references and places in the eviction queues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

from .base import TIERS, KVPayload, PromptKey, Tier
from .disk_pool import DiskPool
from .eviction_history import EvictionHistory, MissReason
from .eviction_policy import EvictionPolicy
from .eviction_queue import EvictionQueue
from .memory_pool import Pool
from .prompt_file import FilePayload
from .radix_tree import TOKEN_BYTES, Node, PrefixTree, RootNode

logger = logging.getLogger(__name__)


class TierStorage:
    """Every change of a node's copies or references is made here, so pools, queues and counts always agree.

    It owns the bytes of the copies: `store` allocates them, or `attach` takes over what a transfer allocated, and
    `free`, `evict` and `clear` free them. It keeps spans and copies together when nodes are split and merged, and
    removes nodes that nothing needs. It does not decide what is evicted: that is the `Evictor`'s.

    Splitting and joining copy the data within a tier, where a node's bytes exist twice meanwhile; parts of a file on
    disk stay in that file.

    Called under the cache's lock.
    """

    def __init__(
        self, tree: PrefixTree, pools: Mapping[Tier, Pool], policy: EvictionPolicy, now: Callable[[], float],
        history: EvictionHistory,
    ) -> None:  # fmt: skip
        self.tree, self.pools, self.history, self._now = tree, dict(pools), history, now
        self.retired: list[RootNode] = []  # with nodes below, or with handles that may add some
        self.queues = {tier: EvictionQueue(tier, policy, tree.agent_index, now) for tier in self.pools}

    def needed_bytes(self, node: Node, tier: Tier, payload: KVPayload) -> int:
        """Bytes that a new copy of the node's `payload` takes in `tier`."""
        pool = self.pools[tier]
        return pool.charge(payload) + pool.prompt_bytes(node.end)

    # References -------------------------------------------------------------------------------------------------

    def acquire(self, node: Node, above: Node | None = None) -> None:
        """Adds a reference to every node of the prompt that ends at `node`, which keeps all of it from eviction.

        The root counts the references in its tree, and is kept while there are any.

        Args:
            above: an ancestor that the caller references already; only nodes below it get a reference.
        """
        if above is None:
            node.root.ref_count += 1
        for each in node.path(above):
            each.ref_count += 1
            if each.ref_count == 1:
                for tier, pool in self.pools.items():
                    pool.evictable -= each.allocated[tier]
                    self.queues[tier].remove(each)

    def release(self, node: Node, above: Node | None = None) -> None:
        """Drops the references of `acquire`, and removes nodes that nothing needs any more."""
        if above is None:
            node.root.ref_count -= 1
        for each in node.path(above):
            each.ref_count -= 1
            assert each.ref_count >= 0, "released references were acquired"
            if each.ref_count == 0:
                for tier, pool in self.pools.items():
                    pool.evictable += each.allocated[tier]
                self.refresh(each)
        self.prune(node)
        if self.retired:
            self.free_retired()

    def refresh(self, node: Node) -> None:
        """Ranks `node` anew: it was used, or its agents have changed."""
        for tier in self.pools:
            if node.copies[tier] is not None:
                self.queues[tier].update(node)

    # Copies -----------------------------------------------------------------------------------------------------

    def attach(self, node: Node, tier: Tier, payload: KVPayload, nbytes: int) -> None:
        """Makes `payload` the copy of `node` in `tier`; its `nbytes` have been allocated and are now the storage's."""
        assert node.copies[tier] is None, "one copy a tier"
        node.copies[tier], node.allocated[tier] = payload, nbytes
        if node.ref_count == 0:
            self.pools[tier].evictable += nbytes
        if node.cached_children[tier] == 0:
            self._count_in_ancestors(node, tier, +1)
        self.queues[tier].update(node)

    def detach(self, node: Node, tier: Tier) -> KVPayload:
        """Removes the copy of `node` from `tier` and frees its bytes; the payload is now the caller's."""
        payload, nbytes, pool = node.copies[tier], node.allocated[tier], self.pools[tier]
        assert payload is not None, "there is a copy"
        node.copies[tier], node.allocated[tier] = None, 0
        pool.free(nbytes)
        if node.ref_count == 0:
            pool.evictable -= nbytes
        self.queues[tier].remove(node)
        if node.cached_children[tier] == 0:
            self._count_in_ancestors(node, tier, -1)
        return payload

    def _replace(self, node: Node, tier: Tier) -> None:
        """Detaches a copy whose data others have taken over: its parts, or the whole that it is a part of.

        Memory is given up at once, as somebody may hold the payload a little longer; parts of a file are the same file.
        """
        payload = self.detach(node, tier)
        if tier is not Tier.DISK:
            self.pools[tier].discard(payload)

    def free(self, node: Node, tier: Tier) -> None:
        """Discards the copy of `node` in `tier`. If it was the last, what builds on it is the caller's concern."""
        self.pools[tier].discard(self.detach(node, tier))
        if not node.transfer_id and not node.has_data:
            node.covers = node.length

    def lose(self, node: Node, tier: Tier) -> None:
        """Discards the copy of `node` in `tier`, which cannot be read; the caller references the node."""
        if not node.is_replicated:
            self.history.record_node(node, node.covers, self._now(), MissReason.LOST)
        self.free(node, tier)

    def _count_in_ancestors(self, node: Node, tier: Tier, change: int) -> None:
        """`node` and its descendants have got their first copy in `tier` (+1), or lost their last (-1)."""
        parent = node.parent
        while parent is not None:
            parent.cached_children[tier] += change
            if parent.cached_children[tier] != (1 if change > 0 else 0):
                return  # other children have copies
            if parent.copies[tier] is not None:
                self.queues[tier].update(parent)  # it became a leaf of the tier, or is no longer one
                return
            parent = parent.parent

    def store(self, node: Node, copies: Mapping[Tier, KVPayload], covers: int) -> None:
        """Stores copies of the `covers` tokens that end with `node`, and the ancestors' parts of them with these.

        A part that a node has already, or that a pool has no room for, is discarded.
        """
        alike = not node.has_data or node.covers == covers
        if not node.in_transfer and alike:
            for tier, payload in copies.items():
                if not node.has_data:
                    node.covers = covers
                if node.copies[tier] is None:
                    self._allocate(node, tier, payload)
                else:
                    self.pools[tier].discard(payload)
            self.split_if_possible(node)
            return
        heads = {}
        for tier, payload in copies.items():
            rest = payload
            if covers > node.length and all(each.divisible for each in copies.values()):
                heads[tier], rest = payload.split(covers - node.length)
            self.pools[tier].discard(rest)
        if heads:
            assert node.parent is not None
            self.store(node.parent, heads, covers - node.length)

    def _allocate(self, node: Node, tier: Tier, payload: KVPayload) -> None:
        pool = self.pools[tier]
        nbytes = pool.charge(payload)
        if pool.can_allocate(nbytes):
            pool.allocate(nbytes)
            self.attach(node, tier, payload, nbytes)
            return
        pool.discard(payload)
        if not node.has_data:
            node.covers = node.length

    def extend(self, node: Node, span: bytes, payload: KVPayload) -> bool:
        """Appends `span`, with its KV `payload`, to `node`; for the caller that has the only reference on it.

        Returns:
            False, and nothing is changed, unless `node` is a leaf on the device only, in nobody's fixed prompt (whose
            end must stay a node's), and its KV joins freely with `payload`, for which there is room.
        """
        copy, pool = node.copies[Tier.DEVICE], self.pools[Tier.DEVICE]
        alone = node.ref_count == 1 and not (node.children or node.in_transfer or node.fixed or node.is_replicated)
        if not alone or copy is None or not (copy.joins_freely and payload.joins_freely):
            return False
        whole = _join(copy, payload)
        if whole is None or not pool.can_allocate(pool.charge(whole) - node.allocated[Tier.DEVICE]):
            return False
        nbytes = pool.charge(whole)
        pool.allocate(nbytes - node.allocated[Tier.DEVICE])
        pool.discard(copy)
        pool.discard(payload)
        node.copies[Tier.DEVICE], node.allocated[Tier.DEVICE] = whole, nbytes
        self.tree.extend_leaf(node, span)
        return True

    def insert(self, begin: Node, key: bytes, payload: KVPayload) -> Node:
        """Stores `payload`, for which the device has room, as the KV of `key` below `begin`.

        The caller's reference passes from `begin` to the node that is returned.

        Args:
            begin: `key` begins with the prompt that ends there. Its leaf is extended where that is possible.

        Returns:
            The node up to which the device has the KV of `key`. That may be before the end of `key`: parts may be
            cached already, an indivisible payload cannot fill the gaps between them, and a node in transfer takes no
            copy. What was stored behind a gap is not kept.
        """
        if self.extend(begin, key[begin.end * TOKEN_BYTES :], payload):
            return begin
        node, reached = self.get_or_create(key, begin), begin
        self.acquire(node, above=begin)
        before = {each for each in node.path(begin) if each.copies[Tier.DEVICE] is not None}
        try:
            self.store(node, {Tier.DEVICE: payload}, node.end - begin.end)
            reached = next((each for each in node.path(begin) if _on_device(each, begin)), begin)
        finally:
            for each in list(node.path(reached)):
                if each.copies[Tier.DEVICE] is not None and each not in before:
                    self.free(each, Tier.DEVICE)
            self.release(node, above=reached)
        return reached

    def restore(self, disk: DiskPool, prompt: PromptKey, payload: FilePayload, last_used: float) -> Node | None:
        """Adds a prompt that an earlier process has left on disk to the tree.

        Its end may be lost, and pages may have another size: whole pages are kept, and the rest is discarded.

        Returns:
            The node that has the copy now; None if it is of no use, or there is no room for it.
        """
        start, page_size = len(prompt.key) // TOKEN_BYTES - payload.file.layout.tokens, self.tree.page_size
        end = start + payload.tokens
        tokens = end - end % page_size - start
        if start % page_size or tokens <= 0 or (tokens < payload.tokens and not payload.divisible):
            disk.discard(payload)
            return None
        if tokens < payload.tokens:
            payload, rest = payload.split(tokens)
            disk.discard(rest)
        root = self.tree.root(prompt.namespace)
        self.get_or_create(prompt.key[: start * TOKEN_BYTES], root)
        node = self.get_or_create(prompt.key[: (start + tokens) * TOKEN_BYTES], root)
        self.store(node, {Tier.DISK: payload}, tokens)
        for each in node.path():
            each.last_used = max(each.last_used or last_used, last_used)
            self.refresh(each)
        if not node.has_data:
            self.prune(node)
            return None
        return node

    # Splitting and merging --------------------------------------------------------------------------------------

    def get_or_create(self, key: bytes, begin: Node) -> Node:
        """The node that ends where `key` does, at or below `begin`; created without data if there is none."""
        path, part = self.tree.walk(key, begin)
        node = path[-1] if path else begin
        if part:
            node = self.split(self.tree.next_child(node, key), part)
        at = node.end * TOKEN_BYTES
        return self.tree.add_leaf(node, key[at:]) if at < len(key) else node

    def split(self, node: Node, pages: int) -> Node:
        """Splits `node` after `pages` pages, and its copies with it if that is possible now; returns the upper node.

        Otherwise the upper node has no data until `split_if_possible` succeeds: a match that ends there is then
        shorter, never wrong.
        """
        head = self.tree.split(node, pages)
        self.split_if_possible(node)
        self.refresh(node)
        return head

    def split_if_possible(self, node: Node) -> None:
        """Splits copies that cover ancestors' spans as well and hands the parts to these, if all can be split.

        Payloads in transfer are left alone.
        """
        copies = {tier: copy for tier in self.pools if (copy := node.copies[tier]) is not None}
        if node.covers == node.length or node.in_transfer or not copies:
            return
        if not all(copy.divisible for copy in copies.values()):
            return
        cut = node.covers - node.length
        parts = {}
        for tier, copy in copies.items():
            pool, halves = self.pools[tier], _split(copy, cut)
            if halves is None or sum(map(pool.charge, halves)) > node.allocated[tier] + pool.available:
                return  # rounding makes two halves larger than the whole
            parts[tier] = halves
        for tier in copies:
            self._replace(node, tier)
        node.covers = node.length
        for tier, (_, tail) in parts.items():
            self._allocate(node, tier, tail)
        assert node.parent is not None
        self.store(node.parent, {tier: head for tier, (head, _) in parts.items()}, cut)

    def merge(self, upper: Node, copying: bool = True) -> bool:
        """Merges `upper` with its only child if no reference ends at it and both have the same agents and tiers.

        Args:
            copying: also if both have data that has to be copied together, which needs both to be unreferenced; on
                disk, only parts of one file are joined.
        """
        if upper.parent is None or len(upper.children) != 1:
            return False
        (lower,) = upper.children.values()
        if (
            upper.in_transfer
            or lower.ref_count != upper.ref_count
            or upper.group.agents.keys() != lower.group.agents.keys()
        ):
            return False
        if not upper.has_data:
            if (lower.has_data and lower.covers < upper.length + lower.length) or _is_boundary(lower):
                return False
            if lower.in_transfer and not lower.has_data:
                return False
            self.tree.merge(upper)
        else:
            joined = None if _is_boundary(lower) else self._join(upper, lower, copying and not lower.ref_count)
            if joined is None:
                return False
            for tier in joined:
                self._replace(lower, tier)
                self._replace(upper, tier)
            self.tree.merge(upper)
            for tier, whole in joined.items():
                self._allocate(lower, tier, whole)
        self.refresh(lower)
        return True

    def merge_path(self, node: Node) -> None:
        """Merges the nodes on the path to `node` that nothing separates any more, as far as that copies nothing."""
        upper = node.parent
        while upper is not None and upper.parent is not None:
            above = upper.parent
            self.merge(upper, copying=False)
            upper = above

    def _join(self, upper: Node, lower: Node, copying: bool) -> dict[Tier, KVPayload] | None:
        """The copies of both nodes in one, for each tier; None if they cannot be joined, or only by copying."""
        if lower.in_transfer:
            return None
        tiers = [tier for tier in reversed(TIERS) if upper.copies[tier] is not None]
        if tiers != [tier for tier in reversed(TIERS) if lower.copies[tier] is not None]:
            return None
        if (upper.covers, lower.covers) != (upper.length, lower.length):
            return None
        joined = {}
        for tier in tiers:
            first, second, pool = upper.copies[tier], lower.copies[tier], self.pools[tier]
            assert first is not None and second is not None
            if not copying and not (first.joins_freely and second.joins_freely):
                return None
            whole = _join(first, second)
            if whole is None or pool.charge(whole) > upper.allocated[tier] + lower.allocated[tier] + pool.available:
                return None
            joined[tier] = whole
        return joined

    # Removal ----------------------------------------------------------------------------------------------------

    def evict(self, node: Node, tier: Tier) -> None:
        """Discards the copy of `node` in `tier`; with the last copy of an unreferenced node, all that builds on it."""
        covers = node.covers
        self.free(node, tier)
        if not node.has_data and not node.ref_count:
            self.history.record_node(node, covers, self._now())
            self._free_dependents(node)
            self.prune(node)

    def _free_dependents(self, node: Node) -> None:
        """Discards the copies below `node` that cannot be used without it: all that do not cover its span as well."""
        dependents, pending = [], list(node.children.values())
        while pending:
            each = pending.pop()
            if each.has_data and each.end - each.covers < node.end:
                continue
            dependents.append(each)
            pending += each.children.values()
        for each in reversed(dependents):
            if each.has_data:
                self.history.record_node(each, each.covers, self._now())
            for tier in self.pools:
                if each.copies[tier] is not None:
                    self.free(each, tier)
            if not each.children:
                self.tree.remove_leaf(each)

    def prune(self, node: Node) -> None:
        """Removes `node` and its ancestors as far as nothing needs them, the root included.

        Undoes a split that is then unnecessary if the upper node has no data. Nodes with data are merged by
        `merge_path`: this one is called while a victim is being evicted, which must stay what it is.
        """
        removed = False
        while node.parent is not None and not (node.children or node.has_data or node.ref_count):
            node, removed = self.tree.remove_leaf(node), True
        if node.parent is None:
            self.tree.remove_root_if_empty(node)
        elif removed and not node.has_data and len(node.children) == 1:
            self.merge(node)

    def retire(self) -> None:
        """All prompts stored so far are never found again; what nothing references is discarded, the rest later."""
        for node in islice(self.tree, self.history.config.max_records):
            if node.has_data:
                self.history.record_node(node, node.covers, self._now(), MissReason.FLUSHED)
        self.retired += self.tree.retire_roots()
        self.free_retired()

    def free_retired(self) -> None:
        """Discards the copies of retired prompts that nothing references any more."""
        for root in self.retired:
            for node in reversed(list(self.tree.below(root))):
                if not node.ref_count:
                    for tier in self.pools:
                        if node.copies[tier] is not None:
                            self.free(node, tier)
                    if not node.children:
                        self.tree.remove_leaf(node)
            self.tree.remove_root_if_empty(root)
        self.retired = [root for root in self.retired if self.tree.roots.get(root) is root]

    def clear(self) -> None:
        """Drops all copies, and the unreferenced nodes, whose links to each other form reference cycles.

        Copies in persistent pools stay where they are.
        """
        for node in reversed(list(self.tree)):
            for tier, pool in self.pools.items():
                if node.copies[tier] is not None:
                    payload = self.detach(node, tier)
                    if not pool.persistent:
                        pool.discard(payload)
            node.covers = node.length
            if not (node.children or node.ref_count):
                self.tree.remove_leaf(node)
        for root in list(self.tree.roots.values()):
            self.tree.remove_root_if_empty(root)

    def check(self, referenced: Iterable[Node]) -> None:
        """Raises AssertionError unless references, copies and counts agree; `referenced`: for each handle, its node."""
        ref_count: dict[Node, int] = {}
        nodes, roots = list(self.tree), list(self.tree.roots.values())
        for end in [*referenced, *(node for node in nodes if node.in_transfer)]:
            for node in (*end.path(), end.root):
                ref_count[node] = ref_count.get(node, 0) + 1
        assert ref_count.keys() <= {*nodes, *roots}, "what is referenced is in the tree"
        for root in roots:
            assert root.ref_count == ref_count.get(root, 0), "a root counts the references in its tree"
            assert root.children or root.ref_count, "empty roots are removed"
        for node in nodes:
            assert node.ref_count == ref_count.get(node, 0), "references are handles and transfers in progress"
            assert node.has_data or node.children or node.ref_count, "what nothing needs is not in the tree"
            assert node.has_data or node.covers == node.length, "no copies cover the span alone"
            ends = {node.start, *(each.start for each in node.path())}
            assert node.covers >= node.length and node.end - node.covers in ends, "copies begin where a span does"
            for tier in TIERS:
                cached = [
                    child.copies[tier] is not None or child.cached_children[tier] > 0
                    for child in node.children.values()
                ]
                assert node.cached_children[tier] == sum(cached), "children with copies are counted"
                payload = node.copies[tier]
                assert payload is None or payload.tokens == node.covers, "copies are of the tokens they cover"
                assert not (node.ref_count and node.queue_entries[tier]), "referenced nodes are not queued"
        for queue in self.queues.values():
            queue.check(nodes)


def _split(payload: KVPayload, at: int) -> tuple[KVPayload, KVPayload] | None:
    """The halves of a payload; None if there is no memory for them, as the data may have to be copied."""
    try:
        return payload.split(at)
    except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
        logger.warning("a payload of %d tokens is not split: %r", payload.tokens, error)
        return None


def _join(first: KVPayload, second: KVPayload) -> KVPayload | None:
    """Two payloads as one; None if they cannot be joined, or there is no memory for it."""
    try:
        return first.join(second)
    except (RuntimeError, MemoryError) as error:
        logger.warning("payloads of %d and %d tokens are not joined: %r", first.tokens, second.tokens, error)
        return None


def _is_boundary(node: Node) -> bool:
    """Whether a copy below `node` covers its span and begins where that begins: the parent must then stay separate."""
    pending = list(node.children.values())
    while pending:
        each = pending.pop()
        if each.has_data and each.end - each.covers == node.start:
            return True
        pending += each.children.values()
    return False


def _on_device(node: Node, begin: Node) -> bool:
    """Whether the device holds the KV of the prompt that ends at `node`, as far as it is below `begin`."""
    chain = node.chain()
    return chain is not None and all(each.copies[Tier.DEVICE] is not None for each in chain if each.end > begin.end)
