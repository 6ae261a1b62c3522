"""Builds complete serving systems: the presets that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .kvcache.base import Tier
from .kvcache.belady import Belady
from .kvcache.estimates import Estimates
from .kvcache.eviction_history import EvictionHistoryConfig
from .kvcache.eviction_policy import (
    LFU,
    LRU,
    Costs,
    EagerWriteBackConfig,
    EvictionPolicy,
    ExpectedTime,
    HeldSteps,
    StepsToExecution,
    SuffixReuse,
    TierPolicy,
    WriteBack,
)
from .kvcache.memory_pool import Pool, check_devices
from .kvcache.tiered_cache import TieredCache
from .kvcache.transfer_queue import TransferBackend
from .prediction import NextCallPredictor, PredictionConfig, PredictionMode
from .prefetch import PrefetchConfig, Prefetcher
from .scheduler.scheduler import Scheduler
from .scheduler.scheduler_config import SchedulerConfig
from .workflow.graph import StepGraph
from .workflow.markov import LearnedTransitions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SystemPreset:
    """Properties in which the compared systems differ.

    Attributes:
        stands_for: the published system that it models.
        eviction: name of the eviction policy.
        lower_tiers: host and disk pools are used.
        mode: how the agents' next calls are predicted, for eviction and prefetch.
        prefetch: fixed prompts are loaded ahead of their agents' calls.
        batch_waits: every batch waits for all loads, see `Scheduler`.
        eager_write_back: KV is saved below before it has to be evicted, see `TierPolicy`.
        by_page: pages are evicted one by one, see `TierPolicy`.
    """

    stands_for: str
    eviction: str
    write_back: WriteBack
    lower_tiers: bool = True
    mode: PredictionMode = PredictionMode.NONE
    prefetch: bool = False
    batch_waits: bool = False
    eager_write_back: bool = False
    by_page: bool = False


PRESETS = {
    "lru": SystemPreset("SGLang with the device tier only", "lru", WriteBack.NOTHING, lower_tiers=False),
    "vllm": SystemPreset("vLLM's prefix cache", "lru", WriteBack.NOTHING, lower_tiers=False, by_page=True),
    "lfu": SystemPreset("reactive loading, least frequently used", "lfu", WriteBack.ALL),
    "lru_reactive": SystemPreset("HiCache, if only requests that load had to wait", "lru", WriteBack.ALL),
    "hicache": SystemPreset("SGLang's HiCache", "lru", WriteBack.ALL, batch_waits=True),
    "lru_prefetch": SystemPreset(
        "LRU with KVFlow's prefetch", "lru", WriteBack.ALL, mode=PredictionMode.STEPS, prefetch=True
    ),
    "ste": SystemPreset("KVFlow without its prefetch", "ste", WriteBack.FIXED, mode=PredictionMode.STEPS),
    "ste_prefetch": SystemPreset("KVFlow", "ste", WriteBack.FIXED, mode=PredictionMode.STEPS, prefetch=True),
    "ste_holding": SystemPreset(
        "KVFlow's released engine with enable_holding",
        "ste_buckets",
        WriteBack.FIXED,
        mode=PredictionMode.STEPS,
        prefetch=True,
    ),
    "expected_time": SystemPreset(
        "tenure", "expected_time", WriteBack.WORTH, mode=PredictionMode.TIME, prefetch=True, eager_write_back=True
    ),
    "belady": SystemPreset("an oracle without prefetch", "belady", WriteBack.ALL),
}


def system_names() -> tuple[str, ...]:
    """The names that `build_system` accepts."""
    return tuple(PRESETS)


@dataclass(frozen=True)
class System:
    """The parts of a serving system; an engine or a simulator drives its scheduler.

    Attributes:
        tiers: the tiered KV cache, with its pools and transfers. Its lock guards all parts.
        graph: the step graph; workflows are added to it.
        prefetcher: None if the preset does not prefetch.
        estimates: seconds of loading and of computing.
    """

    name: str
    tiers: TieredCache
    graph: StepGraph
    predictor: NextCallPredictor
    scheduler: Scheduler
    prefetcher: Prefetcher | None
    estimates: Estimates

    def close(self, reason: str = "the system was closed") -> None:
        """Ends all requests, with `reason` as their error, and all transfers, and closes the pools that it uses."""
        self.scheduler.close(reason)
        self.tiers.close()


def build_system(
    name: str, pools: Mapping[Tier, Pool], backend: TransferBackend, *, clock: Callable[[], float], costs: Costs,
    bytes_per_token: int, page_size: int = 16, graph: StepGraph | None = None,
    scheduler_config: SchedulerConfig | None = None, prefetch_config: PrefetchConfig | None = None,
    prompts: Iterable[Sequence[int]] | None = None, learn: bool = False, step_s: float = 5.0,
    device: torch.device | None = None, history: EvictionHistoryConfig | None = None,
) -> System:  # fmt: skip
    """Builds the system of a preset.

    Args:
        name: one of `system_names()`.
        pools: by tier; DEVICE is needed. The system closes the pools that it uses; the caller closes the others.
        backend: moves bytes between the pools; the system closes it.
        clock: seconds, shared by all parts.
        costs: seconds of computing and of reloading KV.
        bytes_per_token: bytes of KV on the device per computed token.
        page_size: tokens per page of the prefix tree.
        graph: of the workflows; None: an empty one on the same clock.
        scheduler_config, prefetch_config: budgets; None: the defaults.
        prompts: token ids of all requests in the order in which they will be served; for `belady` only.
        learn: learn the transitions of sessions for which no workflow is declared.
        step_s: assumed seconds from an agent's call to the next agent's, until calls have been observed.
        device: of the model; None: there is none, as in the simulator.
        history: bounds of the record of evictions; None: the defaults.

    Raises:
        ValueError: an unknown name; `belady` without prompts, or another system with them; pages without tokens; memory
            pools that do not fit a model on `device`.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown system {name!r:.60}; known: {', '.join(PRESETS)}")
    if page_size < 1:
        raise ValueError(f"got page_size={page_size}; accepted: 1 or more tokens")
    if (name == "belady") != (prompts is not None):
        given = "no prompts" if prompts is None else "prompts"
        raise ValueError(f"got {given} for the system {name!r}; accepted: prompts for belady, and for no other")
    if device is not None:
        check_devices(pools, device)
    preset, graph = PRESETS[name], StepGraph(clock) if graph is None else graph
    used = {tier: pool for tier, pool in pools.items() if preset.lower_tiers or tier == Tier.DEVICE}
    oracle = None if prompts is None else Belady(prompts, page_size)
    predictor = NextCallPredictor(
        graph, preset.mode, clock, page_size, LearnedTransitions(graph) if learn else None,
        None if oracle is None else oracle.advance, PredictionConfig(step_s=step_s),
    )  # fmt: skip
    suffixes = SuffixReuse(costs) if preset.write_back is WriteBack.WORTH else None
    eviction: EvictionPolicy = {
        "lru": LRU,
        "lfu": LFU,
        "ste": lambda: StepsToExecution(predictor.steps),
        "ste_buckets": lambda: HeldSteps(predictor.steps),
        "expected_time": lambda: ExpectedTime(
            predictor.reuse, costs, rate=lambda: graph.rate, clock=clock, phase=graph.phase, suffix_reuse=suffixes
        ),
        "belady": lambda: oracle,
    }[preset.eviction]()
    eager = EagerWriteBackConfig() if preset.eager_write_back else None
    policy = TierPolicy(eviction, preset.write_back, suffixes, eager, preset.by_page)
    tiers = TieredCache(used, backend, policy, page_size, clock, history)
    graph.share_lock(tiers.lock)
    estimates = Estimates(costs, tiers)
    prefetcher = None
    if preset.prefetch:
        by_use = not eviction.uses_agents
        prefetcher = Prefetcher(
            tiers, estimates, predictor, prefetch_config, only_lower_ranked=not by_use, touch_on_arrival=by_use
        )
    scheduler = Scheduler(
        tiers, estimates, predictor, bytes_per_token, scheduler_config, prefetcher, preset.batch_waits
    )
    return System(name, tiers, graph, predictor, scheduler, prefetcher, estimates)
