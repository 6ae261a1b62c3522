"""`model.generate` inside the block, and the model outside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tenure.eviction import evict, policy_names


def left_padded(ids: torch.Tensor, pads: list[int]) -> dict[str, Any]:
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model: Any, seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    return model.generate(max_new_tokens=12, return_dict_in_generate=True, output_logits=True, **kwargs)


@pytest.mark.parametrize("policy", policy_names())
def test_left_padded_rows_get_what_they_get_alone(tiny_llama, gates_for, prompt, policy):
    ids, pads = prompt(3, 50), [0, 13, 30]
    with evict(tiny_llama, policy, 0.3, "global", gates=gates_for(tiny_llama), recent=6, buffer=3) as session:
        generate(tiny_llama, **left_padded(ids, pads), do_sample=False)
        batch = generate(tiny_llama, **left_padded(ids, pads), do_sample=False)
        cache = batch.past_key_values
        cache.check()
        for row, pad in enumerate(pads):
            alone = generate(tiny_llama, input_ids=ids[row : row + 1, pad:], do_sample=False)
            assert torch.equal(batch.sequences[row, 50:], alone.sequences[0, 50 - pad :])
            logits = torch.stack(batch.logits)[:, row]
            torch.testing.assert_close(logits, torch.stack(alone.logits)[:, 0], atol=1e-4, rtol=1e-4)
            for layer in session.report(cache).layer_indices:
                for one, other in zip(cache.kept(layer)[row], alone.past_key_values.kept(layer)[0], strict=True):
                    assert torch.equal(one, other)


def test_sliding_layers_keep_their_own_cache(tiny_model, gates_for, prompt):
    model = tiny_model("gemma3")
    with evict(model, "retention", 0.25, gates=gates_for(model), recent=4) as session:
        output = model(prompt(1, 40))
        assert session.report().layer_indices == (1,)
        kinds = [type(layer).__name__ for layer in output.past_key_values.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "RaggedLayer", "DynamicSlidingWindowLayer"]


def test_without_a_cache_the_forward_is_untouched(tiny_llama, prompt):
    ids = prompt(1, 30)
    expected = tiny_llama(ids, use_cache=False)
    with evict(tiny_llama, "knorm", 0.2) as session:
        got = tiny_llama(ids, use_cache=False)
        assert got.past_key_values is None
        with pytest.raises(ValueError, match="no cache to report on"):
            session.report()
    assert torch.equal(got.logits, expected.logits)


def test_outside_the_block_nothing_has_changed(any_tiny_model, prompt):
    ids, model = prompt(2, 30), any_tiny_model
    before, implementation = model(ids).logits, model.config._attn_implementation
    with pytest.raises(RuntimeError, match="on purpose"), evict(model, "knorm", 0.2):
        model(ids)
        raise RuntimeError("on purpose")
    assert torch.equal(model(ids).logits, before)
    assert isinstance(model(ids).past_key_values, DynamicCache)
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_first_forward_is_the_models_own_bit_for_bit(any_tiny_model, prompt):
    ids = prompt(2, 30)
    expected = any_tiny_model(ids).logits
    with evict(any_tiny_model, "knorm", 0.2):
        assert torch.equal(any_tiny_model(ids).logits, expected)


@pytest.mark.real
def test_the_real_model_generates_the_same_with_the_whole_budget(real_model_path, essay_texts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model_path)
    model: Any = AutoModelForCausalLM.from_pretrained(real_model_path, dtype=torch.float32).eval()
    inputs = tokenizer(essay_texts[0][:1200], return_tensors="pt")
    expected = generate(model, **inputs, do_sample=False)
    with evict(model, "snapkv", 1.0):
        got = generate(model, **inputs, do_sample=False)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-5)
    with evict(model, "snapkv", 0.3, buffer=4) as session:
        model.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert session.report().kept_share < 0.32
