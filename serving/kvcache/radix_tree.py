"""The radix tree of cached prompts: a path from a root spells a prompt, a node is a span of whole pages.

A prompt is encoded as one `bytes` object of little-endian int32 ids. Slices of it are the keys of children, and
`bytes.startswith` compares whole spans, so no operation loops over single tokens. The tree reads which tiers hold a
node's KV, but never allocates, frees or moves it: that is `tier_storage`'s.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from .agent_index import Agent, AgentGroup, AgentIndex
from .base import TIERS, KVPayload, Link, PromptKey, Status, Tier

TOKEN = np.dtype("<i4")
TOKEN_BYTES = TOKEN.itemsize


class Pages(bytes):
    """Whole pages of encoded token ids; `encode` returns them unchanged, so repeated look-ups encode once."""


def encode(token_ids: Sequence[int] | np.ndarray | Any, page_size: int) -> bytes:
    """Encodes the whole pages of `token_ids`; the tokens of an unfinished last page are left out.

    Args:
        token_ids: one row of integers in [0, 2^31): a list, an array, or a tensor in CPU memory. `Pages` of this page
            size are returned as they are.
        page_size: tokens a page.

    Raises:
        ValueError: other shapes or numbers.
    """
    if isinstance(token_ids, Pages):
        return token_ids
    ids = _checked_ids(token_ids)
    return ids[: len(ids) - len(ids) % page_size].astype(TOKEN, copy=False).tobytes()


def read_token_ids(token_ids: Sequence[int] | np.ndarray | Any) -> np.ndarray:
    """A read-only copy of `token_ids`, int32 `(tokens,)`.

    Raises:
        ValueError: anything but one row of integers in [0, 2^31); booleans are no integers here.
    """
    ids = np.array(_checked_ids(token_ids), TOKEN)
    ids.flags.writeable = False
    return ids


def _checked_ids(token_ids: Any) -> np.ndarray:
    """One row of integers in [0, 2^31), of any integer type; may share memory with `token_ids`."""
    if isinstance(token_ids, list | tuple):
        kinds = set(map(type, token_ids))
        wrong = next((kind for kind in kinds if kind is bool or not issubclass(kind, (int, np.integer))), None)
        if wrong is not None:
            raise ValueError(f"got a row with a {wrong.__name__} as token ids; accepted: one row of integers")
        try:
            ids = np.frombuffer(array("i", token_ids), np.intc)  # twice as fast as numpy with a list
        except OverflowError:
            ids = np.asarray(token_ids)
    else:
        try:
            ids = np.asarray(token_ids)
        except (TypeError, ValueError, RuntimeError):  # torch: a tensor on another device, or with a gradient
            kind = type(token_ids).__name__
            raise ValueError(f"got a {kind} as token ids; accepted: one row of integers in CPU memory") from None
    if ids.ndim == 1 and ids.size == 0:
        return np.zeros(0, TOKEN)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"got token ids of shape {ids.shape} and type {ids.dtype}; accepted: one row of integers")
    if int(ids.min()) < 0 or int(ids.max()) >= 2**31:
        raise ValueError(f"got token ids from {ids.min()} to {ids.max()}; accepted: 0 to {2**31 - 1}")
    return ids


def common_pages(left: bytes, right: bytes, at: int, page_bytes: int) -> int:
    """The number of whole pages at the beginning of `left` that equal those of `right` from byte `at` on."""
    count = min(len(left), len(right) - at) // page_bytes
    shape = (count, page_bytes)
    a = np.frombuffer(left, np.uint8, count * page_bytes).reshape(shape)
    b = np.frombuffer(right, np.uint8, count * page_bytes, at).reshape(shape)
    differing = np.flatnonzero((a != b).any(1))
    return int(differing[0]) if len(differing) else count


def hash_pages(pages: bytes, page_bytes: int, before: int = 0) -> list[int]:
    """For each page, the hash of everything up to its end."""
    hashes = []
    for at in range(0, len(pages), page_bytes):
        before = hash((before, pages[at : at + page_bytes]))
        hashes.append(before)
    return hashes


class Node:
    """A span of a prompt, and the KV that ends where the span ends.

    `TierStorage` owns `copies`, `allocated`, `ref_count` and `cached_children`, `TransferManager` the transfer, and
    `PrefixTree` the links between nodes: each is written by its owner alone. `copies[t]` belongs to the pool of tier t;
    whoever reads it holds a reference meanwhile.

    Attributes:
        span: the token ids (see `encode`) of [start, end), the prompt between the parent's end and this node's.
        covers: tokens [end - covers, end) that the copies hold, the same in every tier: the span, or also the spans of
            ancestors where the payload could not be split (yet). The span's length if there are no copies.
        ref_count: handles and transfers that end at this node or below; of a root, those in its whole tree. A node is
            evicted only at 0.
        copies: for each tier, the payload or None. allocated: the bytes that its pool counts for it.
        cached_children: for each tier, the children that have a copy in it or a descendant with one.
        transfer_id, transfer_link: of the node's transfer in progress, of which there is at most one; 0 and None.
        group: the agents whose fixed prompts the span belongs to. root: the one at which its path begins.
        last_used: seconds on the cache's clock. hits: how often the node was found.
        queue_entries: for each tier, the number of the node's valid entry in the `EvictionQueue`; 0: none.
    """

    __slots__ = (
        "_chain_hash", "_checksum", "allocated", "cached_children", "children", "copies", "covers", "end", "group",
        "hits", "last_used", "parent", "queue_entries", "ref_count", "root", "span", "start", "transfer_id",
        "transfer_link",
    )  # fmt: skip

    def __init__(self, parent: Node | None, span: bytes, start: int, end: int, group: AgentGroup) -> None:
        self.parent = parent
        if parent is not None:
            self.root: RootNode = parent.root
        self.span = span
        self.start, self.end = start, end
        self.covers = end - start
        self.children: dict[bytes, Node] = {}
        self.ref_count = 0
        self.copies: list[KVPayload | None] = [None, None, None]
        self.allocated = [0, 0, 0]
        self.cached_children = [0, 0, 0]
        self.queue_entries = [0, 0, 0]
        self.transfer_id = 0
        self.transfer_link: Link | None = None
        self.group = group
        self.last_used = 0.0
        self.hits = 0
        self._chain_hash: int | None = None
        self._checksum: int | None = None

    def __repr__(self) -> str:
        return f"Node([{self.start}, {self.end}), {self.status.value}, ref_count={self.ref_count})"

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def has_data(self) -> bool:
        first, second, third = self.copies
        return first is not None or second is not None or third is not None

    @property
    def is_replicated(self) -> bool:
        """Whether more than one tier has a copy."""
        first, second, third = self.copies
        return (first is not None) + (second is not None) + (third is not None) > 1

    @property
    def fixed(self) -> bool:
        """Whether it belongs to some agent's fixed prompt."""
        return bool(self.group.agents)

    @property
    def nbytes(self) -> int:
        """Bytes of its KV in the fastest tier that has a copy; 0 if none has."""
        for copy in self.copies:
            if copy is not None:
                return copy.nbytes
        return 0

    @property
    def fastest_tier(self) -> Tier | None:
        for tier in TIERS:
            if self.copies[tier] is not None:
                return tier
        return None

    @property
    def in_transfer(self) -> bool:
        return self.transfer_id != 0

    def loading_into(self, tier: Tier) -> bool:
        return self.transfer_link is not None and self.transfer_link[1] is tier

    def on_or_loading_into(self, tier: Tier) -> bool:
        """Whether `tier` has a copy, or will when the transfer in progress succeeds."""
        return self.copies[tier] is not None or self.loading_into(tier)

    @property
    def status(self) -> Status:
        if self.transfer_link is not None:
            source, target = self.transfer_link
            return Status.LOADING if target < source else Status.OFFLOADING
        for tier, status in zip(TIERS, (Status.GPU, Status.CPU, Status.DISK), strict=True):
            if self.copies[tier] is not None:
                return status
        return Status.ABSENT

    @property
    def can_split(self) -> bool:
        """Whether, after a split, the upper part would get its share of the data."""
        if self.in_transfer or self.covers != self.length:
            return False
        copies = [copy for copy in self.copies if copy is not None]
        return bool(copies) and all(copy.divisible for copy in copies)

    def evictable(self, tier: Tier) -> bool:
        """Whether it is unreferenced and has a copy in `tier`, and no descendant has one there."""
        return self.copies[tier] is not None and self.ref_count == 0 and self.cached_children[tier] == 0

    def path(self, above: Node | None = None) -> Iterator[Node]:
        """This node and its ancestors without the root, upwards; ends before `above` if that is one of them."""
        node = self
        while node.parent is not None and node is not above:
            yield node
            node = node.parent

    def chain(self) -> list[Node] | None:
        """The nodes whose copies together are the KV of the prompt up to `end`, in order; None if a part is missing."""
        node, chain = self, []
        while node.parent is not None:
            if not node.has_data:
                return None
            chain.append(node)
            begin = node.end - node.covers
            while node.parent is not None and node.end > begin:
                node = node.parent
            assert node.end == begin, "copies begin where a span does"
        chain.reverse()
        return chain

    def chain_hash(self, page_bytes: int) -> int:
        """A hash of all pages up to `end`, equal to the last of `hash_pages` of the prompt; unchanged by splits."""
        if self._chain_hash is None:
            before = 0 if self.parent is None else self.parent.chain_hash(page_bytes)
            self._chain_hash = hash_pages(self.span, page_bytes, before)[-1] if self.span else before
        return self._chain_hash

    def checksum(self) -> int:
        """The CRC-32 of all tokens up to `end`, unchanged by splits; 0 for a root."""
        if self._checksum is not None:
            return self._checksum
        unknown: list[Node] = []
        node: Node | None = self
        while node is not None and node._checksum is None:
            unknown.append(node)
            node = node.parent
        value = 0 if node is None or node._checksum is None else node._checksum
        for each in reversed(unknown):
            value = each._checksum = crc32(each.span, value)
        return value


class RootNode(Node):
    """The node above the prompts of a namespace: no span and no data. It counts the references in its tree.

    Attributes:
        namespace: that its prompts are found under.
        retired: nobody finds its prompts any more (`PrefixTree.retire_roots`).
    """

    __slots__ = ("namespace", "retired")

    def __init__(self, namespace: Hashable, group: AgentGroup) -> None:
        super().__init__(None, b"", 0, 0, group)
        self.namespace, self.retired = namespace, False

    @property
    def root(self) -> RootNode:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self  # not an attribute: that would be a reference cycle


@dataclass(frozen=True)
class Match:
    """The longest cached prefix of a prompt.

    Attributes:
        length: tokens, whole pages.
        nodes: the nodes that together hold its KV, in order.
        part: if not 0, only the first `part` pages of the last node belong to the prefix.
    """

    length: int
    nodes: list[Node]
    part: int = 0


class PrefixTree:
    """Roots by namespace; below a root, every path spells a prompt.

    A namespace separates KV that must not be shared although the tokens agree: adapters, compression settings. It is
    hashable; after a restart, prompts are found again whose namespace is None, a str, a number, or a tuple of these.
    Splitting keeps the given node as the lower part, so a reference to a node keeps meaning the prompt that ends there.

    Not locked: `TieredCache` calls it under its lock.

    Args:
        max_moved: agents that `moved_agents` remembers at most, the latest.
    Attributes:
        roots: by namespace, those with nodes or references; they have no span.
        prompt_ends: the last node of each agent's fixed prompt; all nodes on its path are in a group of the agent.
        moved_agents: agents whose fixed prompt ends at another node since the reader of this queue last emptied it.

    Raises:
        ValueError: a page size below 1.
    """

    def __init__(self, page_size: int, agent_index: AgentIndex, max_moved: int = 1024) -> None:
        if page_size < 1:
            raise ValueError(f"got page_size={page_size}; accepted: 1 or more tokens")
        self.page_size, self.page_bytes = page_size, page_size * TOKEN_BYTES
        self.agent_index = agent_index
        self.roots: dict[Hashable, RootNode] = {}
        self.prompt_ends: dict[Agent, Node] = {}
        self.moved_agents: deque[Agent] = deque(maxlen=max_moved)
        self.size = 0

    def root(self, namespace: Hashable = None) -> RootNode:
        """The root of `namespace`, created if there is none; the caller references it or adds a child."""
        if namespace not in self.roots:
            self.agent_index.unowned.num_nodes += 1
            self.roots[namespace] = RootNode(namespace, self.agent_index.unowned)
        return self.roots[namespace]

    def remove_root_if_empty(self, root: Node) -> None:
        """Removes a root without children and references; clients may use a namespace for a single request."""
        if root.children or root.ref_count or not isinstance(root, RootNode):
            return
        if self.roots.get(root.namespace) is root:
            del self.roots[root.namespace]
            self.agent_index.unowned.num_nodes -= 1

    def _new_node(self, parent: Node, span: bytes, start: int) -> Node:
        unowned = self.agent_index.unowned
        unowned.num_nodes += 1
        return Node(parent, span, start, start + len(span) // TOKEN_BYTES, unowned)

    # Look-ups ---------------------------------------------------------------------------------------------------

    def walk(self, key: bytes, begin: Node) -> tuple[list[Node], int]:
        """Follows `key` (see `encode`), which spells the path to `begin`, down from there.

        Returns:
            The nodes below `begin` whose whole spans it spells, and the number of pages that it shares with one further
            node.
        """
        node, at, page_bytes, path = begin, begin.end * TOKEN_BYTES, self.page_bytes, []
        while at < len(key):
            child = node.children.get(key[at : at + page_bytes])
            if child is None:
                return path, 0
            if not key.startswith(child.span, at):
                return path, common_pages(child.span, key, at, page_bytes)
            path.append(child)
            at += len(child.span)
            node = child
        return path, 0

    def find(self, key: bytes, namespace: Hashable = None) -> Match:
        """The longest prefix of the prompt `key` whose KV the tiers hold without a gap; changes nothing."""
        root = self.roots.get(namespace)
        if root is None:
            return Match(0, [])
        path, part = self.walk(key, root)
        ends, last = {0}, None
        for node in path:
            if node.has_data and node.end - node.covers in ends:
                ends.add(node.end)
                last = node
        chain = [] if last is None else last.chain()
        assert chain is not None, "every node on the way was found usable"
        end = path[-1].end if path else 0
        if part and end in ends:
            node = self.next_child(path[-1] if path else root, key)
            if node.can_split:
                return Match(end + part * self.page_size, [*chain, node], part)
        return Match(last.end if last else 0, chain)

    def spells(self, key: bytes, node: Node) -> bool:
        """Whether `key` begins with the prompt that ends at `node`."""
        return all(key.startswith(each.span, each.start * TOKEN_BYTES) for each in node.path())

    def prompt_of(self, node: Node) -> PromptKey:
        """The prompt that ends at `node`."""
        spans = [each.span for each in node.path()]
        agents = tuple(agent for agent in node.group.agents if self.prompt_ends.get(agent) is node)
        return PromptKey(node.root.namespace, b"".join(reversed(spans)), agents)

    def next_child(self, node: Node, key: bytes) -> Node:
        at = node.end * TOKEN_BYTES
        return node.children[key[at : at + self.page_bytes]]

    def __iter__(self) -> Iterator[Node]:
        """All nodes without the roots, parents before children."""
        return self.below(*self.roots.values())

    @staticmethod
    def below(*nodes: Node) -> Iterator[Node]:
        """The descendants of `nodes`, parents before children."""
        pending = [child for node in nodes for child in node.children.values()]
        while pending:
            node = pending.pop()
            yield node
            pending += node.children.values()

    # Structure --------------------------------------------------------------------------------------------------

    def split(self, node: Node, pages: int) -> Node:
        """Splits the span of `node` after `pages` pages.

        Returns:
            The new node above, which has the first part of the span, the same references and agents, and no data:
            `node` keeps its copies, and its `covers` says that they reach over both.
        """
        parent, cut = node.parent, pages * self.page_bytes
        assert parent is not None and 0 < cut < len(node.span), "a cut lies within a span"
        head = self._new_node(parent, node.span[:cut], node.start)
        self.agent_index.move(head, node.group)
        head.ref_count, head.last_used, head.hits = node.ref_count, node.last_used, node.hits
        head.cached_children = [
            int(node.copies[tier] is not None or node.cached_children[tier] > 0) for tier in range(3)
        ]
        parent.children[head.span[: self.page_bytes]] = head
        self._shorten(node, head, cut)
        self.size += 1
        return head

    def _shorten(self, node: Node, head: Node, cut: int) -> None:
        whole = node.length
        node.parent, node.span, node.start = head, node.span[cut:], head.end
        head.children[node.span[: self.page_bytes]] = node
        if not node.has_data and not node.in_transfer:
            node.covers -= whole - node.length

    def add_leaf(self, parent: Node, span: bytes) -> Node:
        """A new node for `span` below `parent`, which has no child that begins with the same page."""
        first = span[: self.page_bytes]
        assert first not in parent.children, "children differ in their first page"
        leaf = parent.children[first] = self._new_node(parent, span, parent.end)
        self.size += 1
        return leaf

    def extend_leaf(self, node: Node, span: bytes) -> None:
        """Appends `span` to a node without children; its copies have been extended, too."""
        assert not node.children and not node.fixed, "nobody needs the end of the node"
        node.span += span
        node.end += len(span) // TOKEN_BYTES
        node.covers += len(span) // TOKEN_BYTES
        node._chain_hash = node._checksum = None

    def remove_leaf(self, node: Node) -> Node:
        """Removes a node without children, data and references; returns its parent."""
        parent = node.parent
        assert parent is not None and not node.children and not node.has_data and not node.ref_count, "nothing needs it"
        del parent.children[node.span[: self.page_bytes]]
        for agent in node.group.agents:
            if self.prompt_ends.get(agent) is node:  # the rest of the fixed prompt remains the agent's
                self._set_end(agent, parent)
        self.agent_index.move(node, self.agent_index.unowned)
        self.agent_index.unowned.num_nodes -= 1
        self.size -= 1
        return parent

    def merge(self, upper: Node) -> Node:
        """The only child of `upper` takes over its span, which undoes a split. Returns the child.

        `upper` has no copies and the same agents as its child; its references are all of those below it.
        """
        (lower,) = upper.children.values()
        parent = upper.parent
        assert parent is not None and not upper.has_data, "the upper node has no data"
        assert upper.ref_count == lower.ref_count, "no reference ends at the upper node"
        lower.span, lower.start, lower.parent = upper.span + lower.span, upper.start, parent
        lower.last_used, lower.hits = max(lower.last_used, upper.last_used), max(lower.hits, upper.hits)
        if not lower.has_data:
            lower.covers = lower.length
        parent.children[lower.span[: self.page_bytes]] = lower
        upper.children.clear()  # whoever still has the node sees that it has left the tree
        self.agent_index.move(upper, self.agent_index.unowned)
        self.agent_index.unowned.num_nodes -= 1
        self.size -= 1
        return lower

    def retire_roots(self) -> list[RootNode]:
        """No prompt stored so far is found any more, nor is it any agent's; nodes and copies stay.

        Returns:
            The roots of these prompts, which stay in `roots` as long as others, each under itself.
        """
        for agent in list(self.prompt_ends):
            self.set_agent_prompt(agent, None)
        roots = [root for root in self.roots.values() if not root.retired]
        for root in roots:
            del self.roots[root.namespace]
            root.namespace, root.retired = root, True
            self.roots[root] = root
        return roots

    # Agents -----------------------------------------------------------------------------------------------------

    def set_agent_prompt(self, agent: Agent, node: Node | None) -> list[Node]:
        """The fixed prompt of `agent` now ends at `node` (None: it has none).

        Returns:
            The nodes whose groups have changed.
        """
        path = set() if node is None else set(node.path())
        old = self.prompt_ends.get(agent)
        left = [] if old is None else [each for each in old.path() if each not in path]
        joined = [each for each in path if agent not in each.group.agents]
        for each in left:
            self.agent_index.remove(each, agent)
        for each in joined:
            self.agent_index.add(each, agent)
        self._set_end(agent, node)
        return left + joined

    def _set_end(self, agent: Agent, node: Node | None) -> None:
        self.moved_agents.append(agent)
        if node is None or node.parent is None:
            self.prompt_ends.pop(agent, None)
        else:
            self.prompt_ends[agent] = node

    def check(self) -> None:
        """Raises AssertionError unless spans, children, agents and counts agree."""
        nodes = list(self)
        assert self.size == len(nodes), "nodes are counted"
        assert all(root.namespace == name for name, root in self.roots.items()), "roots are found both ways"
        for node in nodes:
            assert node.parent is not None
            assert node.parent.children[node.span[: self.page_bytes]] is node, "a child is found by its first page"
            assert node.start == node.parent.end, "spans follow each other"
            assert node.length > 0 and node.length % self.page_size == 0, "spans are whole pages"
            assert len(node.span) == node.length * TOKEN_BYTES, "a span has one id a token"
            below = sum(child.ref_count for child in node.children.values())
            assert node.ref_count >= below, "references below are references above"
        owned = {(agent, each) for agent, end in self.prompt_ends.items() for each in end.path()}
        assert owned == {(agent, node) for node in nodes for agent in node.group.agents}, (
            "the nodes of an agent are the path to the end of its fixed prompt"
        )
        self.agent_index.check([*nodes, *self.roots.values()])
