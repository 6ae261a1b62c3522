"""How long a load will take, and whether computing would be sooner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .copies import Link, Urgency
from .node import Node, Tier
from .orders import Costs
from .transfers import Transfers, fastest


@dataclass(frozen=True)
class Choice:
    """How the KV of a prompt is had soonest.

    Attributes:
        nodes: of the cached chain, how many are used; those of them that are not on the device are loaded.
        load_s, compute_s: estimated seconds of the loads, and of computing the rest.
        alternative_s: of computing everything that is not on the device.
    """

    nodes: int
    load_s: float
    compute_s: float
    alternative_s: float


class Estimates:
    """Reads what is under way; changes nothing.

    Args:
        costs: seconds to compute or to reload, without waiting.
        transfers: the copies under way.
    """

    def __init__(self, costs: Costs, transfers: Transfers) -> None:
        self.costs, self.transfers = costs, transfers

    def choose(self, chain: Sequence[Node], size: int, compute: bool = False, others: int = 0) -> Choice:
        """Where to stop loading a prompt of `size` tokens whose cached part is `chain`.

        Loads run one after the other on a link, behind those that other requests wait for, and computing begins when
        they are done. A second of computing keeps all others waiting as well and counts for each of them: if every
        request only saw to itself, a busy link would have them compute, and the device would be the slower for all.

        Args:
            compute: do not load at all.
            others: requests that are being computed, or wait to be.
        """
        used, begin = 0, 0
        while used < len(chain) and chain[used].copies[Tier.DEVICE] is not None:
            begin, used = chain[used].end, used + 1
        alternative = self.costs.recompute_s(begin, size)
        best = Choice(used, 0.0, alternative, alternative)
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
                best = Choice(number + 1, load, rest, alternative)
        return best

    def load_s(self, nodes: Sequence[Node]) -> float:
        """Seconds until these would be on the device if their copies were asked for on demand now."""
        seconds: dict[Link, float] = {}
        for node in nodes:
            if node.copies[Tier.DEVICE] is None:
                self._add(node, seconds)
        return max(seconds.values(), default=0.0)

    def link_s(self, nbytes: int, link: Link) -> float:
        """Seconds that `nbytes` take on a link into the device. A file's way is as slow as its way into the host."""
        return self.costs.reload_s(nbytes, Tier.DEVICE if link[0] is Tier.HOST else Tier.HOST)

    def _add(self, node: Node, seconds: dict[Link, float]) -> None:
        """Adds the copy of `node` to the seconds of its link, which begin with what is waited for already."""
        flight = node.flight
        source = fastest(node)
        assert source is not None, "a chain has data"
        coming = flight is not None and flight.target is Tier.DEVICE
        link = flight.link if flight is not None and coming else (source, Tier.DEVICE)
        if link not in seconds:
            ahead = self.transfers.demanded.get(link, 0)
            seconds[link] = self.link_s(ahead, link) if ahead else 0.0
        if flight is None or not coming:
            seconds[link] += self.link_s(node.nbytes, link)
        elif flight.urgency is not Urgency.DEMAND:  # those have been counted
            seconds[link] += self.link_s(sum(flight.payload.layers[flight.done :]), link)
