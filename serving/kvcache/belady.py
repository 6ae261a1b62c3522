"""Belady's policy: the oracle that has read the whole trace."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from .base import Tier
from .eviction_policy import EvictionPolicy, Rank
from .radix_tree import TOKEN_BYTES, Node, encode, hash_pages


class Belady(EvictionPolicy):
    """Evicts the node whose next use is furthest in the future (Belady 1966); optimal for nodes of one size.

    A request of the trace uses every node that lies on its prompt.

    Args:
        prompts: token ids of the requests in the order in which they will be served.
        page_size: of the tree.
    Attributes:
        served: requests served so far. `advance` must be called just before a request's prompt is opened, so that its
            nodes are ranked by their next use after it.
    """

    name = "belady"

    def __init__(self, prompts: Iterable[Sequence[int]], page_size: int) -> None:
        self.page_bytes = page_size * TOKEN_BYTES
        self.served = 0
        self._uses: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            for key in hash_pages(encode(prompt, page_size), self.page_bytes):
                self._uses.setdefault(key, []).append(number)

    def advance(self) -> None:
        self.served += 1

    def next_use(self, node: Node) -> float:
        """The number of the next request that uses `node`; infinity if none does."""
        uses = self._uses.get(node.chain_hash(self.page_bytes), [])
        at = bisect_right(uses, self.served - 1)
        return uses[at] if at < len(uses) else math.inf

    def local(self, node: Node, tier: Tier) -> Rank:
        return (-self.next_use(node), node.last_used)
