"""Engines on a tiny model with little room, and the answers of the model without any cache."""

from __future__ import annotations

import time
from typing import Any

import torch

from tenure.eviction import Session
from tenure.retention import RetentionGates
from tenure.serving import (
    AgentSpec,
    DiskPool,
    EdgeSpec,
    LinearCosts,
    MemoryPool,
    Request,
    SchedulerConfig,
    ThreadedTransfer,
    Tier,
    WorkflowSpec,
    build_system,
)
from tenure.serving.engine import Compression, Engine
from tenure.serving.kvcache.memory_pool import Pool
from tenure.serving.prompt_cache import PromptKV

AGENTS, FIXED, SUFFIX, ANSWER, PAGE = 5, 48, 9, 6, 8
RETENTION = Compression("retention", 0.4, sinks=2, recent=4)


def gates_of(model, seed: int = 1, **options) -> RetentionGates:
    torch.manual_seed(seed)
    return RetentionGates.for_model(model, gate_width=8, init_std=0.5, initial_bias=2.0, **options)


def tokens(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (count,), generator=generator).tolist()


def fixed_prompt(agent: int) -> list[int]:
    """The first pages are common to all agents."""
    return tokens(1000, 16) + tokens(agent, FIXED - 16)


def calls(rounds: int = 3) -> list[tuple[int, list[int]]]:
    """Agent and prompt of each call around the ring."""
    return [(n % AGENTS, fixed_prompt(n % AGENTS) + tokens(100 + n, SUFFIX)) for n in range(rounds * AGENTS)]


def answer_without_cache(
    session: Session, prompt: list[int], how: Compression | None, fixed: int = FIXED, count: int = ANSWER
) -> list[int]:
    """Greedy, on a fresh cache; the fixed prompt is computed and compressed on its own if `how` says so."""
    kv = PromptKV(session)
    cache = session.new_cache()
    if how is not None:
        kv.forward(cache, prompt[:fixed])
        kv.compress(cache, how)
        prompt = prompt[fixed:]
    answer, following = [], prompt
    while len(answer) < count and answer[-1:] != [2]:
        answer.append(int(kv.forward(cache, following).argmax()))
        following = answer[-1:]
    return answer


def make_engine(
    session: Session, name: str, how: Compression | None = None, prompts: float = 1.7, host: float = 20.0,
    disk: Any = None, speed: float | None = None, config: SchedulerConfig | None = None, **options: Any,
) -> Engine:  # fmt: skip
    """An engine whose device pool holds so many of the fixed prompts uncompressed, beside one request."""
    rate = PromptKV(session).bytes_per_token()
    pools: dict[Tier, Pool] = {Tier.DEVICE: MemoryPool(int(rate * (prompts * FIXED + FIXED + SUFFIX + ANSWER + PAGE)))}
    if host:
        pools[Tier.HOST] = MemoryPool(int(rate * host * FIXED))
    if disk is not None:
        pools[Tier.DISK] = DiskPool(10**9, disk)
    links = {(a, b): speed for a in Tier for b in Tier if a != b} if speed else None
    known = [prompt for _, prompt in calls()] if name == "belady" else None
    system = build_system(
        name, pools, ThreadedTransfer(links), costs=LinearCosts(2000.0, (1e8, 1e8), 0.0), bytes_per_token=rate,
        clock=time.monotonic, page_size=PAGE, prompts=known, scheduler_config=config,
    )  # fmt: skip
    names = [f"agent{i}" for i in range(AGENTS)]
    edges = [EdgeSpec(names[i], names[(i + 1) % AGENTS]) for i in range(AGENTS)]
    system.graph.add_workflow(WorkflowSpec("ring", [AgentSpec(name) for name in names], edges))
    return Engine(session, system, how, **options)


def request(number: int, agent: int, prompt: list[int], **options) -> Request:
    who = {"workflow": "ring", "agent": f"agent{agent}", "fixed_tokens": FIXED}
    return Request(f"call{number}", prompt, ANSWER, **who, **options)


def close(engine: Engine) -> None:
    engine.system.scheduler.close("the test is over")
    engine.step(0.0)
    tiers = engine.system.tiers
    tiers.tree.check()
    tiers.transfers.check()
    if engine.system.name != "expected_time":  # whose values are other ones at every moment
        tiers.check()
    assert not engine._answering
    check_memory(engine)
    tiers.close()
    engine.pages.check()
    assert engine.pages.num_free == engine.pages.num_pages, "nobody holds pages any more"


def check_memory(engine: Engine) -> None:
    """What the pool counts is what is held, but for pages that are reserved and not written to yet."""
    tiers, pages = engine.system.tiers, engine.pages
    pool = tiers.pools[Tier.DEVICE]
    # A copying thread gives up the pages of a cancelled copy before the cache counts it as ended.
    arriving = sum(job.allocated for job in tiers.transfers.jobs.values() if job.target is Tier.DEVICE)
    held = (pages.num_pages - pages.num_free) * pages.geometry.page_bytes
    assert pool.used - pool.reserved - arriving <= held <= pool.used <= pool.capacity
