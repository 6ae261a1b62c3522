"""Token ids as bytes, a page at a time: what the prefix tree slices, hashes and compares.

A prompt becomes one `bytes` object of little-endian int32 ids. Slices of it are the keys of children and
`bytes.startswith` compares whole spans, so nothing in the tree looks at single tokens.

Nodes by the agents that need them, so that a new value of an agent touches groups and not nodes.

A node of the prefix tree: a span of whole pages and what each tier holds of it.

The radix tree: which prompts are known, as spans of whole pages. It knows nothing of tiers or bytes.

What the tree has of a prompt.
"""

from __future__ import annotations

import heapq
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import TIERS, Status, Tier

if TYPE_CHECKING:
    from .base import KVPayload
    from .transfer_queue import TransferJob


TOKEN = np.dtype("<i4")
TOKEN_BYTES = TOKEN.itemsize


class Pages(bytes):
    """Whole pages that have been encoded already: what is asked for several times is encoded once."""


def encode(token_ids: Sequence[int] | np.ndarray | Any, page_size: int) -> bytes:
    """The whole pages of `token_ids`; tokens of an unfinished last page are left out.

    Args:
        token_ids: one-dimensional integers in [0, 2^31): a list, an array, or a tensor in CPU memory. `Pages` of this
            page size are returned as they are.
        page_size: tokens a page.
    Raises:
        ValueError: other shapes, other numbers.
    """
    if isinstance(token_ids, Pages):
        return token_ids
    ids = _as_array(token_ids)
    if ids.size == 0:
        return b""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"got token ids of shape {ids.shape} and type {ids.dtype}; accepted: one row of integers")
    whole = len(ids) - len(ids) % page_size
    if int(ids.min()) < 0 or int(ids.max()) >= 2**31:
        raise ValueError(f"got token ids from {ids.min()} to {ids.max()}; accepted: 0 to {2**31 - 1}")
    return ids[:whole].astype(TOKEN, copy=False).tobytes()


def _as_array(token_ids: Sequence[int] | np.ndarray | Any) -> np.ndarray:
    if isinstance(token_ids, list | tuple) and token_ids:
        try:
            return np.frombuffer(array("i", token_ids), np.intc)  # twice as fast as numpy with a list
        except (TypeError, OverflowError):
            pass  # said better below
    return np.asarray(token_ids)


def common_pages(left: bytes, right: bytes, at: int, page_bytes: int) -> int:
    """How many whole pages at the beginning of `left` equal those of `right` from byte `at` on."""
    count = min(len(left), len(right) - at) // page_bytes
    shape = (count, page_bytes)
    a = np.frombuffer(left, np.uint8, count * page_bytes).reshape(shape)
    b = np.frombuffer(right, np.uint8, count * page_bytes, at).reshape(shape)
    differing = np.flatnonzero((a != b).any(1))
    return int(differing[0]) if len(differing) else count


Agent = Hashable


class AgentGroup:
    """The nodes of one set of agents; its value is that of the agent that needs them most.

    Attributes:
        agents: agent -> number of the valid entry of its value in the heap.
        nodes: how many nodes are in it.
    """

    __slots__ = ("_values", "agents", "nodes")

    def __init__(self) -> None:
        self.agents: dict[Agent, int] = {}
        self.nodes = 0
        self._values: list[tuple[float, int, Agent]] = []

    def set(self, agent: Agent, value: float, number: int) -> None:
        self.agents[agent] = number
        heapq.heappush(self._values, (-value, number, agent))
        if len(self._values) > 4 * len(self.agents) + 64:  # most entries are stale
            self._values = [entry for entry in self._values if self.agents.get(entry[2]) == entry[1]]
            heapq.heapify(self._values)

    @property
    def value(self) -> float:
        """The largest value of its agents; a shared node is worth what it is worth to the first who comes back."""
        values = self._values
        while self.agents.get(values[0][2]) != values[0][1]:
            heapq.heappop(values)  # replaced by a newer value of the agent
        return -values[0][0]


class AgentIndex:
    """All groups; `nobody` holds the nodes that are in no agent's fixed prompt, and has no value.

    Nodes of one agent share a group. A node that a second agent comes to share gets a group of its own, which further
    agents join in place.

    Args:
        value: of an agent, larger = keep; read when an agent is first named and at `changed`.
    """

    def __init__(self, value: Callable[[Agent], float]) -> None:
        self.nobody = AgentGroup()
        self._value = value
        self._values: dict[Agent, float] = {}
        self._single: dict[Agent, AgentGroup] = {}
        self._members: dict[Agent, set[AgentGroup]] = {}
        self._numbers = count(1)

    @property
    def agents(self) -> Iterable[Agent]:
        """Those with at least one node."""
        return self._members.keys()

    def move(self, node: Node, group: AgentGroup) -> None:
        """Puts `node` into `group`; the group it leaves is forgotten if that was its last node."""
        old = node.group
        if old is group:
            return
        node.group = group
        group.nodes += 1
        old.nodes -= 1
        if old.nodes == 0 and old is not self.nobody:
            self._forget(old)

    def _forget(self, group: AgentGroup) -> None:
        for agent in group.agents:
            members = self._members[agent]
            members.discard(group)
            if self._single.get(agent) is group:
                del self._single[agent]
            if not members:
                del self._members[agent], self._values[agent]

    def add(self, node: Node, agent: Agent) -> None:
        """`node` is needed by `agent`, too."""
        group = node.group
        if agent in group.agents:
            return
        if len(group.agents) > 1 and group.nodes == 1:
            self._join(group, agent)
            return
        self.move(node, self._group((*group.agents, agent)))

    def remove(self, node: Node, agent: Agent) -> None:
        """`node` is not needed by `agent` any more."""
        group = node.group
        if agent not in group.agents:
            return
        if len(group.agents) > 2 and group.nodes == 1:
            del group.agents[agent]
            members = self._members[agent]
            members.discard(group)
            if not members:
                del self._members[agent], self._values[agent]
            return
        self.move(node, self._group(tuple(other for other in group.agents if other != agent)))

    def _group(self, agents: tuple[Agent, ...]) -> AgentGroup:
        if not agents:
            return self.nobody
        if len(agents) == 1 and agents[0] in self._single:
            return self._single[agents[0]]
        group = AgentGroup()
        for agent in agents:
            self._join(group, agent)
        if len(agents) == 1:
            self._single[agents[0]] = group
        return group

    def _join(self, group: AgentGroup, agent: Agent) -> None:
        if agent not in self._values:
            self._values[agent] = self._value(agent)
        self._members.setdefault(agent, set()).add(group)
        group.set(agent, self._values[agent], next(self._numbers))

    def changed(self, agents: Iterable[Agent] | None = None) -> list[AgentGroup]:
        """Reads the values of these agents (None: all) anew; returns the groups of those that have another."""
        groups = []
        for agent in tuple(self._values) if agents is None else agents:
            if agent not in self._values:
                continue
            value = self._value(agent)
            if value == self._values[agent]:
                continue
            self._values[agent] = value
            for group in self._members[agent]:
                group.set(agent, value, next(self._numbers))
                groups.append(group)
        return groups

    def check(self, nodes: Iterable[Node]) -> None:
        """Raises AssertionError unless nodes, groups and agents agree; `nodes` are all there are, roots included."""
        counts: dict[AgentGroup, int] = {}
        for node in nodes:
            counts[node.group] = counts.get(node.group, 0) + 1
        assert all(group.nodes == number for group, number in counts.items()), "the nodes of a group are counted"
        for agent, members in self._members.items():
            assert members, "an agent without nodes is forgotten"
            assert all(group in counts and agent in group.agents for group in members), "groups have nodes"
        for group in counts:
            assert all(group in self._members[agent] for agent in group.agents), "an agent's groups are known"
            if group.agents:
                assert group.value == max(self._values[agent] for agent in group.agents), "the largest value counts"


class Node:
    """One span, and the KV that ends where it ends.

    `copies[t]` belongs to the pool of tier t, which counts its bytes; who reads it keeps the node locked meanwhile.

    Attributes:
        span: the token ids (`pages.encode`) of [start, end), the part of the prompt between the parent's end and this
            node's.
        covers: the copies hold KV of the tokens [end - covers, end): all alike, the span or, where the payload cannot
            be cut (yet), the spans of some ancestors as well. It is the span's length where there are no copies.
        users: leases and copies under way at this node or below. Nothing is evicted that has a user.
        below: for each tier, how many children have a copy in it, or a descendant that has.
        held: bytes each tier counts for its copy.
        flight: the one copy of this node that is under way.
        group: the agents whose fixed prompts the span belongs to.
        last_used: seconds on the clock of the tiers. hits: how often it was found.
        stamps: for each tier, the node's valid entry among the candidates for eviction, or 0.
    """

    __slots__ = (
        "_chain_hash",
        "below",
        "children",
        "copies",
        "covers",
        "end",
        "flight",
        "group",
        "held",
        "hits",
        "last_used",
        "parent",
        "ref_count",
        "span",
        "stamps",
        "start",
    )

    def __init__(self, parent: Node | None, span: bytes, start: int, end: int, group: AgentGroup) -> None:
        self.parent = parent
        self.span = span
        self.start, self.end = start, end
        self.covers = end - start
        self.children: dict[bytes, Node] = {}
        self.ref_count = 0
        self.copies: list[KVPayload | None] = [None, None, None]
        self.held = [0, 0, 0]
        self.below = [0, 0, 0]
        self.stamps = [0, 0, 0]
        self.flight: TransferJob | None = None
        self.group = group
        self.last_used = 0.0
        self.hits = 0
        self._chain_hash: int | None = None

    def __repr__(self) -> str:
        return f"Node([{self.start}, {self.end}), {self.status.value}, users={self.ref_count})"

    @property
    def length(self) -> int:
        """Tokens of the span."""
        return self.end - self.start

    @property
    def has_data(self) -> bool:
        first, second, third = self.copies
        return first is not None or second is not None or third is not None

    @property
    def has_spare(self) -> bool:
        """More than one tier has it."""
        return sum(copy is not None for copy in self.copies) > 1

    @property
    def fixed(self) -> bool:
        """It is part of some agent's fixed prompt."""
        return bool(self.group.agents)

    @property
    def nbytes(self) -> int:
        """Bytes of its KV; 0 if no tier has any."""
        for copy in self.copies:
            if copy is not None:
                return copy.nbytes
        return 0

    @property
    def status(self) -> Status:
        if self.flight is not None:
            return Status.LOADING if self.flight.target < self.flight.source else Status.OFFLOADING
        for tier, status in zip(TIERS, (Status.GPU, Status.CPU, Status.DISK), strict=True):
            if self.copies[tier] is not None:
                return status
        return Status.ABSENT

    def evictable(self, tier: Tier) -> bool:
        """A leaf among those with a copy in `tier`, and without a user."""
        return self.copies[tier] is not None and self.ref_count == 0 and self.below[tier] == 0

    def path(self, above: Node | None = None) -> Iterator[Node]:
        """This node and its ancestors, without the root; up to and without `above` if that is one of them."""
        node = self
        while node.parent is not None and node is not above:
            yield node
            node = node.parent

    @property
    def root(self) -> Node:
        node = self
        while node.parent is not None:
            node = node.parent
        return node

    def chain(self) -> list[Node] | None:
        """The nodes whose copies together are the KV of the whole prompt up to `end`; None if a part is missing."""
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
        """A hash of all pages up to `end`, equal to `hash_pages` of the prompt; the same after splits."""
        if self._chain_hash is None:
            before = 0 if self.parent is None else self.parent.chain_hash(page_bytes)
            self._chain_hash = hash_pages(self.span, page_bytes, before)[-1] if self.span else before
        return self._chain_hash


def hash_pages(pages: bytes, page_bytes: int, before: int = 0) -> list[int]:
    """At each page the hash of everything up to its end."""
    hashes = []
    for at in range(0, len(pages), page_bytes):
        before = hash((before, pages[at : at + page_bytes]))
        hashes.append(before)
    return hashes


MOVED = 1024  # ends of fixed prompts that are remembered to have moved


class PrefixTree:
    """Roots by namespace; below a root, every path from it spells a prompt.

    A namespace keeps apart what must not be mixed though the tokens are the same: adapters, plans of compression.
    Splitting keeps the given node as the lower part, so whoever holds a node keeps holding the prompt that ends there.

    Args:
        page_size: tokens a page; spans begin and end at multiples of it.
        groups: where a new node's agents are counted.
    Attributes:
        ends: the last node of each agent's fixed prompt; all nodes on the path to it are in a group of the agent.
        moved: agents of which that node is another one, the latest `MOVED` of them, for whoever empties it.
        size: nodes without the roots.
    """

    def __init__(self, page_size: int, groups: AgentIndex) -> None:
        if page_size < 1:
            raise ValueError(f"got page_size={page_size}; accepted: 1 or more tokens")
        self.page_size, self.page_bytes = page_size, page_size * TOKEN_BYTES
        self.groups = groups
        self.roots: dict[Hashable, Node] = {}
        self.ends: dict[Agent, Node] = {}
        self.moved: deque[Agent] = deque(maxlen=MOVED)
        self.size = 0

    def root(self, namespace: Hashable = None) -> Node:
        if namespace not in self.roots:
            self.roots[namespace] = self._node(None, b"", 0)
        return self.roots[namespace]

    def _node(self, parent: Node | None, span: bytes, start: int) -> Node:
        node = Node(parent, span, start, start + len(span) // TOKEN_BYTES, self.groups.nobody)
        self.groups.nobody.nodes += 1
        return node

    def walk(self, key: bytes, begin: Node) -> tuple[list[Node], int]:
        """Follows `key` (`pages.encode`), which spells the path to `begin`, down from there.

        Returns:
            The nodes below `begin` whose whole spans it spells, and how many pages of one further node's span it
            agrees with.
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

    def spells(self, key: bytes, node: Node) -> bool:
        """Whether `key` begins with the prompt that ends at `node`."""
        return all(key.startswith(each.span, each.start * TOKEN_BYTES) for each in node.path())

    def next_child(self, node: Node, key: bytes) -> Node:
        """The child of `node` that `key` continues into."""
        at = node.end * TOKEN_BYTES
        return node.children[key[at : at + self.page_bytes]]

    def split(self, node: Node, pages: int) -> Node:
        """Cuts the span after `pages` pages.

        Returns:
            The new node above, which has the first part of the span, the same users and agents, and no data: `node`
            keeps its copies, and `covers` says that they reach over both.
        """
        parent, cut = node.parent, pages * self.page_bytes
        assert parent is not None and 0 < cut < len(node.span), "a cut lies within a span"
        head = self._node(parent, node.span[:cut], node.start)
        self.groups.move(head, node.group)
        head.ref_count, head.last_used, head.hits = node.ref_count, node.last_used, node.hits
        head.below = [int(node.copies[tier] is not None or node.below[tier] > 0) for tier in range(3)]
        parent.children[head.span[: self.page_bytes]] = head
        self._shorten(node, head, cut)
        self.size += 1
        return head

    def _shorten(self, node: Node, head: Node, cut: int) -> None:
        whole = node.length
        node.parent, node.span, node.start = head, node.span[cut:], head.end
        head.children[node.span[: self.page_bytes]] = node
        if not node.has_data and node.flight is None:
            node.covers -= whole - node.length

    def add_leaf(self, parent: Node, span: bytes) -> Node:
        """A new node for `span` below `parent`, which has no child that begins with the same page."""
        first = span[: self.page_bytes]
        assert first not in parent.children, "children differ in their first page"
        leaf = parent.children[first] = self._node(parent, span, parent.end)
        self.size += 1
        return leaf

    def remove_leaf(self, node: Node) -> Node:
        """Takes a node without children, data and users out of the tree; returns its parent."""
        parent = node.parent
        assert parent is not None and not node.children and not node.has_data and not node.ref_count, "nothing needs it"
        del parent.children[node.span[: self.page_bytes]]
        for agent in node.group.agents:
            if self.ends.get(agent) is node:  # what is left of the fixed prompt stays the agent's
                self._set_end(agent, parent)
        self.groups.move(node, self.groups.nobody)
        self.groups.nobody.nodes -= 1
        self.size -= 1
        return parent

    def merge(self, upper: Node) -> Node:
        """The only child takes its parent's span, which undoes a split. Returns the child.

        `upper` has no users, no copies (any more), and the agents of its child; the child has no users.
        """
        (lower,) = upper.children.values()
        parent = upper.parent
        assert parent is not None and not upper.has_data, "the upper node has no data"
        assert not upper.ref_count and not lower.ref_count, "nothing references either"
        lower.span, lower.start, lower.parent = upper.span + lower.span, upper.start, parent
        lower.last_used, lower.hits = max(lower.last_used, upper.last_used), max(lower.hits, upper.hits)
        if not lower.has_data:
            lower.covers = lower.length
        parent.children[lower.span[: self.page_bytes]] = lower
        self.groups.move(upper, self.groups.nobody)
        self.groups.nobody.nodes -= 1
        self.size -= 1
        return lower

    def tag(self, agent: Agent, node: Node | None) -> list[Node]:
        """The fixed prompt of `agent` ends at `node` now (None: it has none).

        Returns:
            The nodes whose groups have changed.
        """
        path = set() if node is None else set(node.path())
        old = self.ends.get(agent)
        gone = [] if old is None else [each for each in old.path() if each not in path]
        new = [each for each in path if agent not in each.group.agents]
        for each in gone:
            self.groups.remove(each, agent)
        for each in new:
            self.groups.add(each, agent)
        self._set_end(agent, node)
        return gone + new

    def _set_end(self, agent: Agent, node: Node | None) -> None:
        self.moved.append(agent)
        if node is None or node.parent is None:
            self.ends.pop(agent, None)
        else:
            self.ends[agent] = node

    def __iter__(self) -> Iterator[Node]:
        """All nodes without the roots, parents before children."""
        waiting = list(self.roots.values())
        while waiting:
            node = waiting.pop()
            if node.parent is not None:
                yield node
            waiting += node.children.values()

    def check(self) -> None:
        """Raises AssertionError unless spans, children and counts belong together."""
        nodes = list(self)
        assert self.size == len(nodes), "nodes are counted"
        for node in nodes:
            assert node.parent is not None
            assert node.parent.children[node.span[: self.page_bytes]] is node, "a child is found by its first page"
            assert node.start == node.parent.end, "spans follow each other"
            assert node.length > 0 and node.length % self.page_size == 0, "spans are whole pages"
            assert len(node.span) == node.length * TOKEN_BYTES, "a span has one id a token"
            below = sum(child.ref_count for child in node.children.values())
            assert node.ref_count >= below, "references below are references above"
        tagged = {(agent, each) for agent, end in self.ends.items() for each in end.path()}
        assert tagged == {(agent, node) for node in nodes for agent in node.group.agents}, (
            "tags are paths to their ends"
        )
        self.groups.check([*nodes, *self.roots.values()])


@dataclass(frozen=True)
class Match:
    """What the tree has of a prompt.

    Attributes:
        length: tokens of it, whole pages.
        nodes: which together hold their KV, in order; of the last one perhaps only the first `part` pages, if not 0.
    """

    length: int
    nodes: list[Node]
    part: int = 0


def find(tree: PrefixTree, key: bytes, namespace: Hashable = None) -> Match:
    """The longest part of the prompt `key` whose KV some tiers have without a gap; changes nothing."""
    root = tree.root(namespace)
    path, part = tree.walk(key, root)
    ends, last = {0}, None
    for node in path:
        if node.has_data and node.end - node.covers in ends:
            ends.add(node.end)
            last = node
    chain = [] if last is None else last.chain()
    assert chain is not None, "every node on the way was found usable"
    end = path[-1].end if path else 0
    if part and end in ends:
        node = tree.next_child(path[-1] if path else root, key)
        if can_cut(node):
            return Match(end + part * tree.page_size, [*chain, node], part)
    return Match(last.end if last else 0, chain)


def can_cut(node: Node) -> bool:
    """Whether the upper part of `node` would have its share of the data after a split."""
    if node.flight is not None or node.covers != node.length:
        return False
    memory = [copy for tier, copy in enumerate(node.copies) if copy is not None and tier != Tier.DISK]
    return bool(memory) and all(copy.divisible for copy in memory)


def fastest(node: Node) -> Tier | None:
    """The fastest tier that has a copy of `node`."""
    for tier in TIERS:
        if node.copies[tier] is not None:
            return tier
    return None
