"""Models with quantised weights: torchao's int8 and int4, bitsandbytes' 8 and 4 bits, on a CPU.

Neither package is a requirement of the tests: `make quantized` installs both outside of the environment and runs this
file, as continuous integration does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tenure.eviction import evict
from tenure.eviction.model_adapters import output_weight
from tenure.retention import RetentionGates, attach
from tenure.retention.decoder_layers import full_attention_layers

GREEDY = {"do_sample": False, "max_new_tokens": 6}
SIZES = {"hidden_size": 64, "intermediate_size": 96}
POLICIES = ("retention", "snapkv", "h2o", "criticalkv", "defensive", "expected_attention")
KINDS = ("int8", "int8 activations", "int4", "bitsandbytes 8", "bitsandbytes 4")


def quantize(model: Any, kind: str) -> Any:
    """The model with quantised linear layers, except the output embedding."""
    if kind.startswith("bitsandbytes"):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        for decoder_layer in model.model.layers:
            for parent in (decoder_layer.self_attn, decoder_layer.mlp):
                for name, linear in list(parent.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(parent, name, _bitsandbytes_linear(bitsandbytes.nn, linear, kind))
        return model
    torchao = pytest.importorskip("torchao.quantization")
    config = {
        "int8": lambda: torchao.Int8WeightOnlyConfig(),
        "int8 activations": lambda: torchao.Int8DynamicActivationInt8WeightConfig(),
        "int4": lambda: torchao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, "int4"),  # noqa: B009 - missing in its types
            granularity=torchao.granularity.PerGroup(32),
        ),
    }[kind]()
    torchao.quantize_(model.model.layers, config)
    return model


def _bitsandbytes_linear(library: Any, linear: nn.Linear, kind: str) -> nn.Module:
    sizes = linear.in_features, linear.out_features
    if kind == "bitsandbytes 8":
        new = library.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
    else:
        new = library.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


@pytest.fixture(params=KINDS)
def quantized(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    return quantize(tiny_model("llama", **SIZES), request.param)


@pytest.mark.parametrize("policy", POLICIES)
def test_budgets(quantized: Any, prompt: Any, policy: str) -> None:
    """At a budget of 1.0 the tokens are the model's own; under one, every policy runs and storage is consistent."""
    ids, gates = prompt(1, 60), RetentionGates.for_model(quantized, gate_width=8)
    want = quantized.generate(ids, **GREEDY)
    with evict(quantized, policy, 1.0, gates=gates):
        assert torch.equal(quantized.generate(ids, **GREEDY), want)
    with evict(quantized, policy, 0.3, recent=4, buffer=2, gates=gates, prefill_chunk=16) as session:
        quantized.generate(ids, **GREEDY)
        session.last_cache.check()
        assert session.report().kept_share < 0.5


@torch.no_grad()
def test_the_output_projection(quantized: Any, tiny_model: Any) -> None:
    """W_O is the one that the layer applies: its responses, and the original weight up to the quantisation."""
    plain = full_attention_layers(tiny_model("llama", **SIZES))
    for layer, original in zip(full_attention_layers(quantized), plain, strict=True):
        weight = output_weight(layer, torch.float32)
        heads = torch.randn(5, layer.num_heads, layer.head_dim)
        projection: Any = layer.module.o_proj
        want = projection(heads.flatten(1))
        got = torch.einsum("thv,hvo->to", heads, weight)
        assert (got - want).norm() < 0.02 * want.norm()  # activations may be quantised, too
        exact = output_weight(original, torch.float32)
        assert 0 < (weight - exact).norm() < 0.3 * exact.norm()  # of four bits


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8 activations"])
def test_gates_train(tiny_model: Any, prompt: Any, kind: str) -> None:
    """The frozen weights are quantised, the gates above them get finite gradients.

    torchao's products of quantised activations have no backward, with gates or without.
    """
    quantized: Any = quantize(tiny_model("llama", **SIZES), kind).requires_grad_(False)
    gates = RetentionGates.for_model(quantized, gate_width=8)
    with attach(quantized, gates):
        quantized(prompt(1, 30)).logits.float().square().mean().backward()
    assert all(each.grad is not None and bool(each.grad.isfinite().all()) for each in gates.parameters())
