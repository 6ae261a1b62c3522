"""Which node goes first: one order for every tier, chosen by name or made by the user.

An order answers in two steps, so that news about an agent touches no node: `local` ranks the nodes of one group of
agents among each other and changes only when a node is used or cut; `rank` joins it with the group's value, which may
change at every step of a workflow.

What follows fixed prompts: whether it is used again, learned, so that only what pays is saved in a tier below.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar, Protocol

from .base import Tier
from .radix_tree import Node

Agent = Hashable
Rank = tuple[float, ...]
WORTH = 2.0  # times as much as what it displaces is a prompt that is brought up ahead of its call
AgentValue = Callable[[Agent], float] | Mapping[Any, float]  # how soon or how likely an agent comes back


class EvictionPolicy(ABC):
    """The order of eviction; what is smaller goes first. It reads nodes and writes to nothing.

    Attributes:
        name: for statistics and the registry.
        uses_agents: nodes are grouped by agents. Otherwise all are in one group, that of nobody.
    """

    name: ClassVar[str]
    uses_agents: ClassVar[bool] = False

    @abstractmethod
    def local(self, node: Node, tier: Tier) -> Rank:
        """The place of `node` among the candidates of its group in `tier`. Read when it becomes a candidate."""

    def rank(self, value: float, local: Rank) -> Rank:
        """The place among all candidates of the tier; for one `value` it must not fall when `local` rises."""
        return local

    def value(self, agent: Agent) -> float:
        """What `agent` is worth, larger = keep, never NaN. Read when `TieredCache.values_changed` says so."""
        return 0.0

    def displaced(self, rank: Rank) -> Rank:
        """What ranks below this may go for a prompt of `rank` that is brought up before it is asked for."""
        return rank

    def rather(self, rank: Rank, nbytes: int, saved: int, tier: Tier) -> bool:
        """Whether a node of that rank and size leaves `tier` at once rather than one before it of which `saved` bytes
        would have to be copied first, while a request waits for the room."""
        return False

    def nobody(self, now: float) -> float:
        """What nodes of no agent are worth at the time `now` in seconds. Read at every choice of a victim."""
        return 0.0


@dataclass(frozen=True)
class LRU(EvictionPolicy):
    """Least recently used first."""

    name = "lru"

    def local(self, node: Node, tier: Tier) -> Rank:
        return (node.last_used,)


@dataclass(frozen=True)
class LFU(EvictionPolicy):
    """Least often used first, then least recently."""

    name = "lfu"

    def local(self, node: Node, tier: Tier) -> Rank:
        return (node.hits, node.last_used)


@dataclass(frozen=True)
class StepsToExecution(EvictionPolicy):
    """KVFlow (arXiv 2507.07400, section 4.1): what no fixed prompt needs, then the largest steps-to-execution.

    Equal steps go by the least recent use. An agent without a number has infinitely many steps.

    Attributes:
        steps: of an agent, 0 = running.
    """

    steps: AgentValue
    name = "ste"
    uses_agents = True

    def local(self, node: Node, tier: Tier) -> Rank:
        return (node.last_used,)

    def rank(self, value: float, local: Rank) -> Rank:
        return (value, *local)

    def value(self, agent: Agent) -> float:
        # An agent nobody knows ranks after the suffixes of requests, which have minus infinity.
        return max(-read(self.steps, agent, math.inf), -1e300)

    def nobody(self, now: float) -> float:
        return -math.inf


class Costs(Protocol):
    """What it takes to have KV back, in seconds."""

    def recompute_s(self, start: int, end: int) -> float:
        """To compute the KV of the tokens [start, end) of a prompt whose first `start` are cached."""
        ...

    def reload_s(self, nbytes: int, tier: Tier) -> float:
        """To bring `nbytes` into `tier` from below it; infinity if nothing is below."""
        ...


@dataclass(frozen=True)
class LinearCosts:
    """Costs in proportion to tokens and bytes.

    Attributes:
        tokens_per_s: of a prefill.
        bytes_per_s: of the links into DEVICE (from HOST) and into HOST (from DISK); 0 for one that does not exist.
        latency_s: of starting a copy.
    """

    tokens_per_s: float
    bytes_per_s: tuple[float, float]
    latency_s: float = 0.0

    def recompute_s(self, start: int, end: int) -> float:
        return (end - start) / self.tokens_per_s

    def reload_s(self, nbytes: int, tier: Tier) -> float:
        speed = 0.0 if tier == Tier.DISK else self.bytes_per_s[tier]
        return self.latency_s + nbytes / speed if speed else math.inf


@dataclass(frozen=True)
class ExpectedTime(EvictionPolicy):
    """Ours: the time a node is expected to save per byte, P(reuse) · min(recompute, reload) / bytes.

    P(reuse) of a fixed prompt is its agents' expected discounted reuse, e.g. E[exp(-γT)] with T the time until the next
    call. For other nodes (suffixes of requests, sessions) the next use comes with a chance of `prior` at all, and then
    as an exponential time of half-life `half_life_s` after the last; so the chance halves as often. Kept as logarithms:
    the age then adds the same to all of the latter, so their order stands still.

    Attributes:
        reuse: of an agent, 0 to 1; without a number 0.
        costs: seconds to recompute or to reload.
        prior, half_life_s: of nodes that are in no fixed prompt.
        suffixes: learns how many of these are used again, beginning with `prior`.
        rate, clock: γ in 1/s, as it is now, and seconds. Chances that were read at different times are compared as if
            they had grown by exp(γ · time) since, which is what E[exp(-γT)] does while a call comes nearer.
    """

    reuse: AgentValue
    costs: Costs
    prior: float = 0.05
    half_life_s: float = 30.0
    rate: Callable[[], float] = lambda: 0.0
    clock: Callable[[], float] = lambda: 0.0
    suffixes: SuffixReuse | None = None
    name = "expected_time"
    uses_agents = True

    def __post_init__(self) -> None:
        if not 0 < self.prior <= 1 or not self.half_life_s > 0:
            raise ValueError(
                f"got prior={self.prior}, half_life_s={self.half_life_s}; accepted: 0 < prior <= 1, half_life_s > 0"
            )

    def local(self, node: Node, tier: Tier) -> Rank:
        begin, copy = node.end - node.covers, node.copies[tier]
        nbytes = node.nbytes if copy is None else copy.nbytes  # copies of other tiers come and go, and may differ
        seconds = min(self.costs.recompute_s(begin, node.end), self.costs.reload_s(nbytes, tier))
        saved = _log(seconds / max(1, nbytes))
        if not node.fixed:
            saved += node.last_used * math.log(2) / self.half_life_s
        return (saved, node.last_used)

    def rank(self, value: float, local: Rank) -> Rank:
        # Again by `local` where the sum is too coarse to tell: a large value swallows what is added to it.
        return (value + local[0], *local)

    def value(self, agent: Agent) -> float:
        return _log(min(1.0, read(self.reuse, agent, 0.0))) - self.rate() * self.clock()

    def nobody(self, now: float) -> float:
        fading, rate = math.log(2) / self.half_life_s, self.rate()
        prior = self.prior if self.suffixes is None else self.suffixes.used(self.prior)
        return math.log(prior * fading / (fading + rate)) - now * (fading + rate)

    def displaced(self, rank: Rank) -> Rank:
        # A copy takes the link's time for certain, and what it displaces has to be brought back if that is called.
        return (rank[0] - math.log(WORTH), *rank[1:])

    def rather(self, rank: Rank, nbytes: int, saved: int, tier: Tier) -> bool:
        # What the node is expected to save, against what the request waits for certain: a link is as fast both ways.
        return math.exp(min(0.0, rank[0] + self.rate() * self.clock())) * nbytes < self.costs.reload_s(saved, tier)


def read(source: AgentValue, agent: Agent, missing: float) -> float:
    """The number `source` has for `agent`; `missing` if there is none, or it is not a number."""
    value = source(agent) if callable(source) else source.get(agent)
    return missing if value is None or math.isnan(value) else float(value)


def _log(number: float) -> float:
    return math.log(number) if number > 0 else -1e300  # finite: minus infinity plus infinity would be NaN


REMEMBERED = 64  # saved suffixes that the chance is read from
TRUST = 4.0  # saved suffixes of an agent that count as much as all that is known of the others
PRIOR = 4.0  # suffixes that count as much as what is believed before any has left the device
FADING = 0.98  # of what is known, with every suffix that leaves
HOPE, DOUBT = 0.5, 4.0  # of `DOUBT` suffixes before the first, `HOPE` are taken to have been used again
EXPLORE = 64  # one in so many that would be dropped is saved all the same


class SuffixReuse:
    """Learns from the suffixes that were saved how many of an agent's are used again.

    A suffix whose chance of being used again is p saves p · (recompute − reload) seconds and costs the link about
    reload seconds now: it pays if the former is more. Suffixes that were dropped tell nothing, as nobody could use
    them; so some are saved all the same, and an agent that begins to continue its conversations is found out.

    Read under the lock of the tiers.

    Args:
        costs: seconds to recompute or to reload.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._saved: deque[tuple[Node, int, Hashable]] = deque(maxlen=REMEMBERED)
        self._dropped = 0
        self._used = self._left = 0.0

    def left(self, node: Node) -> None:
        """A suffix leaves the device."""
        self._used = FADING * self._used + (node.hits > 0)
        self._left = FADING * self._left + 1

    def used(self, believed: float) -> float:
        """The share of suffixes that were used again while they lay on the device; `believed` before any left."""
        return (self._used + PRIOR * believed) / (self._left + PRIOR)

    def pays(self, node: Node, tier: Tier) -> bool:
        """Whether a copy of `node` in the tier below `tier` is worth its time on the link."""
        if self._dropped >= EXPLORE:
            return True
        reload = self.costs.reload_s(node.nbytes, tier)
        gain = self.costs.recompute_s(node.end - node.covers, node.end) - reload
        return self.chance(node) * gain > reload

    def chance(self, node: Node) -> float:
        """That it is used again, 0 to 1: as often as other saved ones behind the same fixed prompt, and elsewhere."""
        key = _prompt(node)
        everywhere, own = [0, 0], [0, 0]
        for saved, hits, other in self._saved:
            used = saved.hits > hits
            everywhere[0] += used
            everywhere[1] += 1
            if other == key:
                own[0] += used
                own[1] += 1
        among_all = (everywhere[0] + HOPE) / (everywhere[1] + DOUBT)
        return (own[0] + TRUST * among_all) / (own[1] + TRUST)

    def saved(self, node: Node) -> None:
        """`node` is on its way into a tier below."""
        if self._dropped >= EXPLORE:
            self._dropped = 0
        self._saved.append((node, node.hits, _prompt(node)))

    def dropped(self) -> None:
        """A suffix was dropped because it did not pay."""
        self._dropped += 1


def _prompt(node: Node) -> Hashable:
    """The agents whose fixed prompt `node` follows."""
    for each in node.path():
        if each.fixed:
            return frozenset(each.group.agents)
    return frozenset()


class AllocStatus(Enum):
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
        ahead: fixed prompts are saved before anything waits for their room (`WriteBackAhead`).

    Raises:
        ValueError: one of `WriteBack.WORTH` and suffixes without the other; `ahead` of evictions that save nothing.
    """

    order: EvictionPolicy
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


_NAMED: dict[str, tuple[Callable[..., EvictionPolicy], WriteBack]] = {
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
