"""Pages, spans, splits, merges and look-ups of the prefix tree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.serving import AllocStatus, PhantomPayload, PhantomPool, Status, Tier
from tenure.serving.kvcache.radix_tree import common_pages, encode


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, tuple])
def test_all_kinds_of_token_ids_give_the_same_pages(kind):
    assert encode(kind([5, 6, 7, 8, 9]), 2) == np.array([5, 6, 7, 8], "<i4").tobytes()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2]], "got a row with a list as token ids; accepted: one row of integers"),
        (np.array([[1, 2]]), r"shape \(1, 2\).*accepted: one row of integers"),
        ([0.5, 1.0], "got a row with a float as token ids; accepted: one row of integers"),
        (np.array([0.5, 1.0]), "float64; accepted: one row of integers"),
        ([1, True], "got a row with a bool as token ids"),
        (np.array([True, False]), "type bool; accepted: one row of integers"),
        (["1", "2"], "got a row with a str"),
        ("12", "accepted: one row of integers"),
        (None, "accepted: one row of integers"),
        ({1: 2}, "accepted: one row of integers"),
        ([2**70], "accepted: one row of integers"),
        ([1, -1], "from -1 to 1; accepted: 0 to 2147483647"),
        ([2**31, 0], "accepted: 0 to 2147483647"),
    ],
)
def test_other_token_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        encode(ids, 2)


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12), st.integers(1, 3))
def test_common_pages(left, right, page):
    a, b = encode(left, page), encode(right, page)
    equal = 0
    while (equal + 1) * page <= min(len(left), len(right)) // page * page and (
        left[equal * page : (equal + 1) * page] == right[equal * page : (equal + 1) * page]
    ):
        equal += 1
    assert common_pages(a, b"xxxx" + b, 4, 4 * page) == equal


@settings(max_examples=150, deadline=None)
@given(
    known=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=16), max_size=8),
    asked=st.lists(st.integers(0, 1), max_size=16),
    page=st.integers(1, 3),
)
def test_a_match_is_the_longest_known_prefix(known, asked, page):
    from tenure.serving import LRU, TieredCache, TierPolicy, VirtualClock, VirtualTransfer

    clock = VirtualClock()
    tiers = TieredCache({Tier.DEVICE: PhantomPool(10**6)}, VirtualTransfer(clock, {}), TierPolicy(LRU()), page, clock)
    for prompt in known:
        with tiers.open(prompt) as handle:
            new = tiers.whole_pages(len(prompt)) - handle.length
            assert tiers.store(handle, prompt, PhantomPayload(new, new * 3) if new > 0 else None) is AllocStatus.READY
    expected = max([_common(asked, prompt, page) for prompt in known], default=0)
    found = tiers.lookup(asked)
    assert found.length == expected
    with tiers.open(asked) as handle:
        assert handle.length == expected
        assert sum(payload.tokens for payload in handle.payloads()) == expected
    total = {tuple(prompt[:end]) for prompt in known for end in range(page, len(prompt) + 1, page)}
    assert tiers.pools[Tier.DEVICE].used == 3 * page * len(total), "every distinct page is stored once"
    tiers.check()


def _common(a, b, page):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return min(n, len(b) // page * page, len(a) // page * page) // page * page


def test_a_split_splits_the_data_and_keeps_handles(make_tiers, cached, kv):
    tiers = make_tiers(device=40)
    long, other = [1, 1, 1, 1, 1, 1], [1, 1, 2, 2]
    assert cached(tiers, long)
    with tiers.open(long) as holding:
        assert cached(tiers, other)
        kv.assert_holds(holding.payloads(), long)
        assert [node.length for node in holding.nodes()] == [2, 4]
        assert holding.nodes()[0].ref_count == holding.nodes()[1].ref_count == 1
        with tiers.open(other) as handle:
            kv.assert_holds(handle.payloads(), other)
            assert holding.nodes()[0].ref_count == 2
        tiers.check()
    assert tiers.pools[Tier.DEVICE].used == 8 * kv.token_bytes


def test_a_match_within_a_span_uses_its_part(make_tiers, cached, kv):
    tiers = make_tiers(device=40)
    assert cached(tiers, [1, 2, 3, 4, 5, 6])
    found = tiers.lookup([1, 2, 3, 4, 9, 9])
    assert (found.length, found.part) == (4, 2)
    assert tiers.tree.size == 1, "a look-up changes nothing"
    with tiers.open([1, 2, 3, 4, 9, 9]) as handle:
        assert handle.length == 4
        kv.assert_holds(handle.payloads(), [1, 2, 3, 4])


def test_spans_are_merged_on_request_when_a_branch_is_evicted(make_tiers, cached, kv):
    tiers = make_tiers(device=8)
    assert cached(tiers, [1, 1, 2, 2])
    tiers.clock.advance_to(1)
    assert cached(tiers, [1, 1, 3, 3])
    assert tiers.tree.size == 3
    tiers.clock.advance_to(2)
    assert cached(tiers, [9, 9, 9, 9]), "evicts [2, 2], the oldest leaf"
    assert sorted(node.length for node in tiers.tree) == [2, 2, 4]
    with tiers.open([1, 1, 3, 3]):
        assert tiers.merge_spans() == 0, "not while it is referenced"
    assert tiers.merge_spans() == 1
    assert sorted(node.length for node in tiers.tree) == [4, 4]
    assert tiers.merge_spans() == 0
    with tiers.open([1, 1, 3, 3]) as handle:
        kv.assert_holds(handle.payloads(), [1, 1, 3, 3])
        assert len(handle.payloads()) == 1
    tiers.check()


def test_a_compressed_prompt_is_used_whole_or_not_at_all(make_tiers, cached, kv):
    tiers = make_tiers(device=40)
    a, b = [1, 1, 2, 2, 2, 2], [1, 1, 3, 3]
    assert cached(tiers, a, compressed=True)
    assert tiers.pools[Tier.DEVICE].used == 3 * kv.token_bytes, "half the bytes a token"
    assert tiers.lookup(a[:4]).length == 0
    assert tiers.lookup([*a, 7, 7]).length == 6
    with tiers.open(b) as handle:
        assert handle.length == 0
        assert tiers.store(handle, b, kv.of(b, 0, 4)) is AllocStatus.READY
    assert tiers.lookup([1, 1, 9, 9]).length == 2, "the second prompt stored the common prefix"
    for prompt, compressed in ((a, True), (b, False)):
        with tiers.open(prompt) as handle:
            assert handle.length == len(prompt)
            kv.assert_holds(handle.payloads(), prompt)
            assert any(payload.token_dim is None for payload in handle.payloads()) is compressed
    tiers.check()


def test_a_split_that_copied_nothing_is_undone_when_the_branch_is_evicted(make_tiers, cached, kv):
    tiers = make_tiers(device=40)
    a, b = [1, 1, 2, 2], [1, 1, 3, 3]
    assert cached(tiers, a, compressed=True) and cached(tiers, b, compressed=True)
    assert tiers.tree.size == 3, "one of them has no data"
    (node,) = tiers.lookup(b).nodes
    tiers.evictor.evict(node, Tier.DEVICE)
    assert [(each.length, each.covers) for each in tiers.tree] == [(4, 4)]
    with tiers.open(a) as handle:
        kv.assert_holds(handle.payloads(), a)


def test_spans_are_not_merged_where_a_copy_below_begins(make_tiers, cached, kv):
    """[3, 3] holds what was compressed together with [2, 2], before that was computed on its own."""
    tiers = make_tiers(device=40)
    long = [1, 1, 2, 2, 3, 3]
    assert cached(tiers, long[:2])
    assert cached(tiers, long, compressed=True)
    assert cached(tiers, [1, 1, 2, 2])
    assert [(node.length, node.covers) for node in tiers.tree] == [(2, 2), (2, 2), (2, 4)]
    assert tiers.merge_spans() == 0
    with tiers.open(long) as handle:
        assert handle.length == 6
        kv.assert_holds(handle.payloads(), long)


def test_namespaces_are_separate(make_tiers, kv):
    tiers = make_tiers(device=40)
    prompt = [1, 2, 3, 4]
    with tiers.open(prompt[:2], namespace="adapter") as handle:
        assert tiers.store(handle, prompt[:2], kv.of(prompt, 0, 2), "a", 2) is AllocStatus.READY
    assert tiers.lookup(prompt).length == 0
    assert tiers.lookup(prompt, namespace="adapter").length == 2
    handle = tiers.open_agent("a")
    assert handle is not None
    assert tiers.store(handle, prompt, kv.of(prompt, 2, 4), "a", 4) is AllocStatus.READY
    handle.release()
    assert tiers.lookup(prompt, namespace="adapter").length == 4 and tiers.lookup(prompt).length == 0
    assert tiers.tree.prompt_ends["a"].end == 4


def test_status_of_a_node(make_tiers, cached):
    from tenure.serving import LRU, TierPolicy, WriteBack

    tiers = make_tiers(device=4, host=4, policy=TierPolicy(LRU(), WriteBack.ALL))
    assert cached(tiers, [1, 1, 2, 2])
    (node,) = tiers.tree
    seen = [node.status]
    assert not cached(tiers, [5, 5, 5, 5]), "there is room when the write-back has ended"
    seen.append(node.status)
    tiers.clock.advance_to(100)
    tiers.poll()
    seen.append(node.status)
    with tiers.open([1, 1, 2, 2]) as handle:
        handle.load()
        seen.append(node.status)
        handle.wait(100)
        seen.append(node.status)
    assert seen == [Status.GPU, Status.OFFLOADING, Status.CPU, Status.LOADING, Status.GPU]


def test_wrong_payloads_and_prompts_are_refused(make_tiers, cached, kv):
    tiers = make_tiers(device=40)
    assert cached(tiers, [1, 2, 3, 4])
    with tiers.open([1, 2, 3, 4, 5, 6]) as handle:
        with pytest.raises(ValueError, match=r"a payload of 4 tokens; accepted: one of the 2 tokens in \[4, 6\)"):
            tiers.store(handle, [1, 2, 3, 4, 5, 6], kv.of([1] * 4, 0, 4))
        with pytest.raises(ValueError, match="got no payload; accepted: one of the 2 tokens"):
            tiers.store(handle, [1, 2, 3, 4, 5, 6], None)
        with pytest.raises(ValueError, match="does not begin with what the handle covers"):
            tiers.store(handle, [9, 9, 3, 4, 5, 6], kv.of([9, 9, 3, 4, 5, 6], 4, 6))
    with pytest.raises(ValueError, match="has been released"):
        handle.load()
    handle.release()
    with pytest.raises(ValueError, match="page_size=0; accepted: 1 or more"):
        make_tiers(device=1, page_size=0)
    with pytest.raises(ValueError, match="3 tokens in dimension -2"):
        type(kv.of([1], 0, 1))(kv.of([1], 0, 1).tensors, 3)
