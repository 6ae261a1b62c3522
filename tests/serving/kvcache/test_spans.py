"""Spans that grow, split and heal, plain pages behind a compressed prompt, and the roots of namespaces."""

from __future__ import annotations

import pytest
import torch

from tenure.scripts.soak.faulty_kv import kv_of
from tenure.serving import AllocStatus, LoadState, PhantomPayload, StepsToExecution, Tier, TieredCache, TierPolicy
from tenure.serving.kvcache.base import TensorPayload

from ..conftest import later

A = list(range(1, 25))


def lengths(tiers: TieredCache, prompt: list[int], namespace=None) -> list[int]:
    return [node.length for node in tiers.lookup(prompt, namespace).nodes]


def store_in_chunks(tiers: TieredCache, prompt: list[int], chunk: int, pages: bool, **options) -> None:
    with tiers.open(prompt) as handle:
        for end in range(handle.length + chunk, len(prompt) + 1, chunk):
            payload = kv_of(prompt, handle.length, end, pages=pages)
            assert tiers.store(handle, prompt[:end], payload, **options) is AllocStatus.READY
            assert handle.length == end
            assert_holds(tiers, prompt[:end])


def assert_holds(tiers: TieredCache, prompt: list[int], compressed: int = 0) -> None:
    """All of the prompt is on the device, and right; its first `compressed` tokens compressed."""
    with tiers.open(prompt) as handle:
        assert handle.load() is LoadState.READY and handle.length == len(prompt)
        at = 0
        for payload in handle.payloads():
            wanted = kv_of(prompt, at, at + payload.tokens, at < compressed)
            assert all(torch.equal(payload.read(0)[name], wanted.tensors[name]) for name in payload.read(0))
            at += payload.tokens


@pytest.mark.parametrize(("pages", "nodes"), [(True, [24]), (False, [8, 8, 8])])
def test_chunks_extend_their_node_if_that_copies_nothing(make_tiers, pages, nodes):
    tiers = make_tiers(100)
    store_in_chunks(tiers, A, 8, pages)
    assert lengths(tiers, A) == nodes and tiers.pools[Tier.DEVICE].used == 24 * 32
    assert tiers.merge_spans() == len(nodes) - 1
    assert_holds(tiers, A)


def test_a_node_whose_end_somebody_needs_is_not_extended(make_tiers):
    """Another handle, a branch, a copy on the host, or the end of a fixed prompt: each keeps its end."""
    tiers = make_tiers(100, host=100)
    with tiers.open(A) as handle:
        tiers.store(handle, A[:8], kv_of(A, 0, 8, pages=True))
        with tiers.open(A[:8]) as other:
            tiers.store(handle, A[:12], kv_of(A, 8, 12, pages=True))
            assert (other.length, other.node.end, handle.length) == (8, 8, 12)
            assert lengths(tiers, A) == [8, 4]
        tiers.store(handle, A[:16], kv_of(A, 12, 16, pages=True), "planner", 16)
        assert lengths(tiers, A) == [16], "the other handle is gone: its end is healed with the next span"
        tiers.store(handle, A[:20], kv_of(A, 16, 20, pages=True))
        assert lengths(tiers, A) == [16, 4] and tiers.lookup_agent("planner").end == 16
        branch = [*A[:20], 7, 7]
        with tiers.open(branch) as other:
            tiers.store(other, branch, kv_of(branch, 20, 22, pages=True))
        tiers.store(handle, A[:24], kv_of(A, 20, 24, pages=True))
        assert lengths(tiers, A) == [16, 4, 4] and lengths(tiers, branch) == [16, 4, 2]
    for prompt in (A, branch):
        assert_holds(tiers, prompt)


def test_splits_heal_when_the_branches_have_gone(make_tiers):
    tiers = make_tiers(60)
    store_in_chunks(tiers, A, 24, pages=True)
    for cut in range(2, 24, 4):
        branch = [*A[:cut], 99, 99]
        with tiers.open(branch) as handle:
            assert handle.length == cut
            tiers.store(handle, branch, kv_of(branch, cut, cut + 2, pages=True))
        later(tiers, 1.0)
        with tiers.open(A):
            pass  # used again, so that the branches are evicted first
    assert len(lengths(tiers, A)) == 7
    with tiers.open(A) as handle:
        tiers.evictor.make_room(Tier.DEVICE, 36 * 32)
        assert sum(len(node.children) > 1 for node in tiers.tree) == 0
    assert lengths(tiers, A) == [24] and tiers.tree.size == 1
    assert_holds(tiers, A)


def test_payloads_that_would_have_to_be_copied_are_left_split(make_tiers):
    tiers = make_tiers(60)
    store_in_chunks(tiers, A, 24, pages=False)
    branch = [*A[:12], 99, 99]
    store_in_chunks(tiers, branch, 2, pages=False)
    later(tiers, 1.0)
    with tiers.open(A) as handle:
        tiers.evictor.make_room(Tier.DEVICE, 36 * 32)
        assert handle.length == 24
    assert lengths(tiers, A) == [12, 12]


def test_a_split_without_memory_for_the_halves_costs_a_shorter_match_only(make_tiers, monkeypatch):
    tiers = make_tiers(60)
    store_in_chunks(tiers, A, 24, pages=False)

    def fails(self, at):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TensorPayload, "split", fails)
    with tiers.open([*A[:12], 99, 99]) as handle:
        assert handle.length == 0
        assert tiers.store(handle, [*A[:12], 99, 99], kv_of([*A[:12], 99, 99], 0, 14)) is AllocStatus.READY
        tiers.check()
    monkeypatch.undo()
    assert_holds(tiers, A)
    assert_holds(tiers, [*A[:12], 99, 99])


# Compressed prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [True, False])
def test_a_conversation_grows_behind_a_compressed_prompt(make_tiers, pages):
    """The plain part is divisible, the compressed one is not; both go to the host and come back."""
    tiers = make_tiers(60, host=100)
    with tiers.open(A) as handle:
        tiers.store(handle, A[:8], kv_of(A, 0, 8, compressed=True), "planner", 8)
        for end in (12, 16, 24):
            tiers.store(handle, A[:end], kv_of(A, handle.length, end, pages=pages), "planner", 8)
        divisible = [payload.divisible for payload in handle.payloads()]
        assert divisible == ([False, True] if pages else [False, True, True, True])
    assert_holds(tiers, A, compressed=8)
    branch = [*A[:14], 50, 51]
    with tiers.open(branch) as handle:
        assert handle.length == 14, "the plain part is split at a page"
        tiers.store(handle, branch, kv_of(branch, 14, 16, pages=pages))
    with tiers.open([*A[:6], 50, 51]) as handle:
        assert handle.length == 0, "the compressed part is used as a whole or not at all"
    for _ in range(6):
        tiers.evictor.make_room(Tier.DEVICE, 60 * 32)
        later(tiers)
    assert tiers.pools[Tier.DEVICE].used == 0
    for prompt in (A, branch):
        with tiers.open(prompt) as handle:
            assert handle.wait(1e6) is LoadState.LOADING or handle.length == len(prompt)
            later(tiers)
            assert handle.load() is LoadState.READY
        assert_holds(tiers, prompt, compressed=8)
    assert tiers.lookup_agent("planner").end == 8


def test_a_compressed_prompt_is_not_extended_and_not_joined(make_tiers):
    tiers = make_tiers(60)
    with tiers.open(A) as handle:
        tiers.store(handle, A[:8], PhantomPayload(8, 64, divisible=False))
        tiers.store(handle, A[:16], PhantomPayload(8, 256))
        tiers.store(handle, A[:24], PhantomPayload(8, 256))
    assert lengths(tiers, A) == [8, 16] and tiers.merge_spans() == 0


def test_without_the_compressed_prompt_what_was_built_on_it_goes(make_tiers):
    tiers = make_tiers(24, policy=TierPolicy(StepsToExecution({"planner": 0.0})))
    with tiers.open(A) as handle:
        tiers.store(handle, A[:8], kv_of(A, 0, 8, compressed=True), "planner", 8)
        tiers.store(handle, A[:16], kv_of(A, 8, 16, pages=True))
    tiers.storage.evict(tiers.lookup(A[:8]).nodes[0], Tier.DEVICE)
    assert tiers.tree.size == 0 and tiers.pools[Tier.DEVICE].used == 0


# Reserved bytes -------------------------------------------------------------------------------------------------------


def test_reserved_bytes_pass_to_the_tree_except_for_what_it_has_already(make_tiers):
    """Two requests have computed the same 16 tokens, of which 8 are stored first: the second keeps its own copy."""
    tiers = make_tiers(60)
    pool = tiers.pools[Tier.DEVICE]
    with tiers.open(A) as one, tiers.open(A) as other:
        tiers.reserve(2 * 16 * 32)
        tiers.store(one, A[:8], kv_of(A, 0, 8, pages=True), reserved=8 * 32)
        assert (pool.used, pool.reserved) == (32 * 32, 24 * 32)
        tiers.store(other, A[:16], kv_of(A, 0, 16, pages=True), reserved=16 * 32)
        assert (pool.used, pool.reserved) == (32 * 32, 16 * 32), "8 of the one, and the second's copy of the first 8"
        assert (one.length, other.length) == (8, 16)
        tiers.unreserve(16 * 32)
    assert_holds(tiers, A[:16])


def test_a_compressed_prompt_returns_what_it_does_not_need(make_tiers):
    tiers = make_tiers(60)
    pool = tiers.pools[Tier.DEVICE]
    with tiers.open(A) as handle:
        tiers.reserve(24 * 32)
        tiers.store(handle, A[:16], kv_of(A, 0, 16, compressed=True), reserved=16 * 32)
        assert (pool.used, pool.reserved) == (16 * 32, 8 * 32)
        tiers.unreserve(8 * 32)


def test_what_is_refused_stays_reserved(make_tiers):
    tiers = make_tiers(20)
    pool = tiers.pools[Tier.DEVICE]
    with tiers.open(A) as handle:
        tiers.reserve(16 * 32)
        tiers.store(handle, A[:8], kv_of(A, 0, 8), reserved=8 * 32)
        payload = kv_of(A, 8, 24)
        assert tiers.store(handle, A[:24], payload, reserved=8 * 32) is AllocStatus.REFUSED
        assert (handle.length, pool.used, pool.reserved) == (8, 16 * 32, 8 * 32)
        tiers.unreserve(8 * 32)


# Namespaces -----------------------------------------------------------------------------------------------------------


def test_a_lookup_makes_no_root_and_an_empty_one_goes(make_tiers):
    tiers = make_tiers(60)
    unowned = tiers.tree.agent_index.unowned
    for number in range(50):
        assert tiers.lookup(A, f"salt-{number}").length == 0
        with tiers.open(A, f"salt-{number}") as handle:
            assert handle.length == 0 and len(tiers.tree.roots) == 1
    assert not tiers.tree.roots and unowned.num_nodes == 0
    tiers.check()


def test_the_root_goes_with_its_last_prompt_and_not_before(make_tiers):
    tiers = make_tiers(60)
    with tiers.open(A, "salt") as handle:
        tiers.store(handle, A[:8], kv_of(A, 0, 8))
    with tiers.open([5, 6, 7], "salt") as handle:
        tiers.evictor.make_room(Tier.DEVICE, 60 * 32)
        assert tiers.tree.size == 0 and list(tiers.tree.roots) == ["salt"], "a handle is on it"
        tiers.store(handle, [5, 6], kv_of([5, 6], 0, 2))
    assert tiers.lookup([5, 6], "salt").length == 2
    tiers.evictor.make_room(Tier.DEVICE, 60 * 32)
    assert not tiers.tree.roots
