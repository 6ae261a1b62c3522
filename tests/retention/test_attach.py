"""Attaching to every family: exact while β = 1, right while it is not, and gone without a trace afterwards."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from tenure.retention import RetentionGates, UnsupportedModelError, attach
from tenure.retention.decoder_layers import full_attention_layers

TOKENS = torch.randint(3, 128, (2, 23), generator=torch.Generator().manual_seed(1))


def decaying_gates(model: PreTrainedModel, **shape: object) -> RetentionGates:
    """Random gates that forget: log β spread over about (-3, 0)."""
    torch.manual_seed(3)
    return RetentionGates.for_model(model, gate_width=16, initial_bias=0.0, init_std=0.5, **shape)


def test_outside_the_block_nothing_has_changed(any_tiny_model: PreTrainedModel) -> None:
    model = any_tiny_model
    before, hooks = model(TOKENS).logits, [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with attach(model, decaying_gates(model)):
        inside = model(TOKENS, use_cache=False).logits
    assert not torch.allclose(inside, before, atol=1e-3)
    assert torch.equal(model(TOKENS).logits, before)
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_a_raised_error_leaves_no_trace_either(tiny_llama: PreTrainedModel) -> None:
    before = tiny_llama(TOKENS).logits
    with pytest.raises(RuntimeError, match="stop"), attach(tiny_llama, decaying_gates(tiny_llama)):
        raise RuntimeError("stop")
    assert torch.equal(tiny_llama(TOKENS).logits, before)


def test_gates_at_one_change_nothing(any_tiny_model: PreTrainedModel) -> None:
    gates = RetentionGates.for_model(any_tiny_model, gate_width=16, initial_bias=50.0)
    with attach(any_tiny_model, gates):
        inside = any_tiny_model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(inside, any_tiny_model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_only_full_attention_layers_are_gated(tiny_model) -> None:
    model = tiny_model("gemma3", num_hidden_layers=3)
    assert [layer.layer_idx for layer in full_attention_layers(model)] == [1]
    assert decaying_gates(model).layer_indices == (1,)


def test_all_implementations_agree(any_tiny_model: PreTrainedModel) -> None:
    gates, outputs = decaying_gates(any_tiny_model), {}
    with torch.no_grad():
        for implementation in ("naive", "channels", "flex"):
            with attach(any_tiny_model, gates, implementation):
                outputs[implementation] = any_tiny_model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(outputs["channels"], outputs["naive"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs["flex"], outputs["naive"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_what_they_are_alone(any_tiny_model: PreTrainedModel, side: str) -> None:
    model, gates, pad = any_tiny_model, decaying_gates(any_tiny_model), 6
    row = TOKENS[1:, pad:]
    fill = (pad, 0) if side == "left" else (0, pad)
    batch = torch.cat([TOKENS[:1], F.pad(row, fill, value=0)])
    mask = torch.cat([torch.ones(1, 23, dtype=torch.long), F.pad(torch.ones_like(row), fill)])
    real = slice(pad, None) if side == "left" else slice(None, -pad)
    with attach(model, gates) as attached:
        alone = model(row, use_cache=False).logits[0]
        alone_beta = attached.log_beta()
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        together = model(batch, attention_mask=mask, position_ids=position_ids, use_cache=False).logits[1, real]
        together_beta = attached.log_beta()[:, 1:, :, real]
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together_beta, alone_beta, rtol=1e-3, atol=1e-5)


def test_packed_documents_are_what_they_are_alone(any_tiny_model: PreTrainedModel) -> None:
    model, gates, cut = any_tiny_model, decaying_gates(any_tiny_model), 9
    position_ids = torch.cat([torch.arange(cut), torch.arange(23 - cut)])[None]
    with attach(model, gates):
        parts = [model(part, use_cache=False).logits for part in (TOKENS[:1, :cut], TOKENS[:1, cut:])]
        packed = model(TOKENS[:1], position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(parts, dim=1), rtol=1e-3, atol=1e-4)


def test_gradients_reach_every_gate(any_tiny_model: PreTrainedModel) -> None:
    model = any_tiny_model.requires_grad_(False)
    gates = decaying_gates(model)
    with attach(model, gates):
        model(TOKENS, use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates.parameters())


@pytest.mark.parametrize("projection", ["per_layer", "shared", "shared_heads"])
def test_projections(tiny_llama: PreTrainedModel, projection: str) -> None:
    gates = decaying_gates(tiny_llama, projection=projection)
    names = [name for name, _ in gates.named_parameters()]
    assert names.count("weight") == 1 and names.count("bias") == 1
    shape = {"per_layer": (3, 2, 16), "shared": (2, 16), "shared_heads": (1, 16)}[projection]
    assert gates.weight.shape == shape
    hidden = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    log_beta = gates.log_beta(1, hidden)
    assert log_beta.shape == (2, 2, 5) and log_beta.dtype == torch.float32 and log_beta.max() <= 0
    features = gates.bodies["1"](hidden.float())
    if projection == "shared_heads":
        features = features.view(2, 5, 2, 16)
        expected = F.logsigmoid((features * gates.weight[0]).sum(-1) + gates.bias)
    else:
        weight, bias = (gates.weight[1], gates.bias[1]) if projection == "per_layer" else (gates.weight, gates.bias)
        expected = F.logsigmoid(features @ weight.T + bias)
    torch.testing.assert_close(log_beta, expected.transpose(1, 2))


def test_fresh_gates_forget_nothing(tiny_llama: PreTrainedModel) -> None:
    log_beta = RetentionGates.for_model(tiny_llama).log_beta(0, torch.randn(1, 9, 32))
    assert log_beta.min() > -1e-6


def test_what_cannot_be_attached_is_refused_by_name(tiny_llama: PreTrainedModel, tiny_model) -> None:
    bloom = BloomForCausalLM(BloomConfig(n_layer=1, n_head=2, hidden_size=16, vocab_size=32))
    with pytest.raises(UnsupportedModelError, match=r"BloomForCausalLM is not supported.*Supported: Llama, Mistral"):
        RetentionGates.for_model(bloom)
    other = tiny_model("qwen3", num_key_value_heads=4)
    with (
        pytest.raises(ValueError, match="do not fit Qwen3ForCausalLM: num_kv_heads 2 against 4"),
        attach(other, decaying_gates(tiny_llama)),
    ):
        pass


def test_misuse_is_named(tiny_llama: PreTrainedModel) -> None:
    gates = decaying_gates(tiny_llama)
    with attach(tiny_llama, gates) as attached:
        with pytest.raises(RuntimeError, match="needs a forward"):
            attached.log_beta()
        with pytest.raises(ValueError, match="already inside an attach"), attach(tiny_llama, gates):
            pass
        with pytest.raises(ValueError, match=r"a cache of \d+ tokens inside attach\(\), .*use evict"):
            tiny_llama.generate(TOKENS[:1], max_new_tokens=3, do_sample=False)  # type: ignore[operator]
        assert tiny_llama(TOKENS, use_cache=False).logits.shape == (2, 23, 128)
