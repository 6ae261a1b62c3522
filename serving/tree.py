"""The radix tree: which prompts are known, as spans of whole pages. It knows nothing of tiers or bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator

from .groups import Agent, Groups
from .node import Node
from .pages import TOKEN_BYTES, common_pages

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

    def __init__(self, page_size: int, groups: Groups) -> None:
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
        head.users, head.last_used, head.hits = node.users, node.last_used, node.hits
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
        assert parent is not None and not node.children and not node.has_data and not node.users, "nothing needs it"
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
        assert parent is not None and not upper.has_data and not upper.users and not lower.users, "nothing needs it"
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
            assert node.users >= sum(child.users for child in node.children.values()), "users below are users above"
        tagged = {(agent, each) for agent, end in self.ends.items() for each in end.path()}
        assert tagged == {(agent, node) for node in nodes for agent in node.group.agents}, (
            "tags are paths to their ends"
        )
        self.groups.check([*nodes, *self.roots.values()])
