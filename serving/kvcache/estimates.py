"""Estimates how long loading a prompt takes, and whether computing it would be faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .base import Link, Tier, Urgency
from .eviction_policy import Costs
from .radix_tree import Node
from .tiered_cache import TieredCache


@dataclass(frozen=True)
class LoadChoice:
    """The fastest way to the KV of a prompt.

    Attributes:
        nodes: how many nodes of the cached chain are used; those of them that are not on the device are loaded.
        load_s, compute_s: estimated seconds of the loads, and of computing the rest.
        alternative_s: of computing everything that is not on the device.
    """

    nodes: int
    load_s: float
    compute_s: float
    alternative_s: float


class Estimates:
    """Estimated seconds of loading and computing, given the transfers in progress. Changes nothing.

    `costs` are the seconds to compute or to reload on an idle link.
    """

    def __init__(self, costs: Costs, cache: TieredCache) -> None:
        self.costs, self.cache = costs, cache

    def choose(self, chain: Sequence[Node], size: int, compute: bool = False, others: int = 0) -> LoadChoice:
        """How much to load of a prompt of `size` tokens whose cached prefix is `chain`.

        Loads run one after the other on a link, behind those that other requests wait for, and computing starts when
        they are done. A second of computing delays all other requests too and counts for each of them: if every request
        minimised its own time only, a busy link would make them compute, and the device would be slower for all.

        Args:
            compute: do not load at all.
            others: requests that are being computed, or wait to be.
        """
        used, begin = 0, 0
        while used < len(chain) and chain[used].copies[Tier.DEVICE] is not None:
            begin, used = chain[used].end, used + 1
        alternative = self.costs.recompute_s(begin, size)
        best = LoadChoice(used, 0.0, alternative, alternative)
        if compute or used == len(chain):
            return best
        seconds: dict[Link, float] = {}
        for number in range(used, len(chain)):
            node = chain[number]
            if node.copies[Tier.DEVICE] is None:
                self._add(node, seconds)
            load = max(seconds.values())
            rest = self.costs.recompute_s(node.end, size)
            if load + (1 + others) * rest <= best.load_s + (1 + others) * best.compute_s:
                best = LoadChoice(number + 1, load, rest, alternative)
        return best

    def load_s(self, nodes: Sequence[Node]) -> float:
        """Seconds until these nodes would be on the device if they were loaded on demand now."""
        seconds: dict[Link, float] = {}
        for node in nodes:
            if node.copies[Tier.DEVICE] is None:
                self._add(node, seconds)
        return max(seconds.values(), default=0.0)

    def link_s(self, nbytes: int, link: Link) -> float:
        """Seconds that `nbytes` take on a link into the device; from disk, as long as from disk into the host."""
        return self.costs.reload_s(nbytes, Tier.DEVICE if link[0] is Tier.HOST else Tier.HOST)

    def _add(self, node: Node, seconds: dict[Link, float]) -> None:
        """Adds the load of `node` to the seconds of its link, which start with the demand loads in progress there."""
        transfers = self.cache.transfers
        job, source = transfers.job_of(node), node.fastest_tier
        assert source is not None, "a chain has data"
        if job is not None and job.target is not Tier.DEVICE:
            job = None
        link = (source, Tier.DEVICE) if job is None else job.link
        if link not in seconds:
            queued = transfers.demand_bytes.get(link, 0)
            seconds[link] = self.link_s(queued, link) if queued else 0.0
        if job is None:
            seconds[link] += self.link_s(node.nbytes, link)
        elif job.urgency is not Urgency.DEMAND:  # those have been counted
            seconds[link] += self.link_s(job.remaining_bytes, link)
