"""Eviction policies: each against a linear scan, and on the papers' rings of agents."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.serving import (
    LFU,
    LRU,
    Belady,
    ExpectedTime,
    LinearCosts,
    PhantomPayload,
    PhantomPool,
    StepsToExecution,
    Tier,
    TieredCache,
    TierPolicy,
    VirtualClock,
    VirtualTransfer,
    WriteBack,
    get_tier_policy,
    tier_policy_names,
)

COSTS = LinearCosts(tokens_per_s=1000.0, bytes_per_s=(1e6, 1e5), latency_s=1e-3)


def on_device(eviction, capacity, page_size=2):
    clock = VirtualClock()
    policy = TierPolicy(eviction, WriteBack.NOTHING)
    return TieredCache({Tier.DEVICE: PhantomPool(capacity)}, VirtualTransfer(clock, {}), policy, page_size, clock)


def pass_time(tiers: TieredCache, seconds: float) -> None:
    assert isinstance(tiers.clock, VirtualClock)
    tiers.clock.advance_to(tiers.clock() + seconds)


def serve(tiers, prompt, agent=None, bytes_per_token=1):
    """Whether the whole prompt was found; it is stored otherwise, and belongs to `agent`."""
    pass_time(tiers, 1)
    with tiers.open(prompt) as handle:
        hit = handle.length == len(prompt)
        new = len(prompt) - handle.length
        tiers.store(handle, prompt, PhantomPayload(new, new * bytes_per_token) if new else None, agent, len(prompt))
    return hit


def ring(order, size, room, rounds, before):
    """Hit rate of `size` equal agents called in turn, with room for `room` of them, after a first round."""
    tiers = on_device(order, 8 * room)
    hits = calls = 0
    for call in range(size * rounds):
        agent = call % size
        before(tiers, call)
        hit = serve(tiers, [agent + 10] * 8, agent)
        hits, calls = (hits + hit, calls + 1) if call >= size else (0, 0)
    tiers.check()
    return hits / calls


@pytest.mark.parametrize("room", [2, 5, 9])
def test_a_ring_of_ten(room):
    """The unit check of KVFlow's facts: LRU hits nothing, steps-to-execution (C - 1) / 9, and so does the oracle."""
    steps: dict[int, float] = {}

    def count_steps(tiers, call):
        steps.update({agent: (agent - call) % 10 or 10 for agent in range(10)})
        tiers.values_changed()

    assert ring(LRU(), 10, room, 11, lambda tiers, call: None) == 0
    assert ring(StepsToExecution(steps), 10, room, 91, count_steps) == pytest.approx((room - 1) / 9, abs=0.012)
    oracle = Belady([[call % 10 + 10] * 8 for call in range(910)], page_size=2)
    rate = ring(oracle, 10, room, 91, lambda tiers, call: oracle.advance())
    assert rate == pytest.approx((room - 1) / 9, abs=0.012)

    reuse: dict[int, float] = {}

    def discount(tiers, call):
        reuse.update({agent: math.exp(-0.1 * ((agent - call) % 10 or 10)) for agent in range(10)})
        tiers.values_changed()

    assert ring(ExpectedTime(reuse, COSTS), 10, room, 91, discount) == pytest.approx((room - 1) / 9, abs=0.012)


def test_a_prefetched_prompt_displaces_only_nodes_worth_at_most_half_of_it():
    order = ExpectedTime({"now": 0.8, "close": 0.45, "half": 0.39}, COSTS)
    now, close, half = ((order.value(agent), 0.0) for agent in ("now", "close", "half"))
    assert half < order.prefetch_bound(now) < close < now
    assert LRU().prefetch_bound((3.0,)) == (3.0,)


def test_the_reuse_probability_of_a_suffix_is_discounted_like_an_agents():
    """Half of the suffixes are used again, after an exponentially distributed time with a half-life of 10 s."""
    rate = 0.2
    order = ExpectedTime({}, COSTS, prior=0.5, half_life_s=10, rate=lambda: rate)
    random = Random(0)
    times = [random.expovariate(math.log(2) / 10) for _ in range(20_000)]
    assert math.exp(order.unowned_value(0.0)) == pytest.approx(
        0.5 * sum(math.exp(-rate * t) for t in times) / 20_000, rel=0.03
    )


def test_values_read_before_and_after_a_change_of_the_discount_are_compared_as_calls_come_nearer():
    """At 0 s, γ is 0.1; at 1000 s it becomes 0.5. A constant factor of γ · time would decide alone."""
    now, rate, reuse = [0.0], [0.1], {"early": 0.5, "late": 0.5, "lower": 0.4}
    order = ExpectedTime(
        reuse, COSTS, rate=lambda: rate[0], clock=lambda: now[0],
        phase=lambda at: 0.1 * min(at, 1000.0) + 0.5 * max(0.0, at - 1000.0),
    )  # fmt: skip
    now[0] = 999.0
    early = order.value("early")
    now[0], rate[0] = 1002.0, 0.5
    grown = 0.1 * 1 + 0.5 * 2
    assert early - order.value("late") == pytest.approx(grown), "its call has come nearer since"
    assert early - order.value("lower") == pytest.approx(grown + math.log(0.5 / 0.4))
    prior, fading = 0.05, math.log(2) / 30.0
    unowned = order.unowned_value(1002.0)
    assert unowned + 1002 * fading - early == pytest.approx(math.log(prior * fading / (fading + 0.5) / 0.5) - grown)


def test_no_policy_hits_more_than_the_oracle():
    random = Random(3)
    calls = [min(int(random.expovariate(0.25)), 19) for _ in range(600)]
    prompts = [[call + 1] * 4 for call in calls]
    rates = {}
    for name, order in (("lru", LRU()), ("lfu", LFU()), ("belady", Belady(prompts, 2))):
        tiers = on_device(order, 4 * 5)
        hits = 0
        for prompt in prompts:
            if isinstance(order, Belady):
                order.advance()
            hits += serve(tiers, prompt)
        rates[name] = hits / len(prompts)
    assert rates["belady"] > rates["lfu"] > 0 and rates["belady"] > rates["lru"] > 0


def test_suffixes_are_evicted_before_fixed_prompts_and_shared_nodes_have_their_largest_value():
    steps = {"near": 1.0, "far": 9.0}
    tiers = on_device(StepsToExecution(steps), 100)
    serve(tiers, [1, 1, 2, 2], "near")
    serve(tiers, [1, 1, 3, 3], "far")
    serve(tiers, [1, 1, 2, 2, 7, 7])  # a request of "near" with its suffix
    serve(tiers, [1, 1, 4, 4], "unheard of")
    queue, evicted = tiers.storage.queues[Tier.DEVICE], []
    shared = tiers.lookup([1, 1]).nodes[0]
    assert queue.rank(shared)[0] == -1.0
    while (node := queue.first()) is not None:
        evicted.append(tuple(memoryview(node.span).cast("i")))
        tiers.evictor.evict(node, Tier.DEVICE)
    assert evicted[:2] == [(7, 7), (4, 4)]
    assert evicted[2:] == [(3, 3), (2, 2), (1, 1)]
    tiers.check()


def test_expected_time_weighs_probability_costs_and_bytes():
    reuse = {"likely": 0.9, "large": 0.9, "unlikely": 0.2}
    tiers = on_device(ExpectedTime(reuse, COSTS, prior=0.05, half_life_s=10), 10**6)
    serve(tiers, [1] * 8, "likely")
    serve(tiers, [2] * 8, "unlikely")
    serve(tiers, [3] * 8, "large", bytes_per_token=1000)  # reloading a byte costs less there: the latency is shared
    serve(tiers, [4] * 8)
    serve(tiers, [5] * 8)
    ranks = {node.span[0]: tiers.storage.queues[Tier.DEVICE].rank(node) for node in tiers.tree}
    assert sorted(ranks, key=ranks.__getitem__) == [3, 4, 5, 2, 1]
    seconds = min(COSTS.recompute_s(0, 8), COSTS.reload_s(8, Tier.DEVICE))
    assert ranks[1][0] == pytest.approx(math.log(0.9 * seconds / 8))
    age = tiers.clock() - 4
    assert ranks[4][0] == pytest.approx(math.log(0.05 * 2 ** (-age / 10) * seconds / 8))
    with pytest.raises(ValueError, match=r"prior=0, half_life_s=30.0; accepted: 0 < prior <= 1"):
        ExpectedTime(reuse, COSTS, prior=0)


def test_a_copy_is_ranked_by_its_own_bytes_whatever_other_tiers_have():
    """The ranks in a tier are independent of copies in other tiers."""
    clock = VirtualClock()
    pools = {Tier.DEVICE: PhantomPool(10**6), Tier.HOST: PhantomPool(10**6)}
    policy = TierPolicy(ExpectedTime({}, COSTS), WriteBack.ALL)
    tiers = TieredCache(pools, VirtualTransfer(clock, {}), policy, 2, clock)
    serve(tiers, [1] * 8)
    (node,) = tiers.tree
    pools[Tier.HOST].allocate(16)
    tiers.storage.attach(node, Tier.HOST, PhantomPayload(8, 16), 16)
    before = tiers.policy.eviction.local(node, Tier.HOST)
    assert before[0] == pytest.approx(math.log(min(0.008, COSTS.reload_s(16, Tier.HOST)) / 16) + math.log(2) / 30)
    tiers.storage.free(node, Tier.DEVICE)
    assert tiers.policy.eviction.local(node, Tier.HOST) == before
    tiers.check()


def test_agents_without_value_are_still_ranked():
    tiers = on_device(ExpectedTime({}, COSTS), 10**6)
    serve(tiers, [1] * 8, "unknown", bytes_per_token=1)
    serve(tiers, [2] * 8, "unheard of", bytes_per_token=1000)  # later, and less is saved per byte
    tiers.check()
    first = tiers.storage.queues[Tier.DEVICE].first()
    assert first is not None and first.span[0] == 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_first_victim_is_that_of_a_linear_scan(data):
    """`check` scans all nodes; values rise and fall while nodes are used, split, assigned to agents and evicted."""
    values: dict[int, float] = {}
    kind = data.draw(st.sampled_from(["lru", "lfu", "ste", "expected"]))
    order = {
        "lru": LRU(),
        "lfu": LFU(),
        "ste": StepsToExecution(values),
        "expected": ExpectedTime(values, COSTS, half_life_s=3),
    }[kind]
    tiers = on_device(order, 60)
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["serve", "serve", "values", "evict", "forget", "time"]))
        agent = data.draw(st.none() | st.integers(0, 3))
        if action == "serve":
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=8))
            serve(tiers, prompt[: len(prompt) // 2 * 2], agent)
        elif action == "values":
            changed = data.draw(st.dictionaries(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.7, 5.0])))
            values.update(changed)
            tiers.values_changed(changed)
        elif action == "evict":
            node = tiers.storage.queues[Tier.DEVICE].first()
            if node is not None:
                tiers.evictor.evict(node, Tier.DEVICE)
        elif action == "forget":
            tiers.forget_agent(agent)
        else:
            pass_time(tiers, 5)
        tiers.check()


def test_stale_entries_are_bounded():
    values = dict.fromkeys(range(5), 1.0)
    tiers = on_device(StepsToExecution(values), 10**6)
    for agent in range(5):
        serve(tiers, [1, 1, agent + 2, agent + 2], agent)
    queue = tiers.storage.queues[Tier.DEVICE]
    for turn in range(3000):
        values.update({agent: float((agent + turn) % 7) for agent in range(5)})
        tiers.values_changed()
        serve(tiers, [1, 1, turn % 5 + 2, turn % 5 + 2])
    assert sum(map(len, queue._nodes.values())) < 400
    assert len(queue._groups._heap) < 400
    assert max(len(group._heap) for group in {node.group for node in tiers.tree}) < 200
    tiers.check()


def test_nan_counts_as_unknown():
    order = StepsToExecution({"a": math.nan, "b": 3.0})
    assert order.value("a") == order.value("nobody knows") == -1e300
    assert order.value("b") == -3.0
    assert StepsToExecution(lambda agent: 2.0).value("x") == -2.0


def test_policies_by_name():
    assert tier_policy_names() == ("expected_time", "lfu", "lru", "lru_reactive", "ste")
    assert get_tier_policy("lru").write_back is WriteBack.NOTHING
    assert get_tier_policy("ste", steps={}).write_back is WriteBack.FIXED
    with pytest.raises(ValueError, match="unknown tier policy 'fifo'; known: expected_time, lfu"):
        get_tier_policy("fifo")
    with pytest.raises(ValueError, match=r"tier policy 'ste' does not accept \['reuse'\]"):
        get_tier_policy("ste", reuse={})
