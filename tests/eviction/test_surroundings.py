"""Programs around a block: modes, wrappers, devices, interrupts. Right, or refused by name."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from tenure.eviction import evict
from tenure.eviction.model_adapters import has_output_weight, output_weight
from tenure.retention import RetentionGates, UnsupportedModelError
from tenure.retention.decoder_layers import full_attention_layers
from tenure.retention.seams import is_intercepted

GREEDY = {"do_sample": False, "max_new_tokens": 6}


@contextmanager
def defaults(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    """torch's default dtype and device within the block."""
    before = torch.get_default_dtype()
    if dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        with torch.device(device or "cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def test_the_same_dynamic_cache_in_two_calls(tiny_llama, prompt) -> None:
    ids = prompt(1, 30)
    want = tiny_llama(ids).logits[:, 20:]
    with evict(tiny_llama, "knorm", 1.0):
        cache = DynamicCache(config=tiny_llama.config)
        out = tiny_llama(ids[:, :20], past_key_values=cache)
        with pytest.raises(ValueError, match="got the same DynamicCache as in an earlier call, whose 20 tokens"):
            tiny_llama(ids[:, 20:], past_key_values=cache)
        got = tiny_llama(ids[:, 20:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_another_attention_implementation_inside_a_block(tiny_llama, prompt) -> None:
    with evict(tiny_llama, "knorm"):
        tiny_llama.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="got the attention implementation 'sdpa', set inside"):
            tiny_llama(prompt(1, 9))


class Interrupt:
    """Raises KeyboardInterrupt at the `at`-th call."""

    def __init__(self, at: int = 1) -> None:
        self.left = at

    def __call__(self, *_) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def interrupted(model, at: int = 1, **arguments) -> None:
    handle = model.model.layers[1].mlp.register_forward_hook(Interrupt(at))
    with pytest.raises(KeyboardInterrupt):
        model(**arguments)
    handle.remove()


@torch.no_grad()
def test_an_interrupted_forward_is_undone_by_the_next(tiny_llama, prompt) -> None:
    """torch runs no hooks for a KeyboardInterrupt."""
    ids = prompt(1, 40)
    with evict(tiny_llama, "knorm", 1.0) as session:
        cache = session.new_cache()
        tiny_llama(ids[:, :20], past_key_values=cache)
        want = tiny_llama(ids[:, 20:24], past_key_values=cache.fork()).logits
        interrupted(tiny_llama, input_ids=ids[:, 20:24], past_key_values=cache)
        assert torch.equal(tiny_llama(ids[:, 20:24], past_key_values=cache).logits, want)
        cache.check()
    with evict(tiny_llama, "knorm", 1.0, prefill_chunk=8):
        interrupted(tiny_llama, 4, input_ids=ids[:, :30])  # in the last chunk
        assert tiny_llama(ids[:, :30]).logits.shape[1] == 30
    with evict(tiny_llama, "knorm", 1.0, prefill_chunk=8) as session:
        cache = session.new_cache()
        tiny_llama(ids[:, :10], past_key_values=cache)
        interrupted(tiny_llama, 2, input_ids=ids[:, 10:], past_key_values=cache)  # in a chunk before the last
        assert cache.columns_seen == 10
        cache.check()
        torch.testing.assert_close(
            tiny_llama(ids[:, 10:], past_key_values=cache).logits, tiny_llama(ids, use_cache=False).logits[:, 10:],
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_another_thread_is_refused_while_a_forward_runs(tiny_llama, prompt) -> None:
    inside, leave, errors = threading.Event(), threading.Event(), []

    def stop(*_) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            leave.wait(30)

    def first() -> None:
        try:
            tiny_llama(prompt(1, 9))
        except BaseException as error:  # reported below
            errors.append(error)

    with torch.no_grad(), evict(tiny_llama, "knorm", 1.0):
        handle = tiny_llama.model.layers[0].mlp.register_forward_hook(stop)
        thread = threading.Thread(target=first)
        thread.start()
        assert inside.wait(30)
        try:
            with pytest.raises(ValueError, match="running in another thread; accepted: one thread at a time"):
                tiny_llama(prompt(1, 9))
        finally:
            leave.set()
            thread.join()
            handle.remove()
        assert not errors
        tiny_llama(prompt(1, 9))


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("policy", ["knorm", "snapkv", "h2o"])
def test_context_in_inference_mode_and_question_outside(tiny_llama, prompt, policy: str, tokens: int) -> None:
    ids = prompt(1, 300 + tokens)
    with evict(tiny_llama, policy, 0.5) as session:
        cache = session.new_cache()
        with torch.inference_mode():
            tiny_llama(ids[:, :300], past_key_values=cache)
        tokens_out = tiny_llama.generate(ids, past_key_values=cache, **GREEDY)
        with torch.no_grad():
            again = session.new_cache()
            tiny_llama(ids[:, :300], past_key_values=again)
        assert torch.equal(tokens_out, tiny_llama.generate(ids, past_key_values=again, **GREEDY))


@pytest.mark.parametrize("policy", ["knorm", "h2o", "tova", "snapkv", "defensive", "expected_attention"])
@pytest.mark.parametrize("chunk", [None, 8])
def test_autocast(tiny_llama, prompt, policy: str, chunk: int | None, tmp_path: Path) -> None:
    """Also what accelerate's mixed_precision puts around a model: entries have autocast's dtype, scores are fp32."""
    ids = prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.no_grad(), autocast, evict(tiny_llama, policy, 0.5, recent=4, buffer=8, prefill_chunk=chunk) as session:
        tiny_llama.generate(ids, attention_mask=mask, **GREEDY)
        cache = session.last_cache
        assert cache.stores[0].key.dtype == cache.stores[0].value.dtype == torch.bfloat16
        cache.save(tmp_path / "cache.safetensors")
        loaded = session.load_cache(tmp_path / "cache.safetensors")
        with torch.autocast("cpu", enabled=False):  # the question without autocast
            assert tiny_llama(ids[:, :3], past_key_values=loaded).logits.dtype == torch.float32
    plain = tiny_llama.generate(ids, attention_mask=mask, **GREEDY)
    with evict(tiny_llama, policy, 1.0):
        assert torch.equal(tiny_llama.generate(ids, attention_mask=mask, **GREEDY), plain)


@pytest.mark.parametrize("policy", ["h2o", "defensive", "layer_defensive", "expected_attention", "lagkv", "retention"])
def test_default_dtype(tiny_llama, prompt, policy: str, tmp_path: Path) -> None:
    model, ids = tiny_llama.to(torch.bfloat16), prompt(1, 40)
    RetentionGates.for_model(model, gate_width=8).save_pretrained(tmp_path)
    gates = tmp_path if policy == "retention" else None
    with evict(model, policy, 0.5, recent=4, gates=gates):
        want = model.generate(ids, **GREEDY)
    with defaults(torch.bfloat16), evict(model, policy, 0.5, recent=4, gates=gates):
        assert torch.equal(model.generate(ids, **GREEDY), want)


@torch.no_grad()
def test_default_device(tiny_llama, prompt, tmp_path: Path) -> None:
    ids = prompt(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with evict(tiny_llama, "knorm", 0.5, recent=4) as session:
        cache, other = session.new_cache(), session.new_cache()
        tiny_llama(ids, attention_mask=mask, past_key_values=cache)
        tiny_llama(prompt(2, 25), past_key_values=other)
        with defaults(device="meta"):
            stacked = session.stack([cache, other])
            cache.save(tmp_path / "cache.safetensors")
        assert stacked.rows.tokens == [20, 11, 25, 25]


@pytest.mark.parametrize("chunk", [None, 8])
def test_gradients_through_stored_entries_are_refused(tiny_llama, prompt, chunk: int | None) -> None:
    ids = prompt(1, 40)
    tiny_llama(ids, labels=ids).loss.backward()
    want = tiny_llama.lm_head.weight.grad.clone()
    tiny_llama.zero_grad()
    with evict(tiny_llama, "knorm", 1.0, prefill_chunk=chunk):
        loss = tiny_llama(ids, labels=ids).loss
        if chunk is None:
            loss.backward()
            torch.testing.assert_close(tiny_llama.lm_head.weight.grad, want)
        else:
            with pytest.raises(RuntimeError, match="backward through attention over an evicted cache is not support"):
                loss.backward()
    with evict(tiny_llama, "knorm", 1.0) as session:
        cache = session.new_cache()
        with torch.no_grad():
            tiny_llama(ids[:, :30], past_key_values=cache)
        out = tiny_llama(ids[:, 30:], past_key_values=cache).logits
        with pytest.raises(RuntimeError, match="its entries have no gradients"):
            out.sum().backward()


def test_compiled_models_run_uncompiled_inside(tiny_llama, prompt) -> None:
    ids, compiled = prompt(1, 20), 0

    def backend(module, inputs):
        nonlocal compiled
        compiled += 1
        return module.forward

    want = tiny_llama.generate(ids, **GREEDY)
    tiny_llama.forward = torch.compile(tiny_llama.forward, backend=backend)
    with evict(tiny_llama, "knorm", 1.0):
        assert torch.equal(tiny_llama.generate(ids, **GREEDY), want)
    assert compiled == 0
    assert torch.equal(tiny_llama.generate(ids, **GREEDY), want)
    assert compiled > 0


def test_a_wrapper_may_draft(tiny_llama, prompt) -> None:
    ids = torch.cat([prompt(1, 10)] * 6, 1)
    options = {"do_sample": False, "max_new_tokens": 20, "prompt_lookup_num_tokens": 4}
    want = tiny_llama.generate(ids, **options)
    compiled: Any = torch.compile(tiny_llama, backend="eager")
    with evict(compiled, "h2o", 1.0, recent=4, buffer=6):
        assert torch.equal(tiny_llama.generate(ids, **options), want)


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offloaded_weights(tiny_model, prompt, tmp_path: Path, to: str) -> None:
    """Weights at rest are on `meta`; policies that read W_O get it through the layer's own hooks."""
    accelerate = pytest.importorskip("accelerate")
    ids, kept = prompt(1, 120), {}
    gates = RetentionGates.for_model(tiny_model("llama"), gate_width=8, init_std=0.5, initial_bias=2.0)
    policies = ("snapkv", "retention", "criticalkv", "ada_criticalkv", "defensive", "layer_defensive")
    for offloaded in (False, True):
        model = tiny_model("llama")
        if offloaded:
            if to == "cpu":
                accelerate.cpu_offload(model, execution_device="cpu")
            else:
                accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
            assert model.model.layers[0].self_attn.o_proj.weight.is_meta
            assert RetentionGates.for_model(model, gate_width=8).bias.device.type == "cpu"
        for policy in policies:
            with evict(model, policy, 0.3, recent=4, gates=gates if policy == "retention" else None) as session:
                cache = session.new_cache()
                session.extend(cache, ids)
                kept[policy, offloaded] = [head.tolist() for layer in range(3) for head in cache.kept(layer)[0]]
    for policy in policies:
        assert kept[policy, False] == kept[policy, True], policy


class Quantized(torch.Tensor):
    """A weight of another kind that says that it is floating point, as torchao's do."""


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_output_projections_that_cannot_be_read(tiny_llama, bias: bool) -> None:
    """Then W_O is what the projection makes of unit vectors."""
    layer = full_attention_layers(tiny_llama)[0]
    projection: Any = layer.module.o_proj
    if bias:
        projection.bias = nn.Parameter(torch.randn(32))
    want = output_weight(layer, torch.float32).clone()
    assert want.shape == (4, 8, 32)
    weight = projection.weight.detach().as_subclass(Quantized)
    projection.weight = nn.Parameter(weight, requires_grad=False)
    assert has_output_weight(layer)
    torch.testing.assert_close(output_weight(layer, torch.float32).as_subclass(torch.Tensor), want)


class Gate(nn.Module):
    """An output projection that is no linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()


def test_output_projections_of_another_kind_are_refused(tiny_llama) -> None:
    tiny_llama.model.layers[1].self_attn.o_proj = Gate()
    message = r"output projection as a linear layer .*layers.1.self_attn does"
    with pytest.raises(UnsupportedModelError, match=message), evict(tiny_llama, "criticalkv"):
        pass


def test_gradient_checkpointing_in_train_mode(tiny_llama, prompt) -> None:
    tiny_llama.train().gradient_checkpointing_enable()
    with evict(tiny_llama, "knorm"):
        with pytest.raises(ValueError, match="in training mode with gradient checkpointing"):
            tiny_llama.generate(prompt(1, 20), **GREEDY)
        tiny_llama.eval()
        tiny_llama.generate(prompt(1, 20), **GREEDY)


def test_hidden_states_by_the_configuration_do_not_run_in_chunks(tiny_llama, prompt) -> None:
    tiny_llama.config.output_hidden_states = True
    with evict(tiny_llama, "knorm", prefill_chunk=8), pytest.raises(ValueError, match="which output_hidden_states"):
        tiny_llama(prompt(1, 20))


def test_gates_in_another_dtype(tiny_llama) -> None:
    gates = RetentionGates.for_model(tiny_llama, gate_width=8).to(torch.bfloat16)
    with (
        pytest.raises(ValueError, match=r"got gates in torch.bfloat16; accepted: torch.float32"),
        evict(tiny_llama, gates=gates),
    ):
        pass


@torch.no_grad()
def test_a_prompt_that_its_cache_holds_already(tiny_llama, prompt) -> None:
    """transformers would read all of it again, after itself."""
    ids = prompt(1, 40)
    want = tiny_llama.generate(ids, **GREEDY)
    with evict(tiny_llama, "knorm", 1.0) as session:
        cache = session.new_cache()
        tiny_llama(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="got a prompt whose 40 tokens are all in its cache"):
            tiny_llama.generate(ids, past_key_values=cache, **GREEDY)
        cache.crop(-1)
        assert torch.equal(tiny_llama.generate(ids, past_key_values=cache, **GREEDY), want)


def test_a_block_that_cannot_be_entered_leaves_no_trace(tiny_llama, monkeypatch) -> None:
    def fail(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(torch.compiler, "set_stance", fail)
    tiny_llama.forward = torch.compile(tiny_llama.forward, backend="eager")
    with pytest.raises(RuntimeError, match="no"), evict(tiny_llama, "knorm"):
        pass
    assert not tiny_llama.model._forward_pre_hooks and not is_intercepted(tiny_llama)


@pytest.mark.parametrize("merged", [False, True])
def test_lora_adapters(tiny_llama, prompt, merged: bool) -> None:
    peft = pytest.importorskip("peft")
    ids = prompt(1, 60)
    base = tiny_llama.generate(ids, **GREEDY)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama, config).eval()
    if merged:
        model = model.merge_and_unload()
    want = model.generate(input_ids=ids, **GREEDY)
    assert not torch.equal(want, base)
    with evict(model, "knorm", 1.0):
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), want)
    with evict(model, "knorm", 0.3, recent=4, buffer=2) as session:
        model.generate(input_ids=ids, **GREEDY)
        assert session.report().kept_share < 0.5
    if not merged:
        with model.disable_adapter(), evict(model, "knorm", 1.0):
            assert torch.equal(model.generate(input_ids=ids, **GREEDY), base)


def test_adapters_that_are_switched_inside_a_block(tiny_llama, prompt) -> None:
    """Each answers as alone, before and after the other, from a cache of its own and from a fork of a common one."""
    peft = pytest.importorskip("peft")
    ids = prompt(1, 60)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama, config).eval()
    model.add_adapter("other", config)
    alone = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        alone[adapter] = model.generate(input_ids=ids, **GREEDY)
    assert not torch.equal(alone["default"], alone["other"])
    with evict(model, "knorm", 1.0) as session:
        for adapter in ("default", "other", "default"):
            model.set_adapter(adapter)
            assert torch.equal(model.generate(input_ids=ids, **GREEDY), alone[adapter])
        context = session.new_cache()
        session.extend(context, ids)  # by the adapter "default"
        continued = {}
        for adapter in ("other", "default"):
            model.set_adapter(adapter)
            continued[adapter] = session.extend(context.fork(), ids[:, :5])
        assert not torch.equal(continued["other"], continued["default"])
        torch.testing.assert_close(session.extend(context, ids[:, :5]), continued["default"], rtol=0, atol=0)


@torch.no_grad()
def test_the_output_projection_with_adapters(tiny_llama, prompt) -> None:
    """W_O is the layer's weight and the active adapter's: that of the merged model."""
    peft = pytest.importorskip("peft")
    layer = full_attention_layers(tiny_llama)[0]
    base = output_weight(layer, torch.float32).clone()
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama, config).eval()
    model.add_adapter("other", config)
    found = {}
    for adapter in ("default", "other"):  # switched
        model.set_adapter(adapter)
        found[adapter] = output_weight(layer, torch.float32)
        merged = copy.deepcopy(model).merge_and_unload()
        want = output_weight(full_attention_layers(merged)[0], torch.float32)
        torch.testing.assert_close(found[adapter], want, rtol=1e-4, atol=1e-4)
        with evict(model, "criticalkv", 0.3, recent=4) as session:
            model(prompt(1, 60))
            assert session.report().kept_share < 0.4
    with model.disable_adapter():
        torch.testing.assert_close(output_weight(layer, torch.float32), base)
    assert (found["default"] - found["other"]).norm() > base.norm() and (found["default"] - base).norm() > base.norm()


@pytest.mark.parametrize("chunk", [None, 8])
def test_embeddings_instead_of_tokens(tiny_llama, prompt, chunk: int | None) -> None:
    embeds = tiny_llama.get_input_embeddings()(prompt(1, 40)).detach()
    want = tiny_llama.generate(inputs_embeds=embeds, **GREEDY)
    with evict(tiny_llama, "knorm", 1.0, prefill_chunk=chunk):
        assert torch.equal(tiny_llama.generate(inputs_embeds=embeds, **GREEDY), want)


@pytest.mark.parametrize("policy", ["knorm", "snapkv", "h2o", "defensive", "retention"])
def test_float16(tiny_llama, prompt, policy: str) -> None:
    model, ids = tiny_llama.half(), prompt(1, 60)
    gates = RetentionGates.for_model(model, gate_width=8)
    want = model.generate(ids, **GREEDY)
    with evict(model, policy, 1.0, gates=gates):
        assert torch.equal(model.generate(ids, **GREEDY), want)
    with evict(model, policy, 0.3, recent=4, buffer=2, gates=gates) as session:
        model.generate(ids, **GREEDY)
        session.last_cache.check()


def test_models_are_not_copied_inside_a_block(tiny_llama) -> None:
    """A copy would share the block's session, or carry a copy of all its caches."""
    with evict(tiny_llama, "knorm"), pytest.raises(ValueError, match="got a copy of a model inside an attach"):
        copy.deepcopy(tiny_llama)
    copy.deepcopy(tiny_llama)
