"""Fixed prompts are saved before an eviction needs their memory, and requests evict nodes that are saved already."""

from __future__ import annotations

import pytest

from tenure.scripts.soak.faulty_kv import TOKEN_BYTES
from tenure.serving import (
    LRU,
    AllocStatus,
    DiskPool,
    EagerWriteBackConfig,
    ExpectedTime,
    LinearCosts,
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
    get_tier_policy,
)
from tenure.serving.kvcache.memory_pool import Pool
from tenure.serving.kvcache.transfer_queue import Outcome

from ..conftest import later, node_of

A, B, C = ([n] * 4 for n in (1, 2, 3))
SECONDS = 4 * TOKEN_BYTES / 1000  # of a copy of four tokens, see `conftest`
EAGER = EagerWriteBackConfig()


def by_steps(**steps: float) -> TierPolicy:
    return TierPolicy(StepsToExecution(steps), WriteBack.FIXED, eager=EAGER)


def jobs(tiers: TieredCache) -> list[tuple[list[int], Tier, Urgency]]:
    return [
        (list(memoryview(job.owner.span).cast("i")), job.target, job.urgency) for job in tiers.transfers.jobs.values()
    ]


def test_a_full_device_is_saved_in_the_order_of_eviction(make_tiers, cached, kv):
    tiers = make_tiers(device=14, host=16, policy=by_steps(a=1, b=2, c=3))
    for prompt, agent in ((A, "a"), (B, "b"), (C, "c")):
        assert not jobs(tiers), "nothing is saved while there is room for one more"
        assert cached(tiers, prompt, agent, 4)
    tiers.write_back_eagerly()
    for prompt in (C, B, A):
        assert jobs(tiers) == [(prompt, Tier.HOST, Urgency.EAGER)], "one at a time, as they would be evicted"
        assert node_of(tiers, prompt).status is Status.OFFLOADING
        later(tiers)
    assert not jobs(tiers)
    assert [node_of(tiers, p).copies[Tier.HOST] is not None for p in (A, B, C)] == [True] * 3
    assert tiers.evictor.make_room(Tier.DEVICE, 14 * kv.token_bytes) is AllocStatus.READY, "no transfer is needed"
    assert tiers.statistics.bytes_moved[Tier.DEVICE, Tier.HOST] == 3 * 4 * kv.token_bytes, "each once"


def test_nothing_is_saved_while_evictable_suffixes_suffice(make_tiers, cached):
    tiers = make_tiers(device=10, host=16, policy=by_steps(a=1))
    assert cached(tiers, A, "a", 4) and cached(tiers, [9] * 4)
    tiers.write_back_eagerly()
    assert not jobs(tiers), "four tokens in nobody's prompt are evicted before"
    assert cached(tiers, [*A, 7, 7]), "two more in no fixed prompt"
    assert cached(tiers, B, "b", 4), "in place of four tokens in no fixed prompt"
    tiers.write_back_eagerly()
    assert [prompt for prompt, _, _ in jobs(tiers)] == [B], "two are left; A is built on"


def test_an_eviction_takes_over_an_eager_write_back(make_tiers, cached, kv):
    tiers = make_tiers(device=8, host=16, policy=by_steps(a=1, b=2))
    assert cached(tiers, A, "a", 4) and cached(tiers, B, "b", 4)
    tiers.write_back_eagerly()
    later(tiers, 0.5 * SECONDS)
    assert tiers.evictor.first_rank(Tier.DEVICE) < tiers.storage.queues[Tier.DEVICE].first_rank()
    assert tiers.evictor.make_room(Tier.DEVICE, 4 * kv.token_bytes) is AllocStatus.PENDING
    assert jobs(tiers) == [(B, Tier.HOST, Urgency.WRITE_BACK)]
    assert tiers.pools[Tier.DEVICE].pending_free == 4 * kv.token_bytes
    tiers.check()
    later(tiers, 0.6 * SECONDS)
    assert node_of(tiers, B).status is Status.CPU and node_of(tiers, A).copies[Tier.DEVICE] is not None
    assert tiers.evictor.make_room(Tier.DEVICE, 4 * kv.token_bytes) is AllocStatus.READY


def test_a_lower_ranked_node_is_evicted_before_one_that_is_being_saved(make_tiers, cached, kv):
    steps = {"a": 1.0, "b": 2.0}
    tiers = make_tiers(device=8, host=16, policy=TierPolicy(StepsToExecution(steps), WriteBack.FIXED, eager=EAGER))
    assert cached(tiers, A, "a", 4) and cached(tiers, B, "b", 4)
    tiers.write_back_eagerly()
    steps["a"] = 3.0
    tiers.values_changed(["a"])
    assert tiers.evictor.make_room(Tier.DEVICE, 4 * kv.token_bytes) is AllocStatus.PENDING
    assert jobs(tiers) == [(B, Tier.HOST, Urgency.EAGER), (A, Tier.HOST, Urgency.WRITE_BACK)]
    assert tiers.evictor.make_room(Tier.DEVICE, 8 * kv.token_bytes) is AllocStatus.PENDING, "both can be evicted"
    assert [urgency for _, _, urgency in jobs(tiers)] == [Urgency.WRITE_BACK] * 2


def test_a_handle_keeps_a_node_that_is_being_saved(make_tiers, cached, kv):
    tiers = make_tiers(device=8, host=16, policy=by_steps(a=1, b=2))
    assert cached(tiers, A, "a", 4) and cached(tiers, B, "b", 4)
    tiers.write_back_eagerly()
    with tiers.open(B) as handle:
        assert handle.load() is LoadState.READY
        assert tiers.evictor.make_room(Tier.DEVICE, 8 * kv.token_bytes) is AllocStatus.REFUSED
        later(tiers)
        kv.assert_holds(handle.payloads(), B)


@pytest.mark.parametrize("host", [4, 7])
def test_only_available_memory_below_is_used(make_tiers, cached, host):
    tiers = make_tiers(device=8, host=host, policy=by_steps(a=1, b=2))
    assert cached(tiers, A, "a", 4) and cached(tiers, B, "b", 4)
    tiers.write_back_eagerly()
    later(tiers)
    assert not jobs(tiers) and node_of(tiers, B).copies[Tier.HOST] is not None
    assert node_of(tiers, A).copies[Tier.HOST] is None, "the host is full"


def test_a_full_host_is_saved_on_disk(make_tiers, cached):
    tiers = make_tiers(device=4, host=8, disk=10_000, policy=by_steps(a=1, b=2, c=3))
    for prompt, agent in ((A, "a"), (B, "b"), (C, "c")):
        later(tiers)
        while not cached(tiers, prompt, agent, 4):
            later(tiers)
    later(tiers)
    later(tiers)
    on_disk = [node_of(tiers, prompt).copies[Tier.DISK] is not None for prompt in (A, B)]
    assert on_disk == [True, True] and all(node_of(tiers, p).copies[Tier.HOST] is not None for p in (A, B))


def test_a_failed_write_back_is_not_repeated(make_tiers, cached, kv):
    tiers = make_tiers(device=4, host=8, policy=by_steps(a=1), copies=kv.FaultyTransfer)
    assert cached(tiers, A, "a", 4)
    tiers.transfers.backend.fault = RuntimeError("failed")
    ended = []
    tiers.transfers.listeners.append(ended.append)
    tiers.write_back_eagerly()
    later(tiers)
    later(tiers)
    assert [job.outcome for job in ended] == [Outcome.FAILED] and not jobs(tiers)
    assert node_of(tiers, A).status is Status.GPU, "it stays, and is written back when it is evicted"


def test_tracked_nodes_are_bounded(make_tiers, cached):
    policy = TierPolicy(StepsToExecution({}), WriteBack.FIXED, eager=EagerWriteBackConfig(max_tracked=3))
    tiers = make_tiers(device=1000, host=16, policy=policy)
    for number in range(10):
        assert cached(tiers, [number] * 4, f"agent{number}", 4)
    assert len(tiers._eager._unsaved[Tier.DEVICE]) == 3


def test_a_policy_without_agents_can_write_back_eagerly(make_tiers, cached):
    tiers = make_tiers(device=8, host=8, policy=TierPolicy(LRU(), WriteBack.FIXED, eager=EAGER))
    assert cached(tiers, A, "a", 4) and cached(tiers, B, "b", 4)
    assert [prompt for prompt, _, _ in jobs(tiers)] == [A]


def test_only_a_policy_with_a_config_writes_back_eagerly(make_tiers, cached):
    tiers = make_tiers(device=4, host=8, policy=TierPolicy(StepsToExecution({"a": 1.0}), WriteBack.FIXED))
    assert cached(tiers, A, "a", 4)
    tiers.write_back_eagerly()
    assert not jobs(tiers)
    costs = LinearCosts(100.0, (1000.0, 0.0))
    assert get_tier_policy("expected_time", reuse={}, costs=costs).eager
    assert not get_tier_policy("ste", steps={}).eager
    with pytest.raises(ValueError, match=r"got eager with WriteBack\.NOTHING; accepted: with a WriteBack that saves"):
        TierPolicy(LRU(), WriteBack.NOTHING, eager=EAGER)


@pytest.mark.parametrize(("likely", "waits"), [(0.5, False), (1.0, True)])
def test_an_urgent_request_evicts_a_node_that_is_saved_already(make_tiers, cached, kv, likely, waits):
    """A has a copy below and ranks above B, which has none: it is evicted first, unless it is certain to be needed."""
    reuse = {"a": 0.0, "b": 1.0}
    costs = LinearCosts(1.0, (1000.0, 0.0))
    tiers = make_tiers(device=8, host=16, policy=TierPolicy(ExpectedTime(reuse, costs), WriteBack.FIXED, eager=EAGER))
    assert cached(tiers, A, "a", 4)
    assert cached(tiers, B, "b", 4)
    later(tiers, SECONDS)
    assert node_of(tiers, A).copies[Tier.HOST] is not None and jobs(tiers)[0][0] == B
    reuse.update(a=likely, b=0.0)
    tiers.values_changed()
    room = tiers.reserve(4 * kv.token_bytes)
    assert room is (AllocStatus.PENDING if waits else AllocStatus.READY)
    assert (node_of(tiers, A).copies[Tier.DEVICE] is None) is not waits
    assert tiers.evictor.make_room(Tier.DEVICE, 4 * kv.token_bytes) is AllocStatus.PENDING, "a prefetch waits for B"
    assert jobs(tiers) == [(B, Tier.HOST, Urgency.WRITE_BACK)]


@pytest.fixture
def persistent_tiers(tmp_path, kv):
    """Caches with a disk for the next process, as an engine binds it; checked and closed at the end."""
    made: list[TieredCache] = []

    def make(device: int, host: int | None = None, disk: int = 10_000, policy: TierPolicy | None = None) -> TieredCache:
        clock = VirtualClock()
        pools: dict[Tier, Pool] = {Tier.DEVICE: MemoryPool(device * TOKEN_BYTES)}
        if host is not None:
            pools[Tier.HOST] = MemoryPool(host * TOKEN_BYTES)
        pools[Tier.DISK] = DiskPool(disk, tmp_path, "weights")
        policy = policy or by_steps(a=1, b=2, c=3)
        made.append(TieredCache(pools, VirtualTransfer(clock, kv.links), policy, 2, clock))
        return made[-1]

    yield make
    for tiers in made:
        tiers.check()
        tiers.close()
        tiers.check()


def test_fixed_prompts_are_kept_for_the_next_process_whatever_room_there_is(persistent_tiers, cached, kv):
    tiers = persistent_tiers(device=100, host=100)
    assert cached(tiers, [*A, 7, 7], "a", 4) and cached(tiers, B, "b", 4) and cached(tiers, [9] * 4)
    for _ in range(4):
        tiers.write_back_eagerly()
        assert len(jobs(tiers)) <= 1, "one at a time"
        later(tiers)
    assert [node_of(tiers, p).copies[Tier.DISK] is not None for p in (A, B, [*A, 7, 7], [9] * 4)] == [
        True, True, False, False,
    ], "fixed prompts, and nothing else"  # fmt: skip
    assert not any(node.copies[Tier.HOST] for node in tiers.tree), "the device has room"
    assert tiers.statistics.bytes_moved == {(Tier.DEVICE, Tier.DISK): 8 * TOKEN_BYTES}, "each once"
    tiers.close()
    again = persistent_tiers(device=100, host=100)
    with again.open([*B, 3, 3]) as handle:
        assert handle.length == 4 and handle.wait(1e6) is LoadState.READY
        kv.assert_holds(handle.payloads(), B)


def test_a_copy_for_the_next_process_does_not_replace_one_in_the_host(persistent_tiers, cached):
    tiers = persistent_tiers(device=8, host=16)
    assert cached(tiers, A, "a", 4) and cached(tiers, B, "b", 4)
    for _ in range(4):
        tiers.write_back_eagerly()
        assert len(jobs(tiers)) <= 1, "one eager transfer leaves the device at a time"
        later(tiers)
    for prompt in (A, B):
        assert all(node_of(tiers, prompt).copies[tier] is not None for tier in (Tier.HOST, Tier.DISK))


def test_fixed_prompts_take_the_place_of_what_ranks_below_them_on_disk(persistent_tiers, cached):
    tiers = persistent_tiers(
        device=8, disk=2000, policy=TierPolicy(StepsToExecution({"a": 1.0}), WriteBack.ALL, eager=EAGER)
    )
    assert cached(tiers, C) and tiers.evictor.evict(node_of(tiers, C), Tier.DEVICE) is AllocStatus.READY
    later(tiers)
    disk = tiers.pools[Tier.DISK]
    assert node_of(tiers, C).copies[Tier.DISK] is not None and disk.available < disk.used, "there is room for one"
    assert cached(tiers, A, "a", 4)
    tiers.write_back_eagerly()
    later(tiers)
    assert node_of(tiers, A).copies[Tier.DISK] is not None and not tiers.lookup(C).nodes


def test_prompts_of_before_a_flush_are_not_kept(persistent_tiers, cached):
    tiers = persistent_tiers(device=12)
    assert cached(tiers, A, "a", 4) and cached(tiers, B, "b", 4)
    with tiers.open(A) as first, tiers.open(B) as second:
        assert len(jobs(tiers)) == 1 and first.length == second.length == 4
        tiers.flush("new weights")
        later(tiers)
        assert not jobs(tiers) and tiers.pools[Tier.DISK].used == 0


def test_keeping_for_the_next_process_is_optional(persistent_tiers, cached):
    policy = TierPolicy(StepsToExecution({}), WriteBack.FIXED, eager=EagerWriteBackConfig(persist=False))
    tiers = persistent_tiers(device=100, policy=policy)
    assert cached(tiers, A, "a", 4)
    tiers.write_back_eagerly()
    assert not jobs(tiers)
