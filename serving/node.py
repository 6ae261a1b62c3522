"""A node of the prefix tree: a span of whole pages and what each tier holds of it."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .copies import CopyJob
    from .groups import Group
    from .payload import Payload


class Tier(IntEnum):
    """Where a copy lies; the smaller, the faster."""

    DEVICE = 0
    HOST = 1
    DISK = 2


TIERS = tuple(Tier)


class Status(Enum):
    """What a scheduler sees of a node."""

    GPU = "gpu"  # ready to be used
    CPU = "cpu"
    DISK = "disk"
    LOADING = "loading"  # a copy into a faster tier is under way
    OFFLOADING = "offloading"  # a copy into a slower tier is under way; what the faster one holds can still be used
    ABSENT = "absent"  # no tier holds it


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
        "span",
        "stamps",
        "start",
        "users",
    )

    def __init__(self, parent: Node | None, span: bytes, start: int, end: int, group: Group) -> None:
        self.parent = parent
        self.span = span
        self.start, self.end = start, end
        self.covers = end - start
        self.children: dict[bytes, Node] = {}
        self.users = 0
        self.copies: list[Payload | None] = [None, None, None]
        self.held = [0, 0, 0]
        self.below = [0, 0, 0]
        self.stamps = [0, 0, 0]
        self.flight: CopyJob | None = None
        self.group = group
        self.last_used = 0.0
        self.hits = 0
        self._chain_hash: int | None = None

    def __repr__(self) -> str:
        return f"Node([{self.start}, {self.end}), {self.status.value}, users={self.users})"

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
        return self.copies[tier] is not None and self.users == 0 and self.below[tier] == 0

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
