"""`tenure bench tree`: time the prefix tree and victim selection against simple implementations.

Times are CPU times of the process: everything is single-threaded Python, and other load disturbs short runs most.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..output import OutputFile, write_rows
from .benching import BenchRow, alternate, median_ratio, show

if TYPE_CHECKING:
    from ...serving import CacheHandle, EvictionHistoryConfig, EvictionPolicy, System, TieredCache
    from ...serving.kvcache.radix_tree import Node


@dataclass
class TreeBenchConfig:
    """Time match, insert, eviction and value updates in a large prefix tree; print a table of ratios."""

    nodes: int = 10_000
    """Nodes in the tree, with --span tokens each."""
    span: int = 96
    """Tokens per node, a multiple of --page."""
    page: int = 16
    """Tokens per page."""
    calls: int = 300
    """Calls per run."""
    runs: int = 5
    """Measured runs per side; medians are reported."""
    json: OutputFile | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        if min(self.nodes, self.page, self.calls, self.runs) < 1 or self.span < 1 or self.span % self.page:
            raise ValueError("--nodes, --page, --calls and --runs accept 1 or more, --span whole pages")
        if self.calls * (self.runs + 2) > self.nodes:
            raise ValueError("--calls times --runs and two more accept up to --nodes: every run needs nodes of its own")


def main(config: TreeBenchConfig) -> int:
    prompts = grow(config)
    rows = prompt_rows(config, prompts)
    for name in ("lru", "ste", "expected_time"):
        rows += victim_rows(config, prompts, name)
    rows.append(value_row(config, prompts))
    rows.append(history_row(config, prompts))
    rows.append(snapshot_row(config))
    show(rows, f"{config.nodes} nodes, {config.nodes * config.span} tokens; medians of {config.runs} runs")
    if config.json:
        write_rows(rows, config.json)
    return 0


def grow(config: TreeBenchConfig) -> list[list[int]]:
    """Prompts that make a tree of `config.nodes` nodes up to 20 deep: each continues a random earlier one."""
    rng = random.Random(0)
    prompts: list[list[int]] = []
    for number in range(config.nodes):
        before = rng.choice(prompts) if number and rng.random() < 0.9 else []
        if len(before) >= 20 * config.span:
            before = []
        prompts.append([*before, *(rng.randrange(50_000) for _ in range(config.span))])
    return prompts


def filled(
    config: TreeBenchConfig, prompts: Sequence[list[int]], order: EvictionPolicy, agents: bool = False,
    history: EvictionHistoryConfig | None = None,
) -> TieredCache:  # fmt: skip
    """A device tier that has all prompts; with `agents`, every prompt is the fixed one of an agent by its number."""
    from ...serving import (
        PhantomPayload,
        PhantomPool,
        Tier,
        TieredCache,
        TierPolicy,
        VirtualClock,
        VirtualTransfer,
        WriteBack,
    )

    clock = VirtualClock()
    pool = PhantomPool(10**12)
    tiers = TieredCache(
        {Tier.DEVICE: pool},
        VirtualTransfer(clock, {}),
        TierPolicy(order, WriteBack.NOTHING),
        config.page,
        clock,
        history,
    )
    for number, prompt in enumerate(prompts):
        clock.advance_to(number)
        with tiers.open(prompt) as handle:
            new = len(prompt) - handle.length
            payload = PhantomPayload(new, 1000 * new) if new else None
            tiers.store(handle, prompt, payload, number if agents else None, len(prompt))
    return tiers


class TokenTrie:
    """The peer: one step of a dictionary a token."""

    def __init__(self) -> None:
        self.steps: dict[tuple[int, int], int] = {}

    def lookup(self, prompt: Sequence[int]) -> int:
        node = 0
        for depth, token in enumerate(prompt):
            following = self.steps.get((node, token))
            if following is None:
                return depth
            node = following
        return len(prompt)

    def insert(self, prompt: Sequence[int]) -> None:
        node = 0
        for token in prompt:
            node = self.steps.setdefault((node, token), len(self.steps) + 1)


def prompt_rows(config: TreeBenchConfig, prompts: list[list[int]]) -> list[BenchRow]:
    """Match and insert of whole prompts given as lists, against a trie of tokens and the aim, 50 µs + 1 µs a page."""
    from ...serving import LRU

    tiers, trie = filled(config, prompts, LRU()), TokenTrie()
    for prompt in prompts:
        trie.insert(prompt)
    rng = random.Random(1)
    asked = rng.sample(prompts, config.calls)
    sides = {name: lambda known=known: [known.lookup(prompt) for prompt in asked]
             for name, known in (("ours", tiers), ("peer", trie))}  # fmt: skip
    seconds = alternate(sides, config.runs, clock=time.process_time)
    rows = _against_aim("match", seconds, asked, config)

    fresh = [[*rng.choice(prompts), *(rng.randrange(50_000) for _ in range(config.span))] for _ in range(config.calls)]
    tails = itertools.count(50_000)  # makes the prompts of every run new
    batches = [_renewed(fresh, next(tails), config.span) for _ in range(config.runs + 1)]
    handles: list[CacheHandle] = []

    def insert() -> None:
        from ...serving import PhantomPayload

        for handle, prompt in zip(handles, opened, strict=True):
            tiers.store(handle, prompt, PhantomPayload(config.span, 1000 * config.span))

    def insert_peer() -> None:
        for prompt in opened:
            trie.insert(prompt)

    seconds = {"ours": [], "peer": []}
    for run, opened in enumerate(batches):
        handles = [tiers.open(prompt) for prompt in opened]
        for side, call in (("ours", insert), ("peer", insert_peer)):
            (spent,) = alternate({side: call}, 1, 0, time.process_time)[side]
            if run:
                seconds[side].append(spent)
        for handle in handles:
            handle.release()
    return rows + _against_aim("insert", seconds, fresh, config)


def _renewed(prompts: list[list[int]], token: int, span: int) -> list[list[int]]:
    """The prompts with last spans that begin otherwise."""
    return [[*prompt[:-span], token, *prompt[1 - span :]] for prompt in prompts]


def _against_aim(
    name: str, seconds: dict[str, list[float]], prompts: list[list[int]], config: TreeBenchConfig
) -> list[BenchRow]:
    ours, peer = ([1e6 * each / len(prompts) for each in seconds[side]] for side in ("ours", "peer"))
    aim = 50 + statistics.mean(len(prompt) for prompt in prompts) / config.page
    middle = statistics.median(ours)
    return [
        BenchRow(f"tree/{name}/vs_trie", middle, statistics.median(peer), median_ratio(peer, ours), "µs", config.runs),
        BenchRow(f"tree/{name}/vs_aim", middle, aim, middle / aim, "µs", config.runs, "<= 1"),
    ]


def _order(name: str, values: dict[int, float]) -> EvictionPolicy:
    from ...serving import LRU, ExpectedTime, LinearCosts, StepsToExecution

    if name == "lru":
        return LRU()
    if name == "ste":
        return StepsToExecution(values)
    return ExpectedTime(values, LinearCosts(10_000.0, (1e9, 0.0)))


def victim_rows(config: TreeBenchConfig, prompts: list[list[int]], name: str) -> list[BenchRow]:
    """Choosing and evicting a victim: against a scan of all nodes, and against a tree of a tenth of the size."""
    from ...serving import Tier

    values = {number: random.Random(number).random() for number in range(config.nodes)}
    large = filled(config, prompts, _order(name, values), agents=name != "lru")
    tenth = max(1, config.nodes // 10)
    small = filled(config, prompts[:tenth], _order(name, values), agents=name != "lru")
    many, few = (max(1, min(config.calls, size // (2 * config.runs + 4))) for size in (config.nodes, tenth))

    def evict(tiers: TieredCache, count: int) -> Callable[[], None]:
        queue = tiers.storage.queues[Tier.DEVICE]

        def run() -> None:
            for _ in range(count):
                node = queue.first()
                assert node is not None
                tiers.evictor.evict(node, Tier.DEVICE)

        return run

    def scan() -> None:
        queue = large.storage.queues[Tier.DEVICE]
        nodes: list[Node] = [node for node in large.tree if node.evictable(Tier.DEVICE)]
        min(nodes, key=queue.rank)

    sides = {"ours": evict(large, many), "scan": scan, "small": evict(small, few)}
    seconds = alternate(sides, config.runs, clock=time.process_time)
    ours = [1e6 * each / many for each in seconds["ours"]]
    scanned = [1e6 * each for each in seconds["scan"]]
    tenths = [1e6 * each / few for each in seconds["small"]]
    middle, n = statistics.median(ours), config.runs
    return [
        BenchRow(f"victim/{name}/vs_scan", middle, statistics.median(scanned), median_ratio(scanned, ours), "µs", n),
        BenchRow(
            f"victim/{name}/n{config.nodes}_vs_n{tenth}",
            middle,
            statistics.median(tenths),
            median_ratio(ours, tenths),
            "µs",
            n,
            "<= 2 times as long",
        ),
    ]


def value_row(config: TreeBenchConfig, prompts: list[list[int]]) -> BenchRow:
    """A new value of one agent and the next victim, against ranking all nodes anew; an agent for every prompt."""
    from ...serving import StepsToExecution, Tier

    values = dict.fromkeys(range(config.nodes), 1.0)
    tiers = filled(config, prompts, StepsToExecution(values), agents=True)
    queue = tiers.storage.queues[Tier.DEVICE]
    rng = random.Random(2)

    def change() -> None:
        for _ in range(config.calls):
            agent = rng.randrange(config.nodes)
            values[agent] = float(rng.randrange(50))
            tiers.values_changed([agent])
            queue.first()

    def rank_all() -> None:
        evictable = [node for node in tiers.tree if node.evictable(Tier.DEVICE)]
        heapq.heapify([(queue.rank(node), number) for number, node in enumerate(evictable)])

    seconds = alternate({"ours": change, "peer": rank_all}, config.runs, clock=time.process_time)
    ours, peer = [1e6 * each / config.calls for each in seconds["ours"]], [1e6 * each for each in seconds["peer"]]
    middle, n = statistics.median(ours), config.runs
    return BenchRow("values/one_agent/vs_rank_all", middle, statistics.median(peer), median_ratio(peer, ours), "µs", n)


def history_row(config: TreeBenchConfig, prompts: list[list[int]]) -> BenchRow:
    """Choosing and evicting a victim, with and without a record of what it was (`EvictionHistory`)."""
    from ...serving import LRU, EvictionHistoryConfig, Tier

    count = max(1, config.nodes // (2 * (config.runs + 1)))
    bounds = {"ours": EvictionHistoryConfig(), "peer": EvictionHistoryConfig(max_records=0)}
    caches = {name: filled(config, prompts, LRU(), history=bound) for name, bound in bounds.items()}

    def evict(tiers: TieredCache) -> None:
        queue = tiers.storage.queues[Tier.DEVICE]
        for _ in range(count):
            node = queue.first()
            assert node is not None
            tiers.evictor.evict(node, Tier.DEVICE)

    sides = {name: lambda tiers=tiers: evict(tiers) for name, tiers in caches.items()}
    seconds = alternate(sides, config.runs, clock=time.process_time)
    ours, peer = ([1e6 * each / count for each in seconds[name]] for name in ("ours", "peer"))
    return BenchRow(
        "victim/history/vs_without", statistics.median(ours), statistics.median(peer), median_ratio(ours, peer), "µs",
        config.runs,
    )  # fmt: skip


SNAPSHOT_WORKFLOWS, SNAPSHOT_AGENTS, SNAPSHOT_AIM_MS = 100, 10, 20.0


def snapshot_row(config: TreeBenchConfig) -> BenchRow:
    """A snapshot of a system with 100 workflows of 10 agents each, a prompt of every agent, and 300 requests."""
    from ...serving.snapshot import SnapshotConfig, take_snapshot

    system = _busy_system(config)
    sides = {"ours": lambda: take_snapshot(system, SnapshotConfig())}
    ours = [1e3 * each for each in alternate(sides, 4 * config.runs, clock=time.process_time)["ours"]]
    middle = statistics.median(ours)
    return BenchRow("snapshot/1000_prompts", middle, SNAPSHOT_AIM_MS, middle / SNAPSHOT_AIM_MS, "ms", len(ours), "<= 1")


def _busy_system(config: TreeBenchConfig) -> System:
    from ...serving import (
        AgentSpec,
        EdgeSpec,
        LinearCosts,
        PhantomPayload,
        PhantomPool,
        Request,
        Tier,
        VirtualClock,
        VirtualTransfer,
        WorkflowSpec,
        build_system,
    )

    clock = VirtualClock()
    pools = {tier: PhantomPool(10**9) for tier in (Tier.DEVICE, Tier.HOST)}
    system = build_system(
        "expected_time", pools, VirtualTransfer(clock, {}), clock=clock, costs=LinearCosts(1000.0, (1e9, 1e9)),
        bytes_per_token=1, page_size=config.page,
    )  # fmt: skip
    fixed = 10 * config.page
    for number in range(SNAPSHOT_WORKFLOWS):
        names = [f"{number}-{agent}" for agent in range(SNAPSHOT_AGENTS)]
        ring = [EdgeSpec(a, b) for a, b in zip(names, names[1:] + names[:1], strict=True)]
        branches = [EdgeSpec(names[i], names[(i + 3) % SNAPSHOT_AGENTS], 0.5) for i in range(0, SNAPSHOT_AGENTS, 2)]
        system.graph.add_workflow(WorkflowSpec(str(number), [*map(AgentSpec, names)], ring + branches, names[:1]))
        for place, name in enumerate(names):
            prompt = [SNAPSHOT_AGENTS * number + place] * fixed + [place] * config.page
            with system.tiers.open(prompt) as handle:
                payload = PhantomPayload(len(prompt), len(prompt))
                system.tiers.store(handle, prompt, payload, name, fixed)
        for place in range(3):
            request = Request(f"{number}-{place}", [place] * 100, 8, workflow=str(number), agent=names[place])
            system.scheduler.submit(request)
    system.scheduler.next_batch()
    return system
