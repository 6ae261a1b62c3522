"""A cache shared by threads, with transfers on threads."""

from __future__ import annotations

import sys
import threading
from random import Random

from tenure.serving import (
    LRU,
    AllocStatus,
    DiskPool,
    LoadState,
    MemoryPool,
    ThreadedTransfer,
    Tier,
    TieredCache,
    TierPolicy,
    Urgency,
    WriteBack,
)
from tenure.serving.kvcache.memory_pool import Pool


def test_many_threads_share_tiers(tmp_path, kv):
    """Four threads with engines, three tiers, real copies: all that is read is correct, and all counts agree."""
    pools: dict[Tier, Pool] = {
        Tier.DEVICE: MemoryPool(40 * kv.token_bytes),
        Tier.HOST: MemoryPool(30 * kv.token_bytes),
        Tier.DISK: DiskPool(9000, tmp_path),
    }
    tiers = TieredCache(pools, ThreadedTransfer(), TierPolicy(LRU(), WriteBack.ALL), page_size=2)
    failures, counts = [], {state: 0 for state in LoadState}

    def engine(seed: int) -> None:
        random = Random(seed)
        try:
            for _ in range(60):
                prompt = [random.randrange(3) for _ in range(random.randrange(1, 13))]
                with tiers.open(prompt) as handle:
                    if random.random() < 0.2:
                        handle.load(Urgency.PREFETCH, only_lower_ranked=True)
                        continue
                    state = handle.wait(0.5)
                    counts[state] += 1
                    if state is not LoadState.READY:
                        continue
                    kv.assert_holds(handle.payloads(), prompt[: handle.length])
                    end = tiers.whole_pages(len(prompt))
                    new = kv.of(prompt, handle.length, end) if end > handle.length else None
                    if tiers.store(handle, prompt, new) is AllocStatus.READY and handle.load() is LoadState.READY:
                        kv.assert_holds(handle.payloads(), prompt[:end])
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=engine, args=(seed,), daemon=True) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "no thread waits for ever"
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]
    assert counts[LoadState.READY] > 50 and not tiers.handles
    tiers.check()
    assert tiers.statistics.bytes_moved, "tiers were used"
    tiers.close()
    tiers.check()
    assert not tiers.has_transfers
