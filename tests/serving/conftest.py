"""KV that is recognisable by its prompt, and caches on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tenure.eviction import Session, evict
from tenure.scripts.soak.faulty_kv import TOKEN_BYTES, FaultyTransfer, assert_holds, damage, kv_of
from tenure.serving import (
    LRU,
    AllocStatus,
    DiskPool,
    LinkSpeed,
    MemoryPool,
    Tier,
    TieredCache,
    TierPolicy,
    VirtualClock,
    VirtualTransfer,
)
from tenure.serving.kvcache.memory_pool import Pool
from tenure.serving.kvcache.radix_tree import Node

from .engines import gates_of

ALL_LINKS = {(a, b): LinkSpeed(1000.0) for a in Tier for b in Tier if a != b}


def ids_of(node: Node) -> list[int]:
    """The prompt that ends at `node`."""
    return memoryview(b"".join(reversed([each.span for each in node.path()]))).cast("i").tolist()


def node_of(tiers: TieredCache, prompt: Sequence[int]) -> Node:
    """The node that `prompt` ends with."""
    return tiers.lookup(prompt).nodes[-1]


def later(tiers: TieredCache, seconds: float = 100.0) -> None:
    """Advances the clock of `make_tiers`."""
    assert isinstance(tiers.clock, VirtualClock)
    tiers.clock.advance_to(tiers.clock() + seconds)
    tiers.poll()


class Kv:
    """The helpers of this file, as a fixture."""

    FaultyTransfer = FaultyTransfer
    ids_of = staticmethod(ids_of)
    damage = staticmethod(damage)

    of = staticmethod(kv_of)
    assert_holds = staticmethod(assert_holds)
    token_bytes = TOKEN_BYTES
    links = ALL_LINKS


@pytest.fixture
def session(tiny_llama) -> Iterator[Session]:
    """What an engine with compression needs."""
    with evict(tiny_llama, "full", gates=gates_of(tiny_llama), observe=["retention"]) as session:
        yield session


@pytest.fixture
def kv() -> type[Kv]:
    return Kv


@pytest.fixture
def make_tiers(tmp_path: Path):
    """A cache with tiers of so many tokens (the disk: bytes) on a virtual clock; checked and closed at the end."""
    made: list[TieredCache] = []

    def make(
        device: int,
        host: int | None = None,
        disk: int | None = None,
        policy: TierPolicy | None = None,
        page_size: int = 2,
        copies: Callable[..., VirtualTransfer] = VirtualTransfer,
    ) -> TieredCache:
        pools: dict[Tier, Pool] = {Tier.DEVICE: MemoryPool(device * TOKEN_BYTES)}
        if host is not None:
            pools[Tier.HOST] = MemoryPool(host * TOKEN_BYTES)
        if disk is not None:
            pools[Tier.DISK] = DiskPool(disk, tmp_path)
        clock = VirtualClock()
        tiers = TieredCache(pools, copies(clock, ALL_LINKS), policy or TierPolicy(LRU()), page_size, clock)
        made.append(tiers)
        return tiers

    yield make
    for tiers in made:
        tiers.check()
        tiers.close()
        tiers.check()


@pytest.fixture
def cached():
    """Opens a prompt, stores its KV and releases it; False if there was no room."""

    def store(tiers: TieredCache, prompt: Sequence[int], agent=None, fixed: int = 0, compressed: bool = False) -> bool:
        with tiers.open(prompt) as handle:
            end = tiers.whole_pages(len(prompt))
            payload = kv_of(prompt, handle.length, end, compressed) if end > handle.length else None
            return tiers.store(handle, prompt, payload, agent, fixed) is AllocStatus.READY

    return store
