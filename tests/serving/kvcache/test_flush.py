"""After a flush nothing old is found, in any tier, by anybody; requests in progress finish on what they hold."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from random import Random

import pytest
import torch

from tenure.serving import (
    LRU,
    AllocStatus,
    DiskPool,
    LoadState,
    MemoryPool,
    TensorPayload,
    ThreadedTransfer,
    Tier,
    TieredCache,
    TierPolicy,
    Urgency,
    VirtualClock,
    VirtualTransfer,
    WriteBack,
)

ALL = TierPolicy(LRU(), WriteBack.ALL)
A, B = [1, 1, 2, 2], [1, 1, 3, 3]


def later(tiers, seconds: float = 100.0) -> None:
    tiers.clock.advance_to(tiers.clock() + seconds)
    tiers.poll()


def test_nothing_old_is_found_in_any_tier(make_tiers, cached):
    tiers = make_tiers(device=4, host=4, disk=10_000, policy=ALL)
    for token in range(4):
        while not cached(tiers, [token] * 4, agent=str(token), fixed=4):
            later(tiers)
    later(tiers)
    assert all(any(node.copies[tier] is not None for node in tiers.tree) for tier in Tier)
    tiers.take_moved_agents()
    tiers.flush()
    assert all(pool.used == 0 for pool in tiers.pools.values()) and tiers.tree.size == 0 and not tiers.tree.roots
    assert not list(tiers.pools[Tier.DISK].folder.glob("*.kv"))
    assert not tiers.agents() and sorted(tiers.take_moved_agents()) == ["0", "1", "2", "3"]
    for token in range(4):
        assert tiers.lookup([token] * 4).length == 0 and tiers.open_agent(str(token)) is None
    assert cached(tiers, [0] * 4, agent="0", fixed=4) and tiers.lookup([0] * 4).length == 4


def test_a_request_in_progress_finishes_on_what_it_holds(make_tiers, cached, kv):
    tiers = make_tiers(device=20, policy=ALL)
    assert cached(tiers, A) and cached(tiers, B)
    old = tiers.open(A)
    tiers.flush()
    assert tiers.lookup(A).length == 0 and tiers.pools[Tier.DEVICE].used == 4 * kv.token_bytes, "B was discarded"
    assert old.length == 4 and old.load() is LoadState.READY
    longer = [*A, 5, 5]
    assert tiers.store(old, longer, kv.of(longer, 4, 6), "planner", 6) is AllocStatus.READY
    kv.assert_holds(old.payloads(), longer)
    assert tiers.lookup(longer).length == 0 and not tiers.agents()
    assert cached(tiers, A), "computed anew, beside the old one"
    tiers.check()
    tiers.flush()
    kv.assert_holds(old.payloads(), longer)
    assert tiers.lookup(A).length == 0
    old.release()
    assert tiers.pools[Tier.DEVICE].used == 0 and tiers.tree.size == 0 and not tiers.storage.retired


def test_a_handle_without_tokens_stays_in_the_old_tree(make_tiers, kv):
    """Its request was admitted before the flush; what it computes is of the old weights."""
    tiers = make_tiers(device=20)
    with tiers.open(A) as handle:
        tiers.flush()
        assert tiers.store(handle, A, kv.of(A, 0, 4)) is AllocStatus.READY
        assert tiers.lookup(A).length == 0
        kv.assert_holds(handle.payloads(), A)
        tiers.check()
    assert tiers.pools[Tier.DEVICE].used == 0 and not tiers.storage.retired


def test_a_load_that_a_request_waits_for_goes_on_and_others_are_cancelled(make_tiers, cached, kv):
    tiers = make_tiers(device=4, host=20, policy=ALL)
    assert cached(tiers, A)
    while not cached(tiers, [5] * 4):
        later(tiers)
    tiers.evictor.make_room(Tier.DEVICE, 4 * kv.token_bytes)
    later(tiers)
    handle = tiers.open(A)
    assert handle.load() is LoadState.LOADING
    unwanted = tiers.open([5] * 4)
    tiers.flush()
    unwanted.release()
    assert handle.wait(100) is LoadState.READY
    kv.assert_holds(handle.payloads(), A)
    handle.release()
    assert all(pool.used == 0 for pool in tiers.pools.values())


def test_a_write_back_in_progress_leaves_nothing(make_tiers, cached):
    tiers = make_tiers(device=4, disk=10_000, policy=ALL)
    assert cached(tiers, A) and not cached(tiers, [5] * 4)
    assert tiers.has_transfers
    tiers.flush()
    later(tiers)
    assert not tiers.has_transfers and all(pool.used == 0 for pool in tiers.pools.values())
    assert tiers.tree.size == 0 and not tiers.storage.retired and not list(tiers.pools[Tier.DISK].folder.glob("*.kv"))


@pytest.mark.parametrize("new", ["weights 2", None])
def test_what_is_stored_after_a_flush_is_of_the_new_fingerprint(new, tmp_path: Path, kv, cached):
    """A restart with the old weights must not find it, nor one with the new weights what was before."""

    def start(fingerprint):
        clock = VirtualClock()
        pools = {Tier.DEVICE: MemoryPool(4 * kv.token_bytes), Tier.DISK: DiskPool(10**5, tmp_path, fingerprint)}
        return TieredCache(pools, VirtualTransfer(clock, kv.links), ALL, 2, clock)

    tiers = start("weights 1")
    for prompt in (A, [5] * 4):
        while not cached(tiers, prompt):
            later(tiers)
    held = tiers.open(A)  # on disk: its file outlives the flush
    with pytest.raises(ValueError, match="an empty fingerprint"):
        tiers.flush("")
    assert held.length == 4 and tiers.lookup(A).length == 4, "nothing has changed"
    tiers.flush(new)
    for prompt in ([6] * 4, [7] * 4):
        while not cached(tiers, prompt):
            later(tiers)
    assert len(list(tiers.pools[Tier.DISK].folder.glob("*.kv"))) == 2  # pyright: ignore[reportAttributeAccessIssue]
    tiers.close()
    for fingerprint in ("weights 1", "weights 2"):
        again = start(fingerprint)
        found = [prompt for prompt in (A, [5] * 4, [6] * 4, [7] * 4) if again.lookup(prompt).length]
        assert found == ([[6] * 4] if fingerprint == new else [])
        again.close()


def versioned(prompt: list[int], start: int, end: int, version: int) -> TensorPayload:
    """KV that says which weights made it."""
    ids = torch.tensor(prompt[start:end], dtype=torch.float32).view(1, 1, -1, 1)
    return TensorPayload({"layers.0.key": ids + 100 * version}, end - start)


def test_flushes_among_requests_of_many_threads(tmp_path: Path):
    """Whoever opens a prompt after a flush has begun finds only KV of that version or a later one."""
    pools = {Tier.DEVICE: MemoryPool(40 * 4), Tier.HOST: MemoryPool(30 * 4), Tier.DISK: DiskPool(20_000, tmp_path, "0")}
    tiers = TieredCache(pools, ThreadedTransfer(), ALL, page_size=2)
    version, failures, served = 0, [], 0

    def engine(seed: int) -> None:
        nonlocal served
        random = Random(seed)
        try:
            for _ in range(600):
                prompt = [random.randrange(3) for _ in range(random.randrange(2, 13))]
                with tiers.lock:
                    mine, handle = version, tiers.open(prompt)
                with handle:
                    if random.random() < 0.2:
                        handle.load(Urgency.PREFETCH, only_lower_ranked=True)
                        continue
                    if handle.wait(0.5) is not LoadState.READY:
                        continue
                    end = tiers.whole_pages(len(prompt))
                    if end > handle.length:
                        tiers.store(handle, prompt, versioned(prompt, handle.length, end, mine))
                    if handle.load() is not LoadState.READY:
                        continue
                    got = [p.tensors["layers.0.key"].flatten() for p in handle.payloads()]  # pyright: ignore
                    wanted = torch.tensor(prompt[: handle.length]) + 100 * mine
                    assert not got or torch.equal(torch.cat(got), wanted.float())
                    served += 1
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=engine, args=(seed,), daemon=True) for seed in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.005)
            with tiers.lock:
                version += 1
                tiers.flush(str(version))
                tiers.check()
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]
    assert served > 50 and version > 3
    tiers.flush()
    while tiers.has_transfers:
        tiers.poll()
    assert all(pool.used == 0 for pool in pools.values()) and not tiers.tree.roots
    tiers.close()
