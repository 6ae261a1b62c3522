"""Models with learned sinks or capped logits: generation, eviction, chunks and training as for the ordinary softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tenure.eviction import evict
from tenure.retention import RetentionGates, SoftEviction, UnsupportedModelError, attach
from tenure.retention.decoder_layers import full_attention_layers
from tenure.scripts.bench.tiny_models import TEXT_ARCHITECTURES, Architecture
from tenure.training import Batch, GateObjective

from ..launches import running
from .tiny_prompts import IDS, MASK, forgetful

__all__ = ["running"]
FULL = ["full_attention"] * 3
MODELS = {
    "gpt_oss": TEXT_ARCHITECTURES["gpt_oss"],
    "granite_swa": TEXT_ARCHITECTURES["granite_swa"],
    "flint": TEXT_ARCHITECTURES["flint"],
    "gemma2": Architecture("gemma2", {"attn_logit_softcapping": 0.5}),
    "vaultgemma": Architecture("vaultgemma", {"attn_logit_softcapping": 0.5}),
}
KINDS = {"gemma2": "capped logits", "vaultgemma": "capped logits"}
GREEDY = {"do_sample": False, "max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_evicted_is_the_plain_model(name: str) -> None:
    model: Any = MODELS[name].build()
    assert {layer.softmax for layer in full_attention_layers(model)} == {KINDS.get(name, "learned sinks")}
    plain = torch.stack(model.generate(IDS, attention_mask=MASK, **GREEDY).logits)
    for chunk in (None, 8):
        with evict(model, "knorm", 1.0, prefill_chunk=chunk) as session:
            ours = torch.stack(model.generate(IDS, attention_mask=MASK, **GREEDY).logits)
            session.last_cache.check()
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    with evict(model, "retention", 0.4, gates=forgetful(model), recent=4, sinks=1, buffer=2) as session:
        model.generate(IDS, attention_mask=MASK, **GREEDY)
        assert session.report().kept_share < 0.6


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
@torch.no_grad()
def test_steps_after_an_eviction_see_the_kept_entries(name: str) -> None:
    """Against the plain model whose own cache is cut to the same entries, layer by layer; one token and several."""
    settings = {"num_hidden_layers": 3, "layer_types": FULL} | MODELS[name].settings
    model, ids = Architecture(name, settings).build(), IDS[:1]
    for new in (1, 4):
        plain, seen = DynamicCache(config=model.config), 40 - new
        model(ids[:, :seen], past_key_values=plain)
        with evict(model, "keydiff", 0.3, "layer", sinks=1, recent=2) as session:
            cache = session.new_cache()
            model(ids[:, :seen], past_key_values=cache)
            kept = [cache.kept(layer)[0] for layer in range(3)]
            ours = model(ids[:, seen:], past_key_values=cache).logits
        allowed = torch.zeros(3, 1, 4, new, 40, dtype=torch.bool)
        for layer in range(3):
            for head in range(4):
                allowed[layer, 0, head, :, kept[layer][head // 2].long()] = True
        allowed[..., seen:] = torch.ones(new, new, dtype=torch.bool).tril()
        handles = [
            model.model.layers[layer].self_attn.register_forward_pre_hook(_masked(allowed[layer]), with_kwargs=True)
            for layer in range(3)
        ]
        want = model(ids[:, seen:], past_key_values=plain).logits
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
@torch.no_grad()
def test_pages_and_their_kernel_give_the_same(name: str, running: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded rows, an eviction and two forwards after it; the kernel runs in Triton's interpreter."""
    monkeypatch.setattr("tenure.eviction.ops.paged_attention.PROGRAMS", 1)  # each costs the interpreter milliseconds
    settings = {"num_hidden_layers": 1, "layer_types": FULL[:1]} | MODELS[name].settings
    model = Architecture(name, settings).build()
    found = {}
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("TENURE_KERNELS", kernels)
        with evict(model, "keydiff", 0.4, "layer", sinks=1, recent=2) as session:
            cache = session.new_cache()
            model(IDS[:, :30], attention_mask=MASK[:, :30], past_key_values=cache)
            logits = [
                model(IDS[:, start:stop], attention_mask=MASK[:, :stop], past_key_values=cache).logits
                for start, stop in ((30, 31), (31, 34))
            ]
            found[kernels] = torch.cat(logits, 1)
        assert ("attend_piece" in running) == (kernels == "triton")
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-5, atol=1e-5)


def _masked(visible: torch.Tensor):
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)

    def hook(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask}

    return hook


@pytest.mark.parametrize("name", MODELS)
def test_gates_train(name: str) -> None:
    model: Any = MODELS[name].build()
    kept = RetentionGates.for_model(model, gate_width=8, initial_bias=1e4)
    with torch.no_grad():
        plain = model(IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]
        with attach(model, kept):
            ours = model(IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    gates, loss_mask = forgetful(model), torch.ones_like(IDS, dtype=torch.bool)
    loss_mask[:, :21] = False
    for prompt, evictions in (((), ()), ((20, 20), ()), ((20, 20), [SoftEviction(0.4, sinks=1, recent=2)])):
        objective = GateObjective(model, gates, budget=0.3, evictions=evictions)
        gates.zero_grad()
        objective(Batch(IDS, torch.arange(40).expand(2, 40), None, loss_mask, prompt)).total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in gates.parameters())
        assert gates.weight.grad is not None and gates.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "expected_attention", "defensive", "tova"])
def test_policies_that_compute_attention_weights_are_refused(policy: str) -> None:
    """They would score by the weights of another softmax."""
    model: Any = MODELS["gemma2"].build()
    message = f"policy '{policy}' does not support Gemma2ForCausalLM: it needs the weights of an ordinary softmax"
    with pytest.raises(UnsupportedModelError, match=message), evict(model, policy):
        pass
