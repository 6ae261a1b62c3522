"""Eviction policies, one for all tiers, and what an eviction writes back to the tier below.

A policy ranks nodes in two steps, so that a new value of an agent touches no node: `local` ranks the nodes of one group
of agents among each other and changes only when a node is used or split; `rank` combines it with the group's value,
which may change at every step of a workflow.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar, Protocol

from tenure.checked import NotNegative, Positive, verify

from .agent_index import Agent
from .base import Tier
from .radix_tree import Node

Rank = tuple[float, ...]
AgentValue = Callable[[Agent], float] | Mapping[Any, float]  # how soon or how likely an agent is called again


class AllocStatus(Enum):
    """The outcome of a request for memory."""

    READY = "the memory is available"
    PENDING = "it will be available when transfers in progress have ended"
    REFUSED = "there is not enough memory, and nothing (more) may be evicted"


class EvictionPolicy(ABC):
    """Ranks nodes for eviction; the smallest rank is evicted first. It only reads nodes.

    Called under the cache's lock.

    Attributes:
        name: for statistics and the registry.
        uses_agents: nodes are grouped by agents; otherwise all are in the unowned group.
    """

    name: ClassVar[str]
    uses_agents: ClassVar[bool] = False

    @abstractmethod
    def local(self, node: Node, tier: Tier) -> Rank:
        """The rank of `node` among the evictable nodes of its group in `tier`. Read when it becomes evictable."""

    def rank(self, value: float, local: Rank) -> Rank:
        """The rank among all evictable nodes of the tier; for one `value` it must not fall when `local` rises."""
        return local

    def value(self, agent: Agent) -> float:
        """The value of `agent`, larger = keep, never NaN. Read when `TieredCache.values_changed` says so."""
        return 0.0

    def unowned_value(self, now: float) -> float:
        """The value of nodes in nobody's fixed prompt at time `now` in seconds. Read at every choice of a victim."""
        return 0.0

    def prefetch_bound(self, rank: Rank) -> Rank:
        """Prefetching a prompt of this rank may evict only nodes that rank below the returned bound."""
        return rank

    def prefers_discard(self, rank: Rank, nbytes: int, write_back_bytes: int, tier: Tier) -> bool:
        """Whether to evict a replicated node of that rank and size from `tier`, which frees its memory at once, rather
        than a lower-ranked one of which `write_back_bytes` must be copied first, while a request waits."""
        return False


@dataclass(frozen=True)
class LRU(EvictionPolicy):
    """Least recently used first."""

    name = "lru"

    def local(self, node: Node, tier: Tier) -> Rank:
        return (node.last_used,)


@dataclass(frozen=True)
class LFU(EvictionPolicy):
    """Least frequently used first, then least recently."""

    name = "lfu"

    def local(self, node: Node, tier: Tier) -> Rank:
        return (node.hits, node.last_used)


@dataclass(frozen=True)
class StepsToExecution(EvictionPolicy):
    """KVFlow (arXiv 2507.07400, section 4.1): nodes in no fixed prompt first, then by the largest steps-to-execution.

    Ties are broken by the least recent use. An agent without a number counts as infinitely many steps away.

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
        # An unknown agent ranks above nodes in no fixed prompt, which have minus infinity.
        return max(-read_value(self.steps, agent, math.inf), -1e300)

    def unowned_value(self, now: float) -> float:
        return -math.inf


@dataclass(frozen=True)
class HeldSteps(StepsToExecution):
    """Steps-to-execution in buckets, as KVFlow's released engine evicts with `enable_holding`.

    Nodes in no fixed prompt first, then those of agents `most` or more steps away, then those one step nearer, and so
    on; within a bucket the least recently used first. Agents without a number are in the first bucket.

    Attributes:
        most: steps of the first bucket.

    Raises:
        ValueError: a number below 1.
    """

    most: int = 3
    name = "ste_buckets"

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"got most={self.most} steps; accepted: 1 or more")

    def value(self, agent: Agent) -> float:
        return -float(min(self.most, math.ceil(min(self.most, max(0.0, read_value(self.steps, agent, math.inf))))))


class Costs(Protocol):
    """Seconds to obtain KV."""

    def recompute_s(self, start: int, end: int) -> float:
        """To compute the KV of the tokens [start, end) of a prompt whose first `start` are cached."""
        ...

    def reload_s(self, nbytes: int, tier: Tier) -> float:
        """To load `nbytes` into `tier` from the tier below; infinity if there is none."""
        ...


@dataclass(frozen=True)
class LinearCosts:
    """Costs in proportion to tokens of a prefill and bytes, plus `latency_s` to start a transfer.

    Attributes:
        bytes_per_s: of the links into DEVICE (from HOST) and into HOST (from DISK); 0 for one that does not exist.
    """

    tokens_per_s: Positive
    bytes_per_s: tuple[NotNegative, NotNegative]
    latency_s: NotNegative = 0.0

    def __post_init__(self) -> None:
        verify(self)

    def recompute_s(self, start: int, end: int) -> float:
        return (end - start) / self.tokens_per_s

    def reload_s(self, nbytes: int, tier: Tier) -> float:
        speed = 0.0 if tier == Tier.DISK else self.bytes_per_s[tier]
        return self.latency_s + nbytes / speed if speed else math.inf


@dataclass(frozen=True)
class SuffixReuseConfig:
    """Priors and windows of `SuffixReuse`.

    Attributes:
        window: saved suffixes, the latest, that the probability is estimated from.
        prior_hits, prior_count: before any was saved, `prior_hits` of `prior_count` suffixes count as used again.
        agent_weight: suffixes that the estimate over all agents weighs in that for one agent.
        device_weight: suffixes that the policy's `prior` weighs in the share used again on the device.
        device_decay: factor, per suffix evicted from the device, on the weight of earlier ones.
        explore_every: after so many suffixes that were dropped, one is saved regardless of the estimate.
    """

    window: int = 64
    prior_hits: float = 0.5
    prior_count: float = 4.0
    agent_weight: float = 4.0
    device_weight: float = 4.0
    device_decay: float = 0.98
    explore_every: int = 64


class SuffixReuse:
    """Learns from the saved suffixes how many of an agent's are used again, so that only worthwhile ones are saved.

    A suffix is what a request appends to a fixed prompt. One that is used again with probability p saves p · (recompute
    - reload) seconds and costs the link about reload seconds now: saving it is worthwhile if the former is larger.
    Dropped suffixes teach nothing, as nobody could use them, so some are saved regardless: an agent that begins to
    continue its conversations is then noticed.

    Called under the cache's lock.

    Args:
        costs: seconds to recompute or to reload.
    """

    def __init__(self, costs: Costs, config: SuffixReuseConfig | None = None) -> None:
        self.costs = costs
        self.config = config or SuffixReuseConfig()
        self._saved: deque[tuple[Node, int, Hashable]] = deque(maxlen=self.config.window)  # node, its hits, its agents
        self._dropped = 0
        self._used = self._evicted = 0.0

    def record_evicted(self, node: Node) -> None:
        """A suffix has been evicted from the device."""
        decay = self.config.device_decay
        self._used = decay * self._used + (node.hits > 0)
        self._evicted = decay * self._evicted + 1

    def record_saved(self, node: Node) -> None:
        """A suffix is being written back to a tier below."""
        if self._dropped >= self.config.explore_every:
            self._dropped = 0
        self._saved.append((node, node.hits, _prompt_agents(node)))

    def record_dropped(self) -> None:
        """A suffix was dropped because saving it was not worthwhile."""
        self._dropped += 1

    def reuse_rate(self, prior: float) -> float:
        """The share of suffixes that were used again while on the device, 0 to 1; `prior` before any was evicted."""
        weight = self.config.device_weight
        return (self._used + weight * prior) / (self._evicted + weight)

    def reuse_probability(self, node: Node) -> float:
        """Of being used again, 0 to 1, from the saved suffixes of the same fixed prompt and of all others."""
        key, config = _prompt_agents(node), self.config
        used = own = own_used = 0
        for saved, hits, other in self._saved:
            used += saved.hits > hits
            if other == key:
                own_used += saved.hits > hits
                own += 1
        overall = (used + config.prior_hits) / (len(self._saved) + config.prior_count)
        return (own_used + config.agent_weight * overall) / (own + config.agent_weight)

    def is_worthwhile(self, node: Node, tier: Tier) -> bool:
        """Whether writing `node` back from `tier` is worth its time on the link."""
        if self._dropped >= self.config.explore_every:
            return True
        reload = self.costs.reload_s(node.nbytes, tier)
        gain = self.costs.recompute_s(node.end - node.covers, node.end) - reload
        return self.reuse_probability(node) * gain > reload


def _prompt_agents(node: Node) -> Hashable:
    for each in node.path():
        if each.fixed:
            return frozenset(each.group.agents)
    return frozenset()


@dataclass(frozen=True)
class ExpectedTime(EvictionPolicy):
    """Ours: the time a node is expected to save per byte, P(reuse) · min(recompute, reload) / bytes.

    P(reuse) of a fixed prompt is its agents' expected discounted reuse, e.g. E[exp(-γT)] with T the time until the next
    call. Other nodes (suffixes of requests, sessions) are used again with probability `prior`, after an exponentially
    distributed time of half-life `half_life_s`, so the probability halves as often. Ranks are logarithms: age then adds
    the same to all of the latter, so their order among each other is constant.

    Attributes:
        reuse: of an agent, 0 to 1; without a number 0.
        costs: seconds to recompute or to reload.
        prior, half_life_s: of nodes in no fixed prompt.
        rate, clock: γ in 1/s at present, and seconds.
        phase: the integral of γ over the clock up to a time; None: γ never changes. Values read at different times are
            compared as if they had grown by the exponential of its increase since, as E[exp(-γT)] does while a call
            approaches. So values read under different γ can be compared for a while.
        suffix_reuse: learns how many of the nodes in no fixed prompt are used again, starting from `prior`.
        prefetch_margin: a prefetched prompt must be worth that many times what it displaces, because the transfer
            occupies the link for certain and what is displaced may have to be loaded again.

    Raises:
        ValueError: a prior, half-life or margin out of range.
    """

    reuse: AgentValue
    costs: Costs
    prior: float = 0.05
    half_life_s: float = 30.0
    rate: Callable[[], float] = lambda: 0.0
    clock: Callable[[], float] = lambda: 0.0
    phase: Callable[[float], float] | None = None
    suffix_reuse: SuffixReuse | None = None
    prefetch_margin: float = 2.0
    name = "expected_time"
    uses_agents = True

    def __post_init__(self) -> None:
        if not 0 < self.prior <= 1 or not self.half_life_s > 0:
            raise ValueError(
                f"got prior={self.prior}, half_life_s={self.half_life_s}; accepted: 0 < prior <= 1, half_life_s > 0"
            )
        if not self.prefetch_margin > 0:
            raise ValueError(f"got prefetch_margin={self.prefetch_margin}; accepted: a number above 0")

    def local(self, node: Node, tier: Tier) -> Rank:
        begin, copy = node.end - node.covers, node.copies[tier]
        nbytes = node.nbytes if copy is None else copy.nbytes  # copies in other tiers come and go, and may differ
        seconds = min(self.costs.recompute_s(begin, node.end), self.costs.reload_s(nbytes, tier))
        saved = _log(seconds / max(1, nbytes))
        if not node.fixed:
            saved += node.last_used * math.log(2) / self.half_life_s
        return (saved, node.last_used)

    def rank(self, value: float, local: Rank) -> Rank:
        # `local` again breaks ties of the sum: a large value swallows what is added to it.
        return (value + local[0], *local)

    def value(self, agent: Agent) -> float:
        return _log(min(1.0, read_value(self.reuse, agent, 0.0))) - self._phase(self.clock())

    def unowned_value(self, now: float) -> float:
        fading, rate = math.log(2) / self.half_life_s, self.rate()
        prior = self.prior if self.suffix_reuse is None else self.suffix_reuse.reuse_rate(self.prior)
        return math.log(prior * fading / (fading + rate)) - now * fading - self._phase(now)

    def _phase(self, now: float) -> float:
        return self.rate() * now if self.phase is None else self.phase(now)

    def prefetch_bound(self, rank: Rank) -> Rank:
        return (rank[0] - math.log(self.prefetch_margin), *rank[1:])

    def prefers_discard(self, rank: Rank, nbytes: int, write_back_bytes: int, tier: Tier) -> bool:
        # The expected saving of the node against the certain wait of the request: a link is as fast both ways.
        expected = math.exp(min(0.0, rank[0] + self._phase(self.clock()))) * nbytes
        return expected < self.costs.reload_s(write_back_bytes, tier)


def read_value(source: AgentValue, agent: Agent, missing: float) -> float:
    """The number that `source` has for `agent`; `missing` if it has none, or NaN."""
    value = source(agent) if callable(source) else source.get(agent)
    return missing if value is None or math.isnan(value) else float(value)


def _log(number: float) -> float:
    return math.log(number) if number > 0 else -1e300  # finite: minus infinity plus infinity would be NaN


class WriteBack(Enum):
    """The nodes whose last copy an eviction saves in the tier below."""

    NOTHING = "nothing"
    FIXED = "fixed"  # those in an agent's fixed prompt (KVFlow)
    WORTH = "worth"  # those, and the suffixes for which it is worthwhile (`SuffixReuse`; ours)
    ALL = "all"


@dataclass(frozen=True)
class EagerWriteBackConfig:
    """Bounds of eager write-back.

    Attributes:
        max_tracked: nodes of a tier that are tracked until they are saved; beyond, the oldest is dropped.
        max_candidates: of these, the oldest that the next one is chosen from.
        persist: fixed prompts are also copied to a disk that keeps them for the next process, whatever room there is
            above: otherwise the most valuable ones would never leave the device, and be lost when the process ends.
    """

    max_tracked: int = 4096
    max_candidates: int = 64
    persist: bool = True


@dataclass(frozen=True)
class TierPolicy:
    """An eviction policy and a write-back rule: everything in which the compared caches differ except prefetching.

    Attributes:
        eviction: ranks the nodes of every tier.
        write_back: the nodes whose last copies are saved below rather than dropped.
        suffix_reuse: estimates whether saving a suffix is worthwhile; for `WriteBack.WORTH` and for no other.
        eager: save fixed prompts before an eviction needs their memory (`EagerWriteBack`); None: only on eviction.
        by_page: only as many pages of a victim are evicted as are needed, from its end on, as in vLLM's prefix cache.

    Raises:
        ValueError: one of `WriteBack.WORTH` and `suffix_reuse` without the other; `eager` although evictions save
            nothing; `by_page` although they save something.
    """

    eviction: EvictionPolicy
    write_back: WriteBack = WriteBack.ALL
    suffix_reuse: SuffixReuse | None = None
    eager: EagerWriteBackConfig | None = None
    by_page: bool = False

    def __post_init__(self) -> None:
        if self.by_page and self.write_back is not WriteBack.NOTHING:
            raise ValueError(f"got by_page with {self.write_back}; accepted: with a WriteBack that saves nothing")
        if (self.write_back is WriteBack.WORTH) != (self.suffix_reuse is not None):
            given = "no suffix_reuse" if self.suffix_reuse is None else "suffix_reuse"
            raise ValueError(f"got {given} with {self.write_back}; accepted: suffix_reuse with WriteBack.WORTH alone")
        if self.eager is not None and self.write_back is WriteBack.NOTHING:
            raise ValueError(f"got eager with {self.write_back}; accepted: with a WriteBack that saves fixed prompts")

    def should_write_back(self, node: Node, tier: Tier) -> bool:
        """Whether the last copy of `node`, evicted from `tier`, is to be saved in the tier below."""
        if self.suffix_reuse is not None and not node.fixed:
            return self.suffix_reuse.is_worthwhile(node, tier)
        return self.write_back is WriteBack.ALL or (self.write_back is not WriteBack.NOTHING and node.fixed)


_NAMED: dict[str, tuple[Callable[..., EvictionPolicy], WriteBack]] = {
    "lru": (LRU, WriteBack.NOTHING),  # a cache on the device alone
    "lfu": (LFU, WriteBack.ALL),
    "lru_reactive": (LRU, WriteBack.ALL),  # as SGLang's HiCache: into host memory, and back on demand
    "ste": (StepsToExecution, WriteBack.FIXED),
    "expected_time": (ExpectedTime, WriteBack.WORTH),
}


def tier_policy_names() -> tuple[str, ...]:
    """The names that `get_tier_policy` knows."""
    return tuple(sorted(_NAMED))


def get_tier_policy(name: str, **options: Any) -> TierPolicy:
    """The tier policy of that name; `options` are its eviction policy's (`steps`, `reuse`, `costs`, ...).

    Belady's policy has no name here, as it needs a trace: `TierPolicy(Belady(prompts, page_size))`.

    Raises:
        ValueError: no such policy, or its eviction policy does not accept these options.
    """
    if name not in _NAMED:
        raise ValueError(f"unknown tier policy {name!r}; known: {', '.join(tier_policy_names())}")
    make, write_back = _NAMED[name]
    try:
        eviction = make(**options)
    except TypeError as error:
        raise ValueError(f"tier policy {name!r} does not accept {sorted(options)}: {error}") from None
    if not isinstance(eviction, ExpectedTime):
        return TierPolicy(eviction, write_back)
    suffix_reuse = SuffixReuse(eviction.costs)
    return TierPolicy(
        replace(eviction, suffix_reuse=suffix_reuse), write_back, suffix_reuse, eager=EagerWriteBackConfig()
    )
