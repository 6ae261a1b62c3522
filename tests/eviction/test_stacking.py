"""Caches as rows of one: each row goes on as its cache would have."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction import evict

POLICIES = (
    ("retention", 0.5, "global"), ("h2o", 0.3, "head"), ("snapkv", 6, "layer"), ("expected_attention", 0.7, "head"),
)  # fmt: skip


def compressed(session, model, ids, **options):
    """A cache of the prompt for each of `POLICIES`."""
    whole = session.new_cache()
    model(ids, past_key_values=whole)
    return [whole.fork().compress(name, budget, scope, buffer=40, **options) for name, budget, scope in POLICIES]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@torch.no_grad()
def test_rows_go_on_as_their_caches_would(tiny_model, gates_for, prompt, name):
    model = tiny_model(name)
    observe = ["snapkv", "h2o", "expected_attention", "retention"]
    with evict(model, "full", gates=gates_for(model), observe=observe, sinks=1, recent=2) as session:
        caches = compressed(session, model, prompt(1, 30))
        before = [cache.lengths() for cache in caches]
        stacked = session.stack(caches)
        stacked.check()
        assert torch.equal(stacked.lengths(), torch.cat(before))
        assert not torch.equal(before[0], before[1]), "the rows differ"
        question, one = prompt(1, 5, seed=1), prompt(1, 1, seed=2)
        both = stacked.fork()
        for ids in (question, one):
            logits = model(ids.expand(4, -1), past_key_values=both).logits
            for row, cache in enumerate(caches):
                alone = model(ids, past_key_values=cache).logits
                assert torch.allclose(logits[row : row + 1], alone, atol=1e-5), POLICIES[row]
        both.check()
        assert torch.equal(both.lengths(), torch.cat([cache.lengths() for cache in caches])), "nothing was evicted"
        assert torch.equal(stacked.lengths(), torch.cat(before)), "a fork is on its own"
        both.select_rows(torch.tensor([2]))
        logits = model(one, past_key_values=both).logits
        assert torch.allclose(logits, model(one, past_key_values=caches[2]).logits, atol=1e-5)


@torch.no_grad()
def test_prompts_of_other_lengths_are_padded_on_the_left(tiny_llama, gates_for, prompt):
    with evict(tiny_llama, "retention", 0.5, gates=gates_for(tiny_llama), sinks=1, recent=2, buffer=40) as session:
        contexts = [prompt(1, 30), prompt(1, 17, seed=3)]
        caches = [session.new_cache() for _ in contexts]
        for ids, cache in zip(contexts, caches, strict=True):
            tiny_llama(ids, past_key_values=cache)
        stacked = session.stack(caches)
        stacked.check()
        assert stacked.columns_seen == 30 and stacked.tokens_seen.tolist() == [30, 17]
        question = prompt(1, 4, seed=4)
        ids = torch.zeros(2, 34, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, context in enumerate(contexts):
            whole = torch.cat([context, question], 1)
            ids[row, -whole.shape[1] :], mask[row, -whole.shape[1] :] = whole, 1
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        answers = tiny_llama.generate(ids, attention_mask=mask, past_key_values=stacked.fork(), **options)
        for row, (context, cache) in enumerate(zip(contexts, caches, strict=True)):
            whole = torch.cat([context, question], 1)
            alone = tiny_llama.generate(whole, past_key_values=cache, **options)
            assert torch.equal(answers[row, -6:], alone[0, -6:])
        tiny_llama(question.expand(2, -1), attention_mask=mask, past_key_values=stacked)
        stacked.crop(-4)
        assert stacked.tokens_seen.tolist() == [30, 17]
        with pytest.raises(ValueError, match="cannot go back to 29"):
            stacked.crop(-1)


@torch.no_grad()
def test_what_a_stack_cannot_do_is_refused(tiny_model, tiny_llama, gates_for, prompt, tmp_path):
    with evict(tiny_llama, "snapkv", 0.5, sinks=1, recent=2) as session:
        cache = session.new_cache()
        with pytest.raises(ValueError, match="got no caches to stack"):
            session.stack([])
        with pytest.raises(ValueError, match="a cache to stack is empty"):
            session.stack([cache])
        tiny_llama(prompt(1, 20), past_key_values=cache)
        stacked = session.stack([cache, cache])
        with pytest.raises(ValueError, match="records nothing for policies and cannot be compressed"):
            stacked.compress(budget=4)
        with pytest.raises(ValueError, match="records nothing for policies and cannot be saved"):
            stacked.save(tmp_path / "stack.safetensors")
        assert not list(tmp_path.iterdir())
    with evict(tiny_llama, "snapkv", 0.5) as other:
        mine = other.new_cache()
        tiny_llama(prompt(1, 20), past_key_values=mine)
        with pytest.raises(ValueError, match="belong to different"):
            other.stack([mine, cache])
    gemma = tiny_model("gemma3")
    with evict(gemma, "snapkv", 0.5) as session:
        caches = [session.new_cache(), session.new_cache()]
        for length, cache in zip((20, 12), caches, strict=True):
            gemma(prompt(1, length), past_key_values=cache)
        with pytest.raises(ValueError, match=r"caches of \[12, 20\] columns cannot be stacked: DynamicSliding"):
            session.stack(caches)
