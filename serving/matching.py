"""What the tree has of a prompt."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from .node import Node, Tier
from .pages import TOKEN_BYTES
from .residency import Residency
from .tree import PrefixTree


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


def node_at(residency: Residency, key: bytes, begin: Node) -> Node:
    """The node that ends where `key` does, at or below `begin`; made, and without data, if there is none."""
    tree = residency.tree
    path, part = tree.walk(key, begin)
    node = path[-1] if path else begin
    if part:
        node = residency.split(tree.next_child(node, key), part)
    at = node.end * TOKEN_BYTES
    return tree.add_leaf(node, key[at:]) if at < len(key) else node
