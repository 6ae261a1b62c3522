"""Suffixes of fixed prompts are saved only while that is worthwhile."""

from __future__ import annotations

import math

import pytest

from tenure.serving import (
    LRU,
    ExpectedTime,
    LinearCosts,
    SuffixReuse,
    SuffixReuseConfig,
    Tier,
    TierPolicy,
    WriteBack,
    get_tier_policy,
)
from tenure.serving.kvcache.agent_index import AgentGroup
from tenure.serving.kvcache.radix_tree import Node, RootNode

EXPLORE = SuffixReuseConfig().explore_every
COSTS = LinearCosts(100.0, (1000.0, 0.0))  # a token takes 10 ms to compute; a byte 1 ms to reload


class Copy:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def suffix(agent: str, nbytes: int = 20) -> Node:
    """Ten tokens behind the fixed prompt of `agent`: 100 ms to compute, 20 ms to reload."""
    group = AgentGroup()
    group.push(agent, -0.0)
    root = RootNode(None, AgentGroup())
    prompt = Node(root, b"p", 0, 10, group)
    node = Node(prompt, b"s", 10, 20, AgentGroup())
    node.copies[Tier.DEVICE] = Copy(nbytes)  # type: ignore[assignment]  # only its size is read
    return node


def save(reuse: SuffixReuse, agent: str, used: bool, times: int) -> None:
    for _ in range(times):
        node = suffix(agent)
        reuse.record_saved(node)
        node.hits += used


def test_only_suffixes_that_are_used_again_continue_to_be_saved():
    reuse = SuffixReuse(COSTS)
    assert reuse.reuse_probability(suffix("ring")) == 0.125 and not reuse.is_worthwhile(suffix("ring"), Tier.DEVICE)
    save(reuse, "ring", used=False, times=12)
    save(reuse, "chat", used=True, times=6)
    # 6.5 of 22 in all, half a one of four before the first; the ring: 4 * 6.5/22 of 16; the chat: 6 + 4 * 6.5/22 of 10.
    assert reuse.reuse_probability(suffix("ring")) == pytest.approx(26 / 22 / 16)
    assert reuse.reuse_probability(suffix("chat")) == pytest.approx((6 + 26 / 22) / 10)
    assert reuse.reuse_probability(suffix("new")) == pytest.approx(6.5 / 22)
    # Saving is worthwhile from a probability of 20 / (100 - 20) on.
    assert not reuse.is_worthwhile(suffix("ring"), Tier.DEVICE)
    assert reuse.is_worthwhile(suffix("chat"), Tier.DEVICE) and reuse.is_worthwhile(suffix("new"), Tier.DEVICE)


def test_the_reuse_rate_is_learned_from_suffixes_evicted_from_the_device():
    order = ExpectedTime({}, COSTS, prior=0.05, half_life_s=10)
    policy = TierPolicy(order, WriteBack.WORTH, SuffixReuse(COSTS))
    assert policy.suffix_reuse is not None and policy.suffix_reuse.reuse_rate(0.05) == 0.05
    by_name = get_tier_policy("expected_time", reuse={}, costs=COSTS)
    assert isinstance(by_name.eviction, ExpectedTime) and by_name.eviction.suffix_reuse is by_name.suffix_reuse
    assert by_name.suffix_reuse is not None
    unused = suffix("ring")
    for _ in range(20):
        by_name.suffix_reuse.record_evicted(unused)
    little = by_name.suffix_reuse.reuse_rate(0.05)
    assert little < 0.015 and by_name.eviction.unowned_value(0.0) == pytest.approx(math.log(little))
    unused.hits = 1
    for _ in range(200):
        by_name.suffix_reuse.record_evicted(unused)
    assert by_name.suffix_reuse.reuse_rate(0.05) > 0.9


def test_suffixes_that_reload_slower_than_they_compute_are_not_saved():
    reuse = SuffixReuse(COSTS)
    save(reuse, "chat", used=True, times=9)
    assert not reuse.is_worthwhile(suffix("chat", nbytes=100), Tier.DEVICE)
    assert not reuse.is_worthwhile(suffix("chat"), Tier.HOST), "there is no link into the host"
    assert reuse.is_worthwhile(suffix("chat"), Tier.DEVICE)


def test_an_agent_that_begins_to_continue_its_conversations_is_noticed():
    reuse = SuffixReuse(COSTS)
    save(reuse, "a", used=False, times=64)
    saved = 0
    for _ in range(80 * EXPLORE):
        node = suffix("a")
        if reuse.is_worthwhile(node, Tier.DEVICE):
            reuse.record_saved(node)
            node.hits += 1
            saved += 1
        else:
            reuse.record_dropped()
    assert reuse.reuse_probability(suffix("a")) > 0.9
    assert saved > 60 * EXPLORE, "after some trials everything is saved"


def test_suffix_reuse_needs_its_write_back_rule():
    policy = get_tier_policy("expected_time", reuse={}, costs=COSTS)
    assert policy.write_back is WriteBack.WORTH and policy.suffix_reuse is not None
    with pytest.raises(
        ValueError, match=r"got no suffix_reuse with WriteBack\.WORTH; accepted: suffix_reuse with WriteBack"
    ):
        TierPolicy(LRU(), WriteBack.WORTH)
    with pytest.raises(ValueError, match=r"got suffix_reuse with WriteBack\.ALL"):
        TierPolicy(LRU(), WriteBack.ALL, SuffixReuse(COSTS))
