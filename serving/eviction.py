"""Makes room in a tier: the victims of its order leave it, into the tier below where the policy saves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from .copies import Urgency
from .node import TIERS, Node, Tier
from .orders import LFU, LRU, ExpectedTime, Order, Rank, StepsToExecution
from .residency import Residency
from .suffixes import SuffixReuse
from .transfers import Transfers


class Room(Enum):
    READY = "there is room"
    PENDING = "there will be, once copies that are under way have ended"
    REFUSED = "there is none, and nothing (more) may go"


class WriteBack(Enum):
    """What an eviction saves in the tier below."""

    NOTHING = "nothing"
    FIXED = "fixed"  # what belongs to an agent's fixed prompt (KVFlow)
    WORTH = "worth"  # that, and the suffixes of agents whose suffixes are used again often enough (ours)
    ALL = "all"


@dataclass(frozen=True)
class TierPolicy:
    """An order, and what its victims' last copies are worth: everything in which the policies differ but prefetching.

    Attributes:
        order: who goes first, in every tier.
        write_back: what is saved below rather than dropped.
        suffixes: for `WriteBack.WORTH`, and for no other: what is known of suffixes.
        ahead: fixed prompts are saved before anything waits for their room (`SaveAhead`).

    Raises:
        ValueError: one of `WriteBack.WORTH` and suffixes without the other; `ahead` of evictions that save nothing.
    """

    order: Order
    write_back: WriteBack = WriteBack.ALL
    suffixes: SuffixReuse | None = None
    ahead: bool = False

    def __post_init__(self) -> None:
        if (self.write_back is WriteBack.WORTH) != (self.suffixes is not None):
            given = "no suffixes" if self.suffixes is None else "suffixes"
            raise ValueError(f"got {given} with {self.write_back}; accepted: suffixes with WriteBack.WORTH alone")
        if self.ahead and self.write_back is WriteBack.NOTHING:
            raise ValueError(f"got ahead with {self.write_back}; accepted: with a WriteBack that saves fixed prompts")

    def saves(self, node: Node, tier: Tier) -> bool:
        """Whether the last copy of `node`, which leaves `tier`, is to go into the tier below."""
        if self.suffixes is not None and not node.fixed:
            return self.suffixes.pays(node, tier)
        return self.write_back is WriteBack.ALL or (self.write_back is not WriteBack.NOTHING and node.fixed)


_NAMED: dict[str, tuple[Callable[..., Order], WriteBack]] = {
    "lru": (LRU, WriteBack.NOTHING),  # a cache on the device alone
    "lfu": (LFU, WriteBack.ALL),
    "lru_reactive": (LRU, WriteBack.ALL),  # as SGLang's HiCache: into the host's memory, and back on demand
    "ste": (StepsToExecution, WriteBack.FIXED),
    "expected_time": (ExpectedTime, WriteBack.WORTH),
}


def tier_policy_names() -> tuple[str, ...]:
    """The names `get_tier_policy` knows."""
    return tuple(sorted(_NAMED))


def get_tier_policy(name: str, **options: Any) -> TierPolicy:
    """The policy of that name; `options` are its order's (`steps`, `reuse`, `costs`, ...).

    Belady's order has no name here, as it needs a trace: `TierPolicy(Belady(prompts, page_size))`.

    Raises:
        ValueError: no such policy, or its order does not accept these options.
    """
    if name not in _NAMED:
        raise ValueError(f"unknown tier policy {name!r}; known: {', '.join(tier_policy_names())}")
    order, write_back = _NAMED[name]
    try:
        made = order(**options)
    except TypeError as error:
        raise ValueError(f"tier policy {name!r} does not accept {sorted(options)}: {error}") from None
    suffixes = None
    if isinstance(made, ExpectedTime):
        suffixes = SuffixReuse(made.costs)
        made = replace(made, suffixes=suffixes)
    return TierPolicy(made, write_back, suffixes, ahead=suffixes is not None)


class Eviction:
    """Applies a `TierPolicy`."""

    def __init__(self, residency: Residency, transfers: Transfers, policy: TierPolicy) -> None:
        self.residency, self.transfers, self.policy = residency, transfers, policy

    def make_room(self, tier: Tier, nbytes: int, below: Rank | None = None, hurry: bool = False) -> Room:
        """Evicts from `tier` until `nbytes` are free there, or will be.

        Args:
            below: evict only what ranks below this.
            hurry: a request waits for it; what need not be saved first may go before what does (`Order.rather`).
        """
        pool, candidates = self.residency.pools[tier], self.residency.candidates[tier]
        if pool.can_take(nbytes):
            return Room.READY
        if nbytes > self.transfers.can_leave(tier):
            return Room.REFUSED
        while pool.free + pool.leaving < nbytes:
            victim = candidates.first()
            if hurry and (other := self._at_once(tier, victim)) is not None:
                self.evict(other, tier)
                continue
            if self._adopts(tier, victim, below):
                continue
            if victim is None or (below is not None and candidates.rank(victim) >= below):
                return Room.REFUSED
            if self._follows(victim, tier):
                return Room.PENDING
            if self.evict(victim, tier) is Room.PENDING:
                return Room.PENDING
        return Room.READY if pool.can_take(nbytes) else Room.PENDING

    def _at_once(self, tier: Tier, victim: Node | None) -> Node | None:
        """Who may rather leave `tier` without a copy, where the one that goes next would have to be saved first."""
        if not self.policy.ahead:
            return None
        candidates, job = self.residency.candidates[tier], self.transfers.ahead(tier)
        if job is not None and (victim is None or candidates.rank(job.node) <= candidates.rank(victim)):
            saved = sum(job.payload.layers[job.done :])
        elif victim is not None and not victim.has_spare and self.policy.saves(victim, tier):
            saved = victim.held[tier]
        else:
            return None
        other = candidates.first_with_another_copy()
        if other is None or not self.policy.order.rather(candidates.rank(other), other.nbytes, saved, tier):
            return None
        return other

    def _adopts(self, tier: Tier, victim: Node | None, below: Rank | None) -> bool:
        """Whether a node that is being saved already goes rather than `victim`; then its copy is an eviction now."""
        if not self.policy.ahead or (job := self.transfers.ahead(tier)) is None:
            return False
        candidates = self.residency.candidates[tier]
        rank = candidates.rank(job.node)
        if (victim is not None and candidates.rank(victim) < rank) or (below is not None and rank >= below):
            return False
        self.transfers.adopt(job)
        return True

    def first_rank(self, tier: Tier) -> Rank | None:
        """The rank of the next victim, be it that it is being saved already."""
        candidates, job = self.residency.candidates[tier], self.transfers.ahead(tier)
        first = candidates.first_rank()
        if job is None:
            return first
        rank = candidates.rank(job.node)
        return rank if first is None else min(first, rank)

    def _follows(self, victim: Node, tier: Tier) -> bool:
        """Whether a node that ranks below `victim` becomes a candidate as soon as what builds on it has been saved."""
        rank = self.residency.candidates[tier].rank
        for job in self.transfers.under_way:
            parent = job.node.parent
            if not job.frees_source or job.source != tier or parent is None or parent.copies[tier] is None:
                continue
            if parent.users == 1 and parent.below[tier] == 1 and rank(parent) < rank(victim):
                return True
        return False

    def evict(self, node: Node, tier: Tier) -> Room:
        """Has a candidate leave `tier`: at once, or when it has been copied into the tier below.

        Returns:
            PENDING, and nothing is done yet, if the tier below will have room once copies have ended; else READY.
        """
        room, suffixes = self._evict(node, tier), self.policy.suffixes
        if suffixes is not None and room is Room.READY and tier is Tier.DEVICE and not node.fixed:
            suffixes.left(node)
        return room

    def _evict(self, node: Node, tier: Tier) -> Room:
        only_copy = not node.has_spare
        if only_copy and self.policy.saves(node, tier):
            room = self._save(node, tier)
            if room is not Room.REFUSED:
                return room
        elif only_copy and self.policy.suffixes is not None:
            self.policy.suffixes.dropped()
        statistics = self.transfers.statistics
        statistics.evicted_copies += 1
        statistics.dropped += only_copy
        self.residency.lose(node, tier)
        return Room.READY

    def _save(self, node: Node, tier: Tier) -> Room:
        """Begins to copy `node` out of `tier` into the next one below that has room for it; READY if that is so."""
        for lower in TIERS[tier + 1 :]:
            if lower not in self.residency.pools:
                continue
            payload = node.copies[tier]
            assert payload is not None
            needed = self.residency.pools[lower].charge(payload)
            room = self.make_room(lower, needed, self.residency.candidates[lower].rank(node))
            if node.copies[tier] is None:
                return Room.READY  # what went from the tier below took with it what was built on it
            if room is Room.PENDING:
                return room
            if room is Room.READY and self.transfers.start(node, lower, Urgency.WRITE_BACK, frees_source=True):
                self.transfers.statistics.evicted_copies += 1
                if self.policy.suffixes is not None and not node.fixed:
                    self.policy.suffixes.saved(node)
                return room
        return Room.REFUSED
