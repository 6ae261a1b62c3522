"""Budgets held, memory freed, questions asked of a compressed context, integrity."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction import Random, Retention, SnapKV, evict
from tenure.eviction.storage.segment_store import StorageConfig

POLICIES = (Retention(), SnapKV(window=8), "keydiff", "knorm", "streaming_llm", "random")


@pytest.mark.parametrize("scope", ["global", "layer", "head"])
@pytest.mark.parametrize("budget", [0.25, 11])
@torch.no_grad()
def test_stored_entries_never_exceed_budget_and_buffer(tiny_llama, gates_for, prompt, scope, budget):
    ids, segments, buffer = prompt(2, 100), 6, 5
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :17] = 0
    gates = gates_for(tiny_llama)
    with evict(tiny_llama, "retention", budget, scope, gates=gates, sinks=2, recent=4, buffer=buffer) as session:
        cache = session.new_cache()
        tiny_llama(ids[:, :40], attention_mask=mask, past_key_values=cache)
        for column in range(40, 100):
            allowed = [budget if isinstance(budget, int) else int(budget * n) for n in cache.tokens_seen.tolist()]
            stored = cache.lengths().sum((1, 2)).tolist()
            room = 0 if column == 40 else buffer * segments
            for row in range(2):
                assert stored[row] <= allowed[row] * segments + room
            if column == 40:
                assert stored == [n * segments for n in allowed]
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            tiny_llama(ids[:, column : column + 1], attention_mask=mask, past_key_values=cache)
            cache.check()
        report = session.report()
    assert report.evictions > 4
    assert report.full_entries == (100 + 83) * segments
    assert report.entries + report.evicted_entries == report.full_entries
    assert report.kept_share == report.entries / report.full_entries


@torch.no_grad()
def test_memory_is_freed_and_reported(tiny_llama, gates_for, prompt):
    entry = (8 + 8) * 4 + 4 + 4  # key and value of 8 floats, position, log β
    with evict(tiny_llama, "retention", 0.2, gates=gates_for(tiny_llama), recent=8) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 400), past_key_values=cache)
        report = session.report()
    assert report.entries == 80 * 6
    assert report.kept_bytes == report.entries * entry
    buffers = {b.untyped_storage().data_ptr(): b for store in cache.stores for b in store.buffers.values()}
    real = sum(buffer.untyped_storage().nbytes() for buffer in buffers.values())
    assert report.bytes == cache.nbytes == real
    assert report.kept_bytes <= report.bytes <= report.kept_bytes * 1.08
    assert report.peak_entries == 400 * 6
    # The prompt, and the first layer once more in its new form.
    assert 400 * 6 * entry < report.peak_bytes <= 400 * 6 * entry * 1.2
    assert report.lengths.shape == (1, 3, 2) and report.lengths.sum() == report.entries
    assert len(set(report.lengths.flatten().tolist())) > 1, "a global budget is not uniform"


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@torch.no_grad()
def test_protected_tokens_stay(tiny_llama, gates_for, prompt, policy):
    gates = gates_for(tiny_llama)
    with evict(tiny_llama, policy, 0.3, "global", gates=gates, sinks=3, recent=5) as session:
        tiny_llama(prompt(1, 60))
        for layer in range(3):
            for kept in session.last_cache.kept(layer)[0]:
                assert set(kept.tolist()) >= {0, 1, 2, 55, 56, 57, 58, 59}
    with evict(tiny_llama, policy, 4, "head", gates=gates, sinks=3, recent=5) as session:
        tiny_llama(prompt(1, 60))
        for layer in range(3):
            for kept in session.last_cache.kept(layer)[0]:
                assert kept.tolist() == [0, 1, 2, 59], "too small a budget: recents go first"


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("scope", ["global", "layer", "head"])
@torch.no_grad()
def test_a_shared_prefill_equals_a_session_of_its_own(tiny_llama, gates_for, prompt, policy, scope):
    context, question, gates = prompt(2, 60), prompt(2, 7, seed=1), gates_for(tiny_llama)
    options = {"gates": gates, "sinks": 2, "recent": 4, "buffer": 3}
    with evict(tiny_llama, "full", observe=[policy, SnapKV()], **options) as session:
        full = session.new_cache()
        tiny_llama(context, past_key_values=full)
        full.fork().compress("random", 0.1)
        fork = full.fork().compress(policy, 0.3, scope)
        shared = [tiny_llama(question[:, i : i + 1], past_key_values=fork).logits for i in range(7)]
        fork.check()
        assert full.report().kept_share == 1.0
    with evict(tiny_llama, policy, 0.3, scope, **options) as session:
        own = session.new_cache()
        tiny_llama(context, past_key_values=own)
        expected = [tiny_llama(question[:, i : i + 1], past_key_values=own).logits for i in range(7)]
        assert session.report().evictions > 1
    assert torch.equal(torch.stack(shared), torch.stack(expected))
    assert all(torch.equal(a, b) for i in range(3) for a, b in zip(own.kept(i)[1], fork.kept(i)[1], strict=True))


@torch.no_grad()
def test_a_question_after_a_compressed_context_stays_whole(tiny_llama, gates_for, prompt):
    with evict(tiny_llama, "retention", 0.2, gates=gates_for(tiny_llama), sinks=2, recent=2) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 60), past_key_values=cache)
        before = cache.lengths()
        whole = torch.cat([prompt(1, 60), prompt(1, 9, seed=1)], dim=1)
        tiny_llama.generate(whole, past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert torch.equal(cache.lengths(), before + 9 + 5)
        assert all(kept[-14:].tolist() == list(range(60, 74)) for kept in cache.kept(0)[0])


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@torch.no_grad()
def test_a_question_rolled_back_leaves_the_context_as_a_fresh_fork_has_it(tiny_llama, gates_for, prompt, policy):
    """Question after question on one compressed context, each rolled back with its answer, batched with padding."""
    context, mask = prompt(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :17] = 0
    with evict(tiny_llama, policy, 0.3, gates=gates_for(tiny_llama), sinks=2, recent=4, buffer=20) as session:
        cache = session.new_cache()
        tiny_llama(context, attention_mask=mask, past_key_values=cache)
        untouched, kept = cache.fork(), [cache.kept(layer) for layer in range(3)]
        for turn in range(4):
            question, asked = prompt(2, 3 + turn, seed=turn + 1), torch.ones(2, 3 + turn, dtype=torch.long)
            asked[0, :turn] = 0  # a shorter question in the other row
            inputs = {"attention_mask": torch.cat([mask, asked], 1), "max_new_tokens": 6, "do_sample": False}
            whole = torch.cat([context, question], dim=1)
            expected = tiny_llama.generate(whole, past_key_values=untouched.fork(), **inputs)
            assert torch.equal(tiny_llama.generate(whole, past_key_values=cache, **inputs), expected)
            cache.check()
            cache.crop(60 - cache.columns_seen)
            cache.check()
            assert cache.columns_seen == 60 and cache.tokens_seen.tolist() == [60, 43]
            for layer in range(3):
                for row, other in zip(cache.kept(layer), kept[layer], strict=True):
                    assert all(torch.equal(one, two) for one, two in zip(row, other, strict=True))


def test_check_finds_what_is_wrong(tiny_llama, prompt):
    def broken(change) -> None:
        with torch.no_grad(), evict(tiny_llama, Random(), 0.5) as session:
            cache = session.new_cache()
            tiny_llama(prompt(2, 20), past_key_values=cache)
            cache.check()
            change(cache, cache.stores[1])
            with pytest.raises(AssertionError):
                cache.check()

    def swap(cache, store):
        store.position[[0, 1]] = store.position[[1, 0]]

    def overrun(cache, store):
        store.lengths = [store.reserved[0] + 1, *store.lengths[1:]]

    def lose(cache, store):
        store.lengths = [store.lengths[0] - 1, *store.lengths[1:]]

    def shift(cache, store):
        store.starts = [store.starts[0] + 1, *store.starts[1:]]

    def future(cache, store):
        store.position[store.starts[1] + store.lengths[1] - 1] = 20

    def shrink(cache, store):
        store.buffers["value"] = store.buffers["value"][1:]

    for change in (swap, overrun, lose, shift, future, shrink):
        broken(change)


@torch.no_grad()
def test_a_cache_can_be_reset_and_slack_is_small(tiny_llama, prompt):
    with evict(tiny_llama, "knorm", 0.5, "layer", buffer=4) as session:
        cache = session.new_cache()
        first = tiny_llama(prompt(1, 90), past_key_values=cache).logits
        for i in range(40):
            tiny_llama(prompt(1, 1, seed=i), past_key_values=cache)
            assert cache.nbytes <= cache.report().kept_bytes * (1 + StorageConfig.slack + 0.02)
        cache.reset()
        assert cache.entries == cache.nbytes == cache.get_seq_length() == 0
        assert torch.equal(tiny_llama(prompt(1, 90), past_key_values=cache).logits, first)
