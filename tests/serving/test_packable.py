"""Models that a packed forward would compute otherwise than each sequence alone are refused, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from tenure.eviction import evict
from tenure.scripts.bench.tiny_models import TEXT_ARCHITECTURES
from tenure.serving import Request, TooLarge
from tenure.serving.packable import check_packable, max_tokens

from .engines import answer_without_cache, close, make_engine, tokens

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES | {"max_position_embeddings": 64} | options
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def phi3() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    sizes = SIZES | {"max_position_embeddings": 64, "original_max_position_embeddings": 32}
    return Phi3ForCausalLM(Phi3Config(**sizes, rope_parameters=rope)).eval()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_what_else_is_computed_is_used_up_to_its_original_length(kind):
    """A request beyond it would change the frequencies of all others: of new tokens, not of those that are stored."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    if kind == "dynamic":
        model = llama(max_position_embeddings=128, rope_parameters=rope | {"original_max_position_embeddings": 32})
    else:
        model = phi3()
    assert max_tokens(model)[0] == 32
    with evict(model, "full") as session:
        engine = make_engine(session, "lru_reactive", prompts=6.0)
        message = rf"got 33 tokens of prompt and answer; accepted: as beyond it the model's RoPE \('{kind}'\) .* 32"
        with pytest.raises(TooLarge, match=message):
            engine.submit(Request("r", tokens(1, 30), 3))
        prompts = [tokens(1, 26), tokens(2, 9)]
        for prompt in prompts:
            engine.submit(Request("r", prompt, 6))
        for one in engine.run():
            assert one.tokens == answer_without_cache(session, one.request.prompt.tolist(), None)  # pyright: ignore
        close(engine)


def test_other_rope_is_bounded_by_the_models_context():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert max_tokens(llama(rope_parameters=rope)) == (64, "the model's")
    assert max_tokens(llama()) == (64, "the model's")


class WithoutPositions(LlamaForCausalLM):
    def forward(self, input_ids=None, past_key_values=None, use_cache=None):  # pyright: ignore
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)


def test_models_are_refused_by_what_they_lack_or_have():
    torch.manual_seed(0)
    model = WithoutPositions(LlamaConfig(**SIZES)).eval()
    message = "got a WithoutPositions, whose forward takes no position_ids and no logits_to_keep; accepted: models that"
    with evict(model, "full") as session, pytest.raises(ValueError, match=message):
        make_engine(session, "lru")
    model = llama()
    model.config.num_kv_shared_layers = 1
    with evict(model, "full") as session, pytest.raises(ValueError, match="got a LlamaForCausalLM with num_kv_share"):
        make_engine(session, "lru")
    model = llama()
    model.config.rope_parameters["mrope_section"] = [1, 1, 2]  # pyright: ignore[reportOptionalSubscript]
    with pytest.raises(ValueError, match=r"whose rope_parameters have an mrope_section; accepted: models with one po"):
        check_packable(model)


def test_every_supported_family_is_accepted(any_tiny_model):
    check_packable(any_tiny_model)


@pytest.mark.parametrize(
    ("name", "what"),
    [("gpt_oss", "learned sinks"), ("gemma2", "capped logits"), ("deepseek_v3", "cache holds latents")],
)
def test_attention_that_packed_forwards_do_not_compute_is_refused(name, what):
    with pytest.raises(ValueError, match=f"got a .*ForCausalLM, whose .*{what}"):
        check_packable(TEXT_ARCHITECTURES[name].build())
