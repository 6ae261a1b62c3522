"""Estimates of loading and computing, for one request alone and with others waiting for the device."""

from __future__ import annotations

from tenure.serving import (
    LRU,
    Estimates,
    LinearCosts,
    LinkSpeed,
    PhantomPayload,
    PhantomPool,
    Tier,
    TieredCache,
    TierPolicy,
    Urgency,
    VirtualClock,
    VirtualTransfer,
)


def test_behind_a_busy_link_a_request_computes_only_on_an_idle_device() -> None:
    """A load takes 1 s, behind another one 2, and computing 1.5: a request alone computes, one among others waits."""
    clock = VirtualClock()
    pools = {tier: PhantomPool(10_000) for tier in (Tier.DEVICE, Tier.HOST)}
    speeds = {(a, b): LinkSpeed(1000.0) for a in pools for b in pools if a != b}
    tiers = TieredCache(pools, VirtualTransfer(clock, speeds), TierPolicy(LRU()), 1, clock)
    prompts = [[first, *range(99)] for first in (1000, 2000)]
    for prompt in prompts:
        with tiers.open(prompt) as handle:
            tiers.store(handle, prompt, PhantomPayload(100, 1000))
        node = tiers.lookup(prompt).nodes[-1]
        tiers.evictor.evict(node, Tier.DEVICE)
        clock.advance_to(clock.now + 2.0)
        tiers.poll()
        assert node.copies[Tier.DEVICE] is None and node.copies[Tier.HOST] is not None
    estimates = Estimates(LinearCosts(100 / 1.5, (1000.0, 0.0)), tiers)
    first, second = (tiers.open(prompt) for prompt in prompts)
    chain = second.nodes()
    assert chain is not None
    assert estimates.choose(chain, 101).nodes == 1, "an idle link is faster"
    first.load(Urgency.DEMAND)
    alone, shared = estimates.choose(chain, 101), estimates.choose(chain, 101, others=3)
    assert (alone.nodes, shared.nodes) == (0, 1)
    assert shared.load_s == 2.0 and abs(alone.compute_s - 1.515) < 1e-9
