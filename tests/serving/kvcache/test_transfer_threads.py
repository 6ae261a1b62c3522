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


def test_a_copy_that_cannot_be_aborted_ends_nevertheless(kv):
    """Neither the thread nor whoever waits for the copy is lost, whatever a builder raises."""

    class Broken(MemoryPool):
        def new_builder(self, payload, prompt=None):
            builder = super().new_builder(payload)

            def fail(*_):
                raise OSError("broken")

            builder.write = builder.abort = fail  # pyright: ignore[reportAttributeAccessIssue]
            return builder

    pools: dict[Tier, Pool] = {Tier.DEVICE: MemoryPool(4 * kv.token_bytes), Tier.HOST: Broken(10**4)}
    tiers = TieredCache(pools, ThreadedTransfer(), TierPolicy(LRU(), WriteBack.ALL), page_size=2)
    for number in range(3):
        with tiers.open([number] * 4) as handle:
            assert handle.wait(1.0) is LoadState.READY
            while tiers.store(handle, [number] * 4, kv.of([number] * 4, 0, 4)) is not AllocStatus.READY:
                events = tiers.num_events
                tiers.poll()
                assert not tiers.has_transfers or tiers.wait(events, 5.0), "the copy ends"
    assert tiers.statistics.copies_failed == 2
    tiers.close()
    tiers.check()
