"""Multi-head latent attention: one latent a token and layer is stored, evicted, and expanded for attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tenure.eviction import evict
from tenure.retention import RetentionGates, SoftEviction, UnsupportedModelError, attach
from tenure.retention.decoder_layers import full_attention_layers
from tenure.scripts.bench.tiny_models import TEXT_ARCHITECTURES
from tenure.training import Batch, GateObjective

from .tiny_prompts import IDS, MASK, forgetful

LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "minicpm3", "youtu", "axk1", "bailing_hybrid")
PURE = ("deepseek_v2", "deepseek_v3", "minicpm3")  # no other kind of layer
GREEDY = {"do_sample": False, "max_new_tokens": 5}


@pytest.mark.parametrize("name", LATENT)
def test_nothing_evicted_is_the_plain_model(name: str) -> None:
    model: Any = TEXT_ARCHITECTURES[name].build()
    layers = full_attention_layers(model)
    assert all(layer.latent and layer.num_kv_heads == 1 and layer.head_dim == 16 for layer in layers)
    plain = model.generate(IDS, attention_mask=MASK, output_logits=True, return_dict_in_generate=True, **GREEDY)
    with evict(model, "retention", 1.0, gates=forgetful(model)) as session:
        ours = model.generate(IDS, attention_mask=MASK, output_logits=True, return_dict_in_generate=True, **GREEDY)
        session.last_cache.check()
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    assert session.report().lengths.shape == (2, len(layers), 1)
    with evict(model, "streaming_llm", 0.4, recent=4, sinks=1, buffer=2) as session:
        model.generate(IDS, attention_mask=MASK, **GREEDY)
        assert session.report().kept_share < 0.6


@pytest.mark.parametrize("name", PURE)
@pytest.mark.parametrize("chunk", [None, 8])
@torch.no_grad()
def test_a_padded_question_after_a_context(name: str, chunk: int | None) -> None:
    model: Any = TEXT_ARCHITECTURES[name].build()
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    want = model(IDS, attention_mask=MASK, position_ids=positions).logits[:, -6:]
    with evict(model, "random", 1.0, prefill_chunk=chunk) as session:
        cache = session.new_cache()
        session.extend(cache, IDS[:, :34], MASK[:, :34])
        logits = session.extend(cache, torch.cat([IDS[:, 34:], IDS[:, :2]], 1), torch.tensor([[1] * 6 + [0] * 2] * 2))
    torch.testing.assert_close(logits[:, :6], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["global", "layer"])
@torch.no_grad()
def test_the_step_after_an_eviction_sees_the_kept_entries(scope: str) -> None:
    """Against the plain model whose own cache is cut to the same entries, layer by layer."""
    model, ids = TEXT_ARCHITECTURES["deepseek_v3"].build(), IDS[:1]
    plain = DynamicCache(config=model.config)
    model(ids[:, :39], past_key_values=plain)
    with evict(model, "retention", 0.3, scope, gates=forgetful(model), sinks=1, recent=2) as session:
        cache = session.new_cache()
        model(ids[:, :39], past_key_values=cache)
        kept = [cache.kept(layer)[0][0] for layer in range(4)]
        ours = model(ids[:, 39:], past_key_values=cache).logits
    assert len({len(positions) for positions in kept}) > 1 or scope == "layer"
    layers: list[Any] = plain.layers
    for layer, positions in zip(layers, kept, strict=True):
        layer.keys, layer.values = layer.keys[:, :, positions.long()], layer.values[:, :, positions.long()]
    at = torch.tensor([[39]])
    torch.testing.assert_close(
        ours, model(ids[:, 39:], past_key_values=plain, position_ids=at).logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_files_forks_and_stacks(tmp_path: Path) -> None:
    model: Any = TEXT_ARCHITECTURES["deepseek_v2"].build()
    with evict(model, "retention", 0.4, gates=forgetful(model), sinks=1, recent=2) as session:
        cache, other = session.new_cache(), session.new_cache()
        session.extend(cache, IDS[:1, :30])
        session.extend(other, IDS[1:, :21])
        cache.save(tmp_path / "cache.safetensors")
        loaded, fork = session.load_cache(tmp_path / "cache.safetensors"), cache.fork()
        stacked = session.stack([cache, other])
        want = session.extend(cache, IDS[:1, 30:34])
        assert torch.equal(session.extend(loaded, IDS[:1, 30:34]), want)
        assert torch.equal(session.extend(fork, IDS[:1, 30:34]), want)
        both = session.extend(stacked, torch.cat([IDS[:1, 30:34], IDS[1:, 21:25]]))
        torch.testing.assert_close(both[:1], want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both[1:], session.extend(other, IDS[1:, 21:25]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["snapkv", "knorm", "h2o", "expected_attention", "defensive"])
def test_policies_that_read_keys_are_refused(policy: str) -> None:
    model: Any = TEXT_ARCHITECTURES["deepseek_v3"].build()
    message = f"policy '{policy}' does not support DeepseekV3ForCausalLM: it needs keys and values of every head"
    with pytest.raises(UnsupportedModelError, match=message), evict(model, policy):
        pass


@pytest.mark.parametrize("name", PURE)
def test_gates_train(name: str) -> None:
    """One gate a layer decays all heads; at β = 1 the model is unchanged."""
    model: Any = TEXT_ARCHITECTURES[name].build()
    kept = RetentionGates.for_model(model, gate_width=8, initial_bias=1e4)
    with torch.no_grad():
        plain = model(IDS, use_cache=False).logits
        with attach(model, kept):
            torch.testing.assert_close(model(IDS, use_cache=False).logits, plain, rtol=1e-4, atol=1e-4)
        outputs = {}
        for implementation in ("naive", "channels"):
            with attach(model, forgetful(model), implementation):
                outputs[implementation] = model(IDS, use_cache=False).logits
        torch.testing.assert_close(outputs["channels"], outputs["naive"], rtol=1e-3, atol=1e-4)
    gates, loss_mask = forgetful(model), torch.ones_like(IDS, dtype=torch.bool)
    loss_mask[:, :21] = False
    objective = GateObjective(model, gates, budget=0.3, evictions=[SoftEviction(0.4, sinks=1, recent=2)])
    for prompt in ((), (20, 20)):
        gates.zero_grad()
        objective(Batch(IDS, torch.arange(40).expand(2, 40), None, loss_mask, prompt)).total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in gates.parameters())
        assert gates.weight.grad is not None and gates.weight.grad.abs().sum() > 0


def test_autocast() -> None:
    model: Any = TEXT_ARCHITECTURES["deepseek_v3"].build()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model.generate(IDS, attention_mask=MASK, **GREEDY)
        with evict(model, "random", 1.0) as session:
            ours = model.generate(IDS, attention_mask=MASK, **GREEDY)
            assert session.last_cache.stores[0].key.dtype == torch.bfloat16
    assert ours.shape == plain.shape
