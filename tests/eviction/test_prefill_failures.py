"""Prompts in chunks that cannot be cut, or that raise on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tenure.eviction import Random, SnapKV, evict
from tenure.eviction.protected_tokens import ProtectedTokens


def test_what_cannot_be_cut_is_refused_before_anything_runs(tiny_llama, prompt):
    ids = prompt(1, 40)
    with evict(tiny_llama, "knorm", 0.5, prefill_chunk=16) as session:
        cache = session.new_cache()
        for name in ("output_hidden_states", "output_attentions"):
            with pytest.raises(ValueError, match=f"runs in chunks, which {name} cannot follow"):
                tiny_llama(ids, past_key_values=cache, **{name: True})
        with pytest.raises(ValueError, match="runs in chunks, which image_embeds cannot follow"):
            tiny_llama(ids, past_key_values=cache, image_embeds=torch.ones(1, 40))
        with pytest.raises(ValueError, match=r"needs a 2-D attention_mask .* got \(1, 1, 40, 40\)"):
            tiny_llama(ids, attention_mask=torch.zeros(1, 1, 40, 40), past_key_values=cache)
        assert cache.columns_seen == 0
        tiny_llama(ids[:, :16], past_key_values=cache, output_hidden_states=True)
        assert cache.columns_seen == 16
        untouched = tiny_llama(ids, use_cache=False)
        assert untouched.past_key_values is None
    assert torch.equal(untouched.logits, tiny_llama(ids).logits)


@torch.no_grad()
def test_an_input_refused_at_its_start_leaves_the_cache_as_it_was(tiny_llama, prompt):
    with evict(tiny_llama, "knorm", 12, buffer=4, prefill_chunk=16) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 40), past_key_values=cache)
        fork = cache.fork()
        with pytest.raises(ValueError, match="the cache holds 1 rows, the model got 2"):
            tiny_llama(prompt(2, 40), past_key_values=cache)
        cache.plan = cache.plan.changed(None, None, protect=ProtectedTokens.of([(0, 60)]))
        with pytest.raises(ValueError, match="60 of the 80 tokens of row 0 are protected"):
            tiny_llama(prompt(1, 40), past_key_values=cache)
        cache.plan = fork.plan
        for seed in range(20):  # evicts as a cache does that was never refused anything
            for one in (cache, fork):
                tiny_llama(prompt(1, 1, seed=seed), past_key_values=one)
        assert torch.equal(cache.positions(1), fork.positions(1))


def test_layers_that_take_no_prompt_in_pieces_are_refused_by_name(tiny_model):
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config).eval()
    with evict(model, "knorm"):
        pass
    with (
        pytest.raises(ValueError, match="prefill_chunk needs layers that take a prompt in pieces; Qwen3NextForC"),
        evict(model, "knorm", prefill_chunk=8),
    ):
        pass


class Trap:
    """Raises in a forward of a module, the `at`-th time it is called."""

    def __init__(self, module: torch.nn.Module, at: int) -> None:
        self.left = at
        self.hook = module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.hook.remove()
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("at", [1, 3, 4])
@torch.no_grad()
def test_a_prompt_that_raises_in_a_chunk_leaves_no_trace(tiny_model, prompt, family, at):
    model, ids = tiny_model(family), prompt(1, 40)
    with evict(model, SnapKV(window=4), 0.3, recent=4, prefill_chunk=10) as session:
        cache = session.new_cache()
        Trap(model.model.layers[1].mlp, at)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(ids, past_key_values=cache)
        assert cache.columns_seen == cache.entries == 0
        cache.check()
        again = model(ids, past_key_values=cache).logits
        cache.check()
        assert torch.equal(again, model(ids).logits)


@torch.no_grad()
def test_a_question_that_raises_is_taken_back_or_the_cache_refuses_to_go_on(tiny_llama, prompt):
    ids, question = prompt(1, 40), prompt(1, 30, seed=1)
    with evict(tiny_llama, Random(), 12, recent=4, sinks=0, buffer=30, prefill_chunk=10) as session:
        cache = session.new_cache()
        tiny_llama(ids, past_key_values=cache)
        expected = tiny_llama(question, past_key_values=cache.fork()).logits
        Trap(tiny_llama.model.layers[2].mlp, 3)
        with pytest.raises(RuntimeError, match="on purpose"):
            tiny_llama(question, past_key_values=cache)
        cache.check()
        assert cache.columns_seen == 40, "nothing was evicted: taken back"
        torch.testing.assert_close(tiny_llama(question, past_key_values=cache.fork()).logits, expected)
        cache.compress(buffer=5)
        Trap(tiny_llama.model.layers[2].mlp, 3)
        with pytest.raises(RuntimeError, match="on purpose"):
            tiny_llama(question, past_key_values=cache)
        with pytest.raises(ValueError, match="some of its chunks had been evicted and cannot be undone; continue"):
            tiny_llama(question, past_key_values=cache)
        cache.reset()
        tiny_llama(question, past_key_values=cache)
