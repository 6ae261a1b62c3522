"""The life of a node: written back on eviction, loaded on demand, at once or after transfers, and with faults."""

from __future__ import annotations

import gc
import weakref

from tenure.serving import (
    LRU,
    AllocStatus,
    LoadState,
    MemoryPool,
    Status,
    StepsToExecution,
    Tier,
    TieredCache,
    TierPolicy,
    Urgency,
    VirtualClock,
    VirtualTransfer,
    WriteBack,
)
from tenure.serving.kvcache.radix_tree import Pages, encode
from tenure.serving.kvcache.transfer_queue import Outcome

from ..conftest import later, node_of

ALL = TierPolicy(LRU(), WriteBack.ALL)
A, B, C, D = ([n] * 4 for n in (1, 2, 3, 4))


def spill(tiers: TieredCache, cached, prompt: list[int], agent: str | None = None) -> None:
    """Stores `prompt`, waiting for write-backs to make room."""
    later(tiers, 1.0)
    if not cached(tiers, prompt, agent, len(prompt)):
        later(tiers)
        assert cached(tiers, prompt, agent, len(prompt))


def test_written_back_on_eviction_and_loaded_on_demand(make_tiers, cached, kv):
    tiers = make_tiers(device=8, host=8, policy=ALL)
    for prompt in (A, B, C):
        spill(tiers, cached, prompt)
    assert [node_of(tiers, prompt).status for prompt in (A, B, C)] == [Status.CPU, Status.GPU, Status.GPU]
    with tiers.open(A) as handle:
        assert handle.load() is LoadState.WAITING, "B is being written back"
        assert node_of(tiers, B).status is Status.OFFLOADING
        assert handle.wait(100) is LoadState.READY
        kv.assert_holds(handle.payloads(), A)
        assert node_of(tiers, B).status is Status.CPU
    assert node_of(tiers, A).copies[Tier.HOST] is not None, "a loaded node keeps its copy below"
    assert tiers.evictor.make_room(Tier.DEVICE, 8 * kv.token_bytes) is AllocStatus.PENDING
    assert [node_of(tiers, prompt).status for prompt in (A, C)] == [Status.CPU, Status.OFFLOADING]
    later(tiers)
    assert [tiers.lookup(prompt).length for prompt in (A, B, C)] == [4, 0, 4], "B, the oldest, made room for C below"
    assert tiers.statistics.bytes_moved[Tier.DEVICE, Tier.HOST] == 3 * 4 * kv.token_bytes


def test_the_host_evicts_by_the_same_policy(make_tiers, cached):
    steps = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    tiers = make_tiers(device=4, host=8, policy=TierPolicy(StepsToExecution(steps), WriteBack.FIXED))
    for prompt, agent in ((C, "c"), (A, "a"), (B, "b"), (D, "d")):
        spill(tiers, cached, prompt, agent)
    # B was written back when C and A filled the host: C is evicted, although A was used earlier.
    assert [tiers.lookup(prompt).length for prompt in (A, B, C, D)] == [4, 4, 0, 4]
    steps.update(a=9.0, d=1.0)
    tiers.values_changed()
    spill(tiers, cached, [5] * 4, "unknown")
    assert [tiers.lookup(prompt).length for prompt in (A, B, D)] == [0, 4, 4]


def test_suffixes_are_dropped_and_fixed_prompts_saved(make_tiers, cached):
    tiers = make_tiers(device=8, host=8, policy=TierPolicy(StepsToExecution({"a": 1.0}), WriteBack.FIXED))
    assert cached(tiers, [*A, *B], "a", 4)
    assert [node.length for node in tiers.lookup([*A, *B]).nodes] == [4, 4]
    assert tiers.evictor.make_room(Tier.DEVICE, tiers.pools[Tier.DEVICE].capacity) is AllocStatus.PENDING
    assert tiers.lookup([*A, *B]).length == 4
    later(tiers)
    assert node_of(tiers, A).status is Status.CPU
    assert tiers.statistics.dropped == 1 and tiers.statistics.evicted_copies == 2


def test_without_room_below_the_next_tier_is_tried_then_the_copy_is_dropped(make_tiers, cached):
    tiers = make_tiers(device=4, host=2, disk=2000, policy=ALL)
    spill(tiers, cached, A)
    spill(tiers, cached, B)
    assert node_of(tiers, A).status is Status.DISK
    small = make_tiers(device=4, host=2, policy=ALL)
    assert cached(small, A) and cached(small, B), "nothing to wait for"
    assert small.lookup(A).length == 0 and small.statistics.dropped == 1


def test_a_referenced_prompt_stays_and_too_large_a_load_is_refused(make_tiers, cached, kv):
    tiers = make_tiers(device=8, host=16, policy=ALL)
    for prompt in (A, B, C):
        spill(tiers, cached, prompt)
    with tiers.open(B) as first, tiers.open(C) as second, tiers.open(A) as third:
        assert first.load() is second.load() is LoadState.READY
        assert third.load() is LoadState.NO_ROOM
        assert not cached(tiers, D)
        second.release()
        assert third.wait(100) is LoadState.READY
        kv.assert_holds(first.payloads(), B)
        kv.assert_holds(third.payloads(), A)
    assert tiers.statistics.refused == 1


def test_a_prefetch_spares_what_ranks_higher(make_tiers, cached):
    steps = {"a": 5.0, "b": 1.0}
    tiers = make_tiers(device=4, host=8, policy=TierPolicy(StepsToExecution(steps), WriteBack.FIXED))
    spill(tiers, cached, A, "a")
    spill(tiers, cached, B, "b")
    handle = tiers.open_agent("a")
    assert handle is not None and handle.length == 4
    assert handle.load(Urgency.PREFETCH, only_lower_ranked=True) is LoadState.NO_ROOM
    steps.update(a=1.0, b=5.0)
    tiers.values_changed(["a", "b"])
    assert handle.load(Urgency.PREFETCH, only_lower_ranked=True) is LoadState.WAITING
    later(tiers)
    assert handle.load(Urgency.PREFETCH, only_lower_ranked=True) is LoadState.LOADING
    later(tiers)
    assert handle.load() is LoadState.READY
    handle.release()
    assert tiers.open_agent("nobody") is None
    tiers.forget_agent("a")
    assert tiers.open_agent("a") is None and tiers.lookup(A).length == 4


def test_a_load_is_shared_promoted_and_cancelled_by_the_last_waiter(make_tiers, cached):
    tiers = make_tiers(device=4, host=8, policy=ALL)
    spill(tiers, cached, A)
    spill(tiers, cached, B)
    first, second = tiers.open(A), tiers.open(A)
    assert first.load(Urgency.PREFETCH) is LoadState.WAITING
    later(tiers)
    assert first.load(Urgency.PREFETCH) is LoadState.LOADING
    assert second.load() is LoadState.LOADING
    (job,) = tiers.transfers.jobs.values()
    assert job.urgency is Urgency.DEMAND, "one copy, as urgent as the more urgent of the two"
    first.release()
    assert not job.cancelled
    second.cancel_loads()
    assert job.cancelled
    tiers.check()
    later(tiers)
    assert tiers.statistics.copies_cancelled == 1
    assert tiers.statistics.bytes_wasted[Tier.HOST, Tier.DEVICE] > 0
    assert node_of(tiers, A).status is Status.CPU and tiers.pools[Tier.DEVICE].used == 0
    assert second.wait(100) is LoadState.READY
    second.release()
    second.release()


def test_a_demand_cancels_a_prefetch_for_its_memory(make_tiers, cached, kv):
    tiers = make_tiers(device=4, host=12, policy=ALL)
    for prompt in (A, B, C):
        spill(tiers, cached, prompt)
    tiers.evictor.make_room(Tier.DEVICE, 4 * kv.token_bytes)
    later(tiers)
    ahead, request, other = tiers.open(A), tiers.open(B), tiers.open(C)
    assert ahead.load(Urgency.PREFETCH) is LoadState.LOADING
    assert other.load(Urgency.PREFETCH) is LoadState.NO_ROOM, "another prefetch does not"
    assert request.load() is LoadState.WAITING
    assert request.wait(100) is LoadState.READY
    kv.assert_holds(request.payloads(), B)
    assert tiers.statistics.copies_cancelled == 1
    assert ahead.load(Urgency.PREFETCH) is other.load() is LoadState.NO_ROOM


def test_a_split_during_a_transfer_is_completed_when_it_has_ended(make_tiers, cached, kv):
    tiers = make_tiers(device=8, host=8, policy=ALL)
    assert cached(tiers, [*A, *B])
    tiers.evictor.make_room(Tier.DEVICE, 1)
    node = node_of(tiers, [*A, *B])
    assert node.status is Status.OFFLOADING
    with tiers.open([*A, *C]) as handle:
        assert handle.length == 0, "not split now, so the match is shorter than possible"
    later(tiers)
    with tiers.open([*A, *C]) as handle:
        assert handle.length == 4 and handle.wait(100) is LoadState.READY
        kv.assert_holds(handle.payloads(), A)
        assert tiers.store(handle, [*A, *C], kv.of([*A, *C], 4, 8)) is AllocStatus.READY
    with tiers.open([*A, *B]) as handle:
        assert handle.length == 8


def test_a_used_copy_outlives_its_eviction(make_tiers, cached, kv):
    """A handle opened during the write-back keeps the device's copy."""
    tiers = make_tiers(device=4, host=8, policy=ALL)
    assert cached(tiers, A)
    assert tiers.evictor.make_room(Tier.DEVICE, 1) is AllocStatus.PENDING
    with tiers.open(A) as handle:
        assert handle.load() is LoadState.READY
        later(tiers)
        kv.assert_holds(handle.payloads(), A)
        node = node_of(tiers, A)
        assert node.copies[Tier.DEVICE] is not None and node.copies[Tier.HOST] is not None


def test_failed_loads_and_write_backs(make_tiers, cached, kv):
    tiers = make_tiers(device=4, host=8, policy=ALL, copies=kv.FaultyTransfer)
    mover = tiers.transfers.backend
    spill(tiers, cached, A)
    spill(tiers, cached, B)
    with tiers.open(A) as handle:
        assert handle.load() is LoadState.WAITING
        later(tiers)
        mover.fault = RuntimeError("bus error")
        assert handle.load() is LoadState.LOADING
        later(tiers)
        assert tiers.statistics.copies_failed == 1 and tiers.pools[Tier.DEVICE].used == 0
        assert handle.wait(100) is LoadState.READY, "the host still has it"
    tiers.evictor.make_room(Tier.HOST, 8 * kv.token_bytes)
    assert node_of(tiers, A).status is Status.GPU and tiers.lookup(B).length == 0
    mover.fault = RuntimeError("bus error")
    assert tiers.evictor.make_room(Tier.DEVICE, 1) is AllocStatus.PENDING
    later(tiers)
    assert tiers.lookup(A).length == 0, "an eviction whose write-back fails proceeds without it"
    assert all(pool.used == 0 for pool in tiers.pools.values())


def test_recomputed_kv_is_stored_on_the_device(make_tiers, cached, kv):
    tiers = make_tiers(device=4, host=8, policy=ALL)
    spill(tiers, cached, A)
    spill(tiers, cached, B)
    handle = tiers.open([])
    assert tiers.evictor.make_room(Tier.DEVICE, 1) is AllocStatus.PENDING
    later(tiers)
    assert node_of(tiers, A).status is Status.CPU
    assert tiers.store(handle, A, kv.of(A, 0, 4)) is AllocStatus.READY, "computed by a request that did not wait"
    kv.assert_holds(handle.payloads(), A)
    assert tiers.pools[Tier.DEVICE].used == 4 * kv.token_bytes
    handle.release()


def test_less_memory_than_the_capacity(make_tiers, cached):
    class Lying(MemoryPool):
        def new_builder(self, payload):  # pyright: ignore[reportIncompatibleMethodOverride]
            raise RuntimeError("out of memory")

    clock = VirtualClock()
    pools = {Tier.DEVICE: MemoryPool(4 * 32), Tier.HOST: Lying(10**6)}
    links = make_tiers(device=1).transfers.backend.speeds
    tiers = TieredCache(pools, VirtualTransfer(clock, links), ALL, 2, clock)
    assert cached(tiers, A) and cached(tiers, B), "dropped instead of saved"
    assert pools[Tier.HOST].used == 0 and tiers.lookup(A).length == 0
    tiers.check()


def test_reserved_bytes_are_not_evicted(make_tiers, cached, kv):
    tiers = make_tiers(device=8, host=8, policy=ALL)
    assert cached(tiers, A) and cached(tiers, B)
    size = 4 * kv.token_bytes
    assert tiers.reserve(size, extra=2 * size) is AllocStatus.REFUSED
    assert tiers.reserve(size) is AllocStatus.PENDING, "A is being written back"
    later(tiers)
    assert tiers.reserve(size) is AllocStatus.READY and tiers.pools[Tier.DEVICE].reserved == size
    tiers.check()
    with tiers.open(B) as handle:
        assert handle.load() is LoadState.READY
        assert tiers.reserve(1) is AllocStatus.REFUSED and not cached(tiers, C), "one is referenced, the other reserved"
    tiers.unreserve(size)
    assert tiers.pools[Tier.DEVICE].reserved == 0
    tiers.check()


def test_a_handle_is_truncated(make_tiers, cached):
    tiers = make_tiers(device=20, host=20, policy=ALL)
    assert cached(tiers, [*A, *B], "a", 4)
    with tiers.open([*A, *B]) as handle:
        nodes = handle.nodes()
        assert nodes is not None
        first, second = nodes
        assert (first.ref_count, second.ref_count) == (1, 1)
        handle.truncate(first)
        assert (first.ref_count, second.ref_count, handle.length) == (1, 0, 4)
        tiers.check()
        handle.truncate(first.root)
        assert (first.ref_count, handle.length, handle.payloads()) == (0, 0, [])
        tiers.check()


def test_encoded_pages_are_not_encoded_again(make_tiers, cached):
    tiers = make_tiers(device=20)
    assert cached(tiers, A)
    pages = Pages(encode(A, 2))
    assert encode(pages, 2) is pages and tiers.lookup(pages).length == 4
    statistics = tiers.statistics
    before = statistics.tokens_asked
    tiers.open(pages, retry=True).release()
    assert statistics.tokens_asked == before
    tiers.open(pages).release()
    assert statistics.tokens_asked == before + 4


def test_listeners_are_called_with_every_transfer_that_has_ended(make_tiers, cached, kv):
    tiers, heard = make_tiers(device=4, host=8, policy=ALL, copies=kv.FaultyTransfer), []
    tiers.transfers.listeners.append(lambda job: heard.append((job.target, job.outcome)))
    assert cached(tiers, A)
    tiers.evictor.make_room(Tier.DEVICE, 1)
    later(tiers)
    with tiers.open(A) as handle:
        handle.load()
        assert tiers.transfers.demand_bytes[Tier.HOST, Tier.DEVICE] == 4 * kv.token_bytes
        tiers.transfers.backend.fault = RuntimeError("bus error")
        later(tiers)
        assert tiers.transfers.demand_bytes[Tier.HOST, Tier.DEVICE] == 0
    assert heard == [(Tier.HOST, Outcome.DONE), (Tier.DEVICE, Outcome.FAILED)]


def test_closing_frees_the_memory(make_tiers, cached, kv):
    tiers = make_tiers(device=12, host=12, policy=ALL)
    for prompt in (A, A + B, C):
        spill(tiers, cached, prompt)
    copies = [weakref.ref(payload) for node in tiers.tree for payload in node.copies if payload is not None]
    handle = tiers.open(C)
    gc.disable()
    try:
        tiers.close()
        assert len(copies) >= 3 and not any(payload() for payload in copies)
    finally:
        gc.enable()
    assert [pool.used for pool in tiers.pools.values()] == [0, 0]
    assert [node.end for node in tiers.tree] == [4], "a handle keeps its nodes, without data"
    handle.release()
    assert not list(tiers.tree)
