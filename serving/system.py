"""The systems that are compared, by name: an order, what is saved below, what is known, and whether it prefetches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .kvcache.base import Tier
from .kvcache.belady import Belady
from .kvcache.estimates import Estimates
from .kvcache.eviction_policy import (
    LFU,
    LRU,
    Costs,
    EagerWriteBackConfig,
    EvictionPolicy,
    ExpectedTime,
    StepsToExecution,
    SuffixReuse,
    TierPolicy,
    WriteBack,
)
from .kvcache.memory_pool import Pool
from .kvcache.tiered_cache import TieredCache
from .kvcache.transfer_queue import TransferBackend
from .prediction import NextCallPredictor, PredictionConfig, PredictionMode
from .prefetch import PrefetchConfig, Prefetcher
from .scheduler.config import SchedulerConfig
from .scheduler.scheduler import Scheduler
from .workflow.graph import StepGraph
from .workflow.markov import LearnedTransitions


@dataclass(frozen=True)
class _Recipe:
    """In what the systems differ.

    Attributes:
        order: its name. below: pools below the device are used.
        measure: what is known of agents' next calls. prefetch: fixed prompts are brought up ahead of them.
        batch_waits: of the `Scheduler`. ahead: of the `TierPolicy`.
    """

    order: str
    write_back: WriteBack
    below: bool = True
    mode: PredictionMode = PredictionMode.NONE
    prefetch: bool = False
    batch_waits: bool = False
    ahead: bool = False


_RECIPES = {
    "lru": _Recipe("lru", WriteBack.NOTHING, below=False),  # SGLang without a tier below
    "lfu": _Recipe("lfu", WriteBack.ALL),
    "lru_reactive": _Recipe("lru", WriteBack.ALL),  # HiCache, were only those to wait who need a load
    "hicache": _Recipe("lru", WriteBack.ALL, batch_waits=True),  # SGLang's HiCache
    "lru_prefetch": _Recipe("lru", WriteBack.ALL, mode=PredictionMode.STEPS, prefetch=True),
    "ste": _Recipe("ste", WriteBack.FIXED, mode=PredictionMode.STEPS),  # KVFlow without its prefetch
    "ste_prefetch": _Recipe("ste", WriteBack.FIXED, mode=PredictionMode.STEPS, prefetch=True),  # KVFlow
    "expected_time": _Recipe("expected_time", WriteBack.WORTH, mode=PredictionMode.TIME, prefetch=True, ahead=True),  # ours
    "belady": _Recipe("belady", WriteBack.ALL),  # the oracle, on demand
}


def system_names() -> tuple[str, ...]:
    """The names that `build_system` knows."""
    return tuple(_RECIPES)


@dataclass(frozen=True)
class System:
    """Everything an engine or a simulator drives; `scheduler` is what it talks to."""

    name: str
    tiers: TieredCache
    graph: StepGraph
    predictor: NextCallPredictor
    scheduler: Scheduler
    prefetcher: Prefetcher | None
    estimates: Estimates

    def close(self, reason: str = "the system was closed") -> None:
        """Ends all requests and copies, and closes the pools."""
        self.scheduler.close(reason)
        self.tiers.close()


def build_system(
    name: str,
    pools: Mapping[Tier, Pool],
    mover: TransferBackend,
    *,
    clock: Callable[[], float],
    costs: Costs,
    bytes_per_token: int,
    page_size: int = 16,
    graph: StepGraph | None = None,
    limits: SchedulerConfig | None = None,
    prefetch: PrefetchConfig | None = None,
    prompts: Iterable[Sequence[int]] | None = None,
    learn: bool = False,
    step_s: float = 5.0,
) -> System:
    """Makes the system of that name.

    Args:
        name: of `system_names()`.
        pools, mover, clock, page_size: of the `TieredCache`. Pools that the system does not use are left alone; whoever
            made them closes them.
        costs: seconds of computing and reloading.
        bytes_per_token: KV on the device of a token that is computed.
        graph: of the workflows; by default an empty one on the same clock.
        limits, prefetch: budgets.
        prompts: `belady` only: token ids of all requests in the order in which they will be served.
        learn: learn the transitions of sessions for which no workflow is declared.
        step_s: guessed seconds from an agent's call to the next one's, until calls have been seen.

    Raises:
        ValueError: no such system, or `belady` without prompts.
    """
    if name not in _RECIPES:
        raise ValueError(f"unknown system {name!r:.60}; known: {', '.join(_RECIPES)}")
    if (name == "belady") != (prompts is not None):
        given = "no prompts" if prompts is None else "prompts"
        raise ValueError(f"got {given} for the system {name!r}; accepted: prompts for belady, and for no other")
    recipe, graph = _RECIPES[name], StepGraph(clock) if graph is None else graph
    used = {tier: pool for tier, pool in pools.items() if recipe.below or tier == Tier.DEVICE}
    oracle = None if prompts is None else Belady(prompts, page_size)
    predictor = NextCallPredictor(
        graph,
        recipe.mode,
        clock,
        page_size,
        LearnedTransitions(graph) if learn else None,
        None if oracle is None else oracle.advance,
        PredictionConfig(step_s=step_s),
    )
    suffixes = SuffixReuse(costs) if recipe.write_back is WriteBack.WORTH else None
    order: EvictionPolicy = {
        "lru": LRU,
        "lfu": LFU,
        "ste": lambda: StepsToExecution(predictor.steps),
        "expected_time": lambda: ExpectedTime(
            predictor.reuse, costs, rate=lambda: graph.rate, clock=clock, suffix_reuse=suffixes
        ),
        "belady": lambda: oracle,
    }[recipe.order]()
    eager = EagerWriteBackConfig() if recipe.ahead else None
    tiers = TieredCache(used, mover, TierPolicy(order, recipe.write_back, suffixes, eager), page_size, clock)
    estimates = Estimates(costs, tiers)
    prefetcher = None
    if recipe.prefetch:
        by_use = not order.uses_agents
        prefetcher = Prefetcher(tiers, estimates, predictor, prefetch, only_lower_ranked=not by_use, touch_on_arrival=by_use)
    scheduler = Scheduler(tiers, estimates, predictor, bytes_per_token, limits, prefetcher, recipe.batch_waits)
    return System(name, tiers, graph, predictor, scheduler, prefetcher, estimates)
