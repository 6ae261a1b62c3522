"""Models that cannot be right are refused by name, for training as for eviction; wrappers are looked through."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from tenure.eviction import evict
from tenure.retention import RetentionGates, UnsupportedModelError, attach, decoder_layers
from tenure.retention.decoder_layers import copy_cache_layer, full_attention_layers, plain_model
from tenure.scripts.bench.tiny_models import TEXT_ARCHITECTURES

REFUSED = {
    "deepseek_v32": "its attention layers use the cache DynamicIndexedLayer",
    "diffllama": "its attention splits and repeats values after they are cached",
    "falcon_h1": "its attention layers use the cache LinearAttentionAndFullAttentionLayer",
    "gemma3n_text": "reuse the keys and values of another layer",
    "gemma4_text, shared KV": "reuse the keys and values of another layer",
    "hrm_text": "several of its attention layers share the cache layer 0",
    "jetmoe": "its attention repeats keys and values after they are cached",
    "minimax": "it does not take transformers' DynamicCache",
    "minimax_m3_vl_text, sparse": "its attention layers use the cache MiniMaxM3VLSparseCacheLayer",
    "mistral, all sliding": "no causal full-attention layer",
    "zamba2": "has the index -1, outside its cache's 4 layers",
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_and_eviction_refuse_the_same_models(name: str) -> None:
    model = TEXT_ARCHITECTURES[name].build()
    with pytest.raises(UnsupportedModelError, match=f"is not supported: .*{REFUSED[name]}.*Supported: Llama"):
        RetentionGates.for_model(model)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]), evict(model, "knorm"):
        pass


@pytest.mark.parametrize("name", ["diffllama", "jetmoe"])
def test_changed_keys_and_values_are_noticed_in_the_first_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the list does not know: attention must be over what the cache has stored."""
    monkeypatch.setattr(decoder_layers, "CHANGES_KV", {})
    model = TEXT_ARCHITECTURES[name].build()
    message = "Attention is not supported: it attends over other keys and values than it caches"
    with evict(model, "knorm") as session:
        cache = session.new_cache()
        with pytest.raises(UnsupportedModelError, match=message):
            model(torch.arange(3, 20)[None], past_key_values=cache)
        assert cache.columns_seen == 0


def test_wrappers_are_looked_through(tiny_llama: LlamaForCausalLM) -> None:
    compiled = torch.compile(tiny_llama, backend="eager")
    assert plain_model(compiled) is tiny_llama
    assert [layer.layer_idx for layer in full_attention_layers(compiled)] == [0, 1, 2]  # pyright: ignore
    ids = torch.arange(3, 40)[None]
    with evict(compiled, "knorm", 0.5) as session:  # pyright: ignore[reportArgumentType]
        assert session.model is tiny_llama
        tiny_llama(ids)
        assert session.report().kept_share < 0.9


@pytest.mark.parametrize("given", ["a/name", (1, None), nn.Linear(2, 2), None])
def test_other_things_than_models_are_named(given: object, tiny_llama: LlamaForCausalLM) -> None:
    message = f"got {type(given).__name__} as model; accepted: a transformers model"
    with pytest.raises(ValueError, match=message), evict(given, "knorm"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="got DataParallel as model"):
        full_attention_layers(nn.DataParallel(tiny_llama))  # type: ignore[arg-type]


def test_a_shared_configuration_is_named(tiny_llama: LlamaForCausalLM) -> None:
    twin = LlamaForCausalLM(tiny_llama.config)
    gates = RetentionGates.for_model(tiny_llama, gate_width=8)
    with attach(tiny_llama, gates):
        with pytest.raises(ValueError, match="already inside an attach"), evict(tiny_llama, "knorm"):
            pass
        with pytest.raises(ValueError, match="another model with the same configuration object"), evict(twin, "knorm"):
            pass
    twin.config = copy.deepcopy(tiny_llama.config)


@torch.no_grad()
def test_copied_cache_layers_are_independent() -> None:
    """State-space layers write in place: a shallow copy would share its state with the original."""
    model = TEXT_ARCHITECTURES["qwen3_next"].build()
    cache = DynamicCache(config=model.config)
    model(torch.arange(3, 20)[None], past_key_values=cache)
    original: Any = cache.layers[0]
    copied = copy_cache_layer(original)
    before = copied.recurrent_states[0].clone()
    model(torch.arange(30, 33)[None], past_key_values=cache)
    assert torch.equal(copied.recurrent_states[0], before)
    assert not torch.equal(original.recurrent_states[0], before)
