"""Prompts in chunks: the same outputs, and a bounded peak."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenure.eviction import RaggedCache, SnapKV, evict
from tenure.eviction.forward_state import ForwardStep

POLICIES = ("retention", SnapKV(window=8), "knorm", "random")


def left_padded(ids: torch.Tensor, pads: list[int]) -> dict[str, Any]:
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("chunk", [1, 7, 16, 22, 23, 64])
@torch.no_grad()
def test_the_whole_budget_in_chunks_changes_nothing(tiny_llama, prompt, chunk):
    inputs = left_padded(prompt(2, 23), [0, 9])
    real = inputs["attention_mask"].bool()
    expected = tiny_llama(**inputs)
    with evict(tiny_llama, "snapkv", 1.0, prefill_chunk=chunk) as session:
        got = tiny_llama(**inputs)
        assert isinstance(got.past_key_values, RaggedCache)
        got.past_key_values.check()
        assert session.report().evictions == 0 and got.past_key_values.columns_seen == 23
        last = tiny_llama(**inputs, logits_to_keep=5).logits
        tail = tiny_llama(**inputs, logits_to_keep=torch.tensor([3, 22])).logits
    assert got.logits.shape == expected.logits.shape
    torch.testing.assert_close(got.logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last[0], expected.logits[0, -5:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tail[0], expected.logits[0, [3, 22]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ["knorm", "snapkv(window=4)", "h2o", "expected_attention"])
@torch.no_grad()
def test_no_chunk_waits_for_pythons_collector(tiny_llama, prompt, policy):
    """A chunk's mask is as large as chunk times cache: those of all chunks together would be no bounded peak."""
    gc.collect()
    gc.disable()
    try:
        with evict(tiny_llama, policy, 0.5, prefill_chunk=8, sinks=1, recent=2):
            tiny_llama(prompt(2, 64))
        alive = [each for each in gc.get_objects() if type(each) is ForwardStep]
    finally:
        gc.enable()
    assert len(alive) <= 1


@torch.no_grad()
def test_generation_in_chunks_equals_generation_at_once(any_tiny_model, prompt):
    inputs = left_padded(prompt(3, 40), [0, 13, 39])
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = any_tiny_model.generate(**inputs, **options)
    with evict(any_tiny_model, "knorm", 1.0, prefill_chunk=11):
        got = any_tiny_model.generate(**inputs, **options)
        got.past_key_values.check()
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_in_chunks_get_what_they_get_alone(tiny_llama, gates_for, prompt):
    """Chunks are cut by columns, so a row alone is given the same padding."""
    ids, pads = prompt(3, 50), [0, 13, 30]
    inputs = left_padded(ids, pads)
    for policy in POLICIES:
        options = {"gates": gates_for(tiny_llama), "recent": 6, "prefill_chunk": 16}
        with evict(tiny_llama, policy, 0.3, "global", **options):
            batch = tiny_llama(**inputs)
            for row in range(3):
                alone = tiny_llama(**{name: value[row : row + 1] for name, value in inputs.items()})
                torch.testing.assert_close(batch.logits[row, pads[row] :], alone.logits[0, pads[row] :])
                for layer in range(3):
                    got, own = batch.past_key_values.kept(layer)[row], alone.past_key_values.kept(layer)[0]
                    assert all(torch.equal(one, other) for one, other in zip(got, own, strict=True))


@torch.no_grad()
def test_a_share_counts_from_the_whole_prompt_from_the_first_chunk_on(tiny_llama, prompt):
    stored = []
    with evict(tiny_llama, "knorm", 0.5, prefill_chunk=10, sinks=1, recent=2) as session:
        cache = session.new_cache()
        end_step = cache.end_step

        def followed(completed: bool) -> None:
            end_step(completed)
            stored.append(cache.entries // 6)

        cache.end_step = followed
        tiny_llama(prompt(1, 60), past_key_values=cache)
    assert stored == [10, 20, 30, 30, 30, 30], "30 of 60 may stay: nothing of the first 30 goes early"


class Counter:
    """The most entries that a cache's storage held at any time, counted in the storage after every layer."""

    def __init__(self, model: Any) -> None:
        self.cache: RaggedCache | None = None
        self.most = 0
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        if self.cache is not None:
            self.most = max(self.most, sum(sum(store.lengths) for store in self.cache.stores))


@pytest.fixture
def counter(tiny_llama) -> Counter:
    return Counter(tiny_llama)


# The model is the same for all examples: nothing writes to it.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_stored_entries_never_exceed_budget_chunk_and_buffer(tiny_llama, gates_for, counter, data):
    budget = data.draw(st.sampled_from([0.1, 0.37, 0.9, 3, 11, 40, "70 entries"]), "budget")
    chunk, buffer = data.draw(st.integers(1, 40), "chunk"), data.draw(st.integers(0, 12), "buffer")
    scope = data.draw(st.sampled_from(["global", "layer", "head", "pyramid"]), "scope")
    policy = data.draw(st.sampled_from(POLICIES), "policy")
    floor = data.draw(st.sampled_from([0.0, 0.5]), "floor")
    pads = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=2), "pads")
    lengths = data.draw(st.lists(st.integers(31, 90), min_size=1, max_size=2), "lengths")
    torch.manual_seed(data.draw(st.integers(0, 9), "seed"))
    options = {"gates": gates_for(tiny_llama), "sinks": 2, "recent": 4, "buffer": buffer, "floor": floor}
    with torch.no_grad(), evict(tiny_llama, policy, budget, scope, prefill_chunk=chunk, **options) as session:
        cache = counter.cache = session.new_cache()
        counter.most = 0
        mask = torch.ones(len(pads), 0, dtype=torch.long)
        allowed: list[int] = []
        for turn, length in enumerate(lengths):  # the second is a long question to a compressed context
            new = torch.ones(len(pads), length, dtype=torch.long)
            for row, pad in enumerate(pads):
                new[row, :pad] = 0
            mask = torch.cat([mask, new], dim=1)
            tiny_llama(torch.randint(3, 128, new.shape), attention_mask=mask, past_key_values=cache)
            cache.check()
            allowed = [session.plan.budget.total(n, session.layout) for n in cache.tokens_seen.tolist()]
            limit = sum(allowed) + len(pads) * (chunk + (buffer if turn else 0)) * 6
            assert counter.most <= session.report().peak_entries <= limit
            counter.most = 0
            for row, stored in enumerate(cache.lengths().sum((1, 2)).tolist()):
                assert stored <= allowed[row] + (buffer * 6 if turn else 0)
            if len(lengths) == 1 and scope != "pyramid":
                expected = [min(n * 6, allow) for n, allow in zip(cache.tokens_seen.tolist(), allowed, strict=True)]
                assert cache.entries == sum(expected), "and the budget is used in full"
            for _ in range(3):  # and an answer, token by token
                mask = torch.cat([mask, torch.ones(len(pads), 1, dtype=torch.long)], dim=1)
                tiny_llama(torch.randint(3, 128, (len(pads), 1)), attention_mask=mask, past_key_values=cache)
                room = [session.plan.budget.total(n, session.layout) for n in cache.tokens_seen.tolist()]
                assert counter.most <= sum(room) + len(pads) * (buffer + 1) * 6
                for row, stored in enumerate(cache.lengths().sum((1, 2)).tolist()):
                    assert stored <= room[row] + buffer * 6
                counter.most = 0


@torch.no_grad()
def test_generate_with_its_own_chunks_works_too(tiny_llama, prompt):
    with evict(tiny_llama, "knorm", 10, recent=2, buffer=4) as session:
        tiny_llama.generate(prompt(2, 60), max_new_tokens=3, do_sample=False, prefill_chunk_size=12)
        assert session.report().peak_entries <= 2 * (10 + 12 + 4) * 6
        session.last_cache.check()


@torch.no_grad()
def test_a_compressed_context_takes_a_long_question_in_chunks(tiny_llama, prompt):
    whole = torch.cat([prompt(1, 60), prompt(1, 30, seed=1)], dim=1)
    logits = []
    for chunk in (None, 8):
        with evict(tiny_llama, "knorm", 20, recent=2, buffer=64, prefill_chunk=chunk) as session:
            cache = session.new_cache()
            for start in range(0, 60, 8):  # the same context in both
                tiny_llama(whole[:, start : min(60, start + 8)], past_key_values=cache)
            cache.compress()
            logits.append(tiny_llama(whole[:, 60:], past_key_values=cache).logits)
            assert cache.kept(0)[0][0][-30:].tolist() == list(range(60, 90)), "within the buffer it stays whole"
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_other_forms_of_the_input(tiny_llama, prompt):
    ids = prompt(1, 40)
    with evict(tiny_llama, "knorm", 1.0, prefill_chunk=16):
        positional = tiny_llama(ids, torch.ones_like(ids)).logits
        embedded = tiny_llama(inputs_embeds=tiny_llama.get_input_embeddings()(ids)).logits
        shifted = tiny_llama(ids, position_ids=torch.arange(5, 45)[None]).logits  # RoPE is relative
        bare = tiny_llama.model(ids).last_hidden_state
        as_tuple = tiny_llama.model(ids, return_dict=False)[0]
        labelled = tiny_llama(ids, labels=ids).loss
    expected = tiny_llama(ids, labels=ids)
    for logits in (positional, embedded, shifted):
        torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bare, tiny_llama.model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(as_tuple, bare)
    torch.testing.assert_close(labelled, expected.loss, atol=1e-5, rtol=1e-5)


def test_hooks_are_gone_after_the_block(tiny_llama, prompt):
    with evict(tiny_llama, "knorm", prefill_chunk=8):
        tiny_llama(prompt(1, 20))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in tiny_llama.modules())


@pytest.mark.parametrize("scope", ["head", "layer"])
@torch.no_grad()
def test_chunks_work_towards_the_choice_of_one_eviction(tiny_llama, gates_for, prompt, scope):
    """Retention judges by the end of the prompt: where log β does not depend on what was evicted, all is as at once.

    The first layer's gates see the embeddings alone. Scores at the end of each chunk would choose differently.
    """
    kept = []
    for chunk in (None, 7, 20):
        options = {"gates": gates_for(tiny_llama), "sinks": 0, "recent": 0, "prefill_chunk": chunk}
        with evict(tiny_llama, "retention", 0.3, scope, **options) as session:
            tiny_llama(prompt(2, 60), past_key_values=session.new_cache())
            kept.append([[head.tolist() for head in row] for row in session.last_cache.kept(0)])
    assert kept[1] == kept[0] and kept[2] == kept[0]
