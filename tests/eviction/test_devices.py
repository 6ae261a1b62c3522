"""A model on several devices, as `device_map` places it: each layer's cache on its device, one selection over all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tenure.eviction import evict
from tenure.eviction.cache import RaggedCache
from tenure.retention import RetentionGates, attach
from tenure.serving.packable import check_packable
from tests.conftest import build_tiny

from .fake_devices import FakeDevices, MixedDevices, OnDevice, move_module, on_cpu

accelerate_hooks = pytest.importorskip("accelerate.hooks")
GREEDY = {"do_sample": False, "max_new_tokens": 8}
PLACES = {"embed_tokens": 0, "rotary_emb": 0, "layers.0": 0, "layers.1": 1, "layers.2": 2, "norm": 2}
POLICIES = ("retention", "h2o", "criticalkv", "retention_defensive", "expected_attention", "lagkv")


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TENURE_KERNELS", "reference")
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to: parameters are OnDevice as well
    with FakeDevices():
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def spread(model: Any) -> Any:
    """The model with its layers on three devices and accelerate's hooks between them, as `device_map` leaves it."""
    named: dict[str, int] = {f"model.{name}": index for name, index in PLACES.items()} | {"lm_head": 2}
    for name, index in named.items():
        module, device = model.get_submodule(name), torch.device("cuda", index)
        move_module(module, device)
        hook = accelerate_hooks.AlignDevicesHook(execution_device=device, skip_keys="past_key_values")
        accelerate_hooks.add_hook_to_module(module, hook)
    return model


def build() -> Any:
    return build_tiny("llama", tie_word_embeddings=False)


def kept(cache: RaggedCache) -> list[list[int]]:
    return [head.tolist() for layer in cache.ragged for row in cache.kept(layer.layer_idx) for head in row]


def gates_on(home: str) -> RetentionGates:
    torch.manual_seed(1)
    gates = RetentionGates.for_model(build(), gate_width=8, init_std=0.5, initial_bias=2.0)
    return gates if home == "cpu" else move_module(gates, home)  # type: ignore[return-value]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("devices")
def test_kept_sets_and_tokens(prompt: Any, policy: str) -> None:
    """Equal to those on one device, with padding, chunks and evictions while decoding; entries are where layers are."""
    ids, mask = prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    chunk = None if policy == "expected_attention" else 24
    found = []
    for model, home in ((build(), "cpu"), (spread(build()), "cuda:0")):
        options: dict[str, Any] = {"recent": 4, "buffer": 2, "prefill_chunk": chunk, "gates": gates_on(home)}
        with evict(model, policy, 0.3, **options) as session:
            tokens = model.generate(ids.to(home), attention_mask=mask.to(home), **GREEDY)
            cache = session.last_cache
            cache.check()
            found.append((on_cpu(tokens).tolist(), kept(cache)))
            if home != "cpu":
                places = [layer.store.key.device.index for layer in cache.ragged if layer.store is not None]
                assert places == [0, 1, 2]
    assert found[0] == found[1]


@pytest.mark.usefixtures("devices")
def test_forks_files_beams_and_stacks(prompt: Any, tmp_path: Path) -> None:
    ids, more, found = prompt(1, 40), prompt(1, 5), []
    for model, home in ((build(), "cpu"), (spread(build()), "cuda:0")):
        with evict(model, "snapkv", 0.4, recent=4, buffer=8) as session:
            cache = session.new_cache()
            session.extend(cache, ids.to(home))
            fork = cache.fork()
            logits = session.extend(fork, more.to(home))
            fork.crop(-5)
            again = session.extend(fork, more.to(home))
            cache.save(tmp_path / f"{home[:4]}.safetensors")
            loaded = session.load_cache(tmp_path / f"{home[:4]}.safetensors")
            from_file = session.extend(loaded, more.to(home))
            both = session.extend(session.stack([cache, loaded]), more.to(home).expand(2, -1)[:, :1])
            beams = model.generate(ids.to(home), num_beams=3, **GREEDY)
            results = [logits, again, from_file, both, beams]
            found.append([on_cpu(each).double() for each in results])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("devices")
def test_what_several_devices_exclude(prompt: Any) -> None:
    model, elsewhere, here = spread(build()), gates_on("cpu"), gates_on("cuda:0")
    message = "the gates are on cpu, the model is on cuda:0 and cuda:1 and cuda:2: move"
    with pytest.raises(ValueError, match=message), evict(model, "retention", gates=elsewhere):
        pass
    message = "got LlamaForCausalLM on cuda:0, cuda:1, cuda:2; accepted by attach"
    with pytest.raises(ValueError, match=message), attach(model, here):
        pass
    with pytest.raises(ValueError, match="got a LlamaForCausalLM on cuda:0, cuda:1, cuda:2; accepted: models on one"):
        check_packable(model)
    with pytest.raises(MixedDevices):  # what these devices stand for
        _ = OnDevice(torch.ones(2), torch.device("cuda:0")) + OnDevice(torch.ones(2), torch.device("cuda:1"))


@pytest.mark.parametrize("policy", ["retention", "criticalkv"])
def test_a_device_map_with_layers_on_disk(prompt: Any, tmp_path: Path, policy: str) -> None:
    """transformers' own loading: layers that do not fit are read from disk as they run."""
    build().save_pretrained(tmp_path / "model")
    places: dict[str, Any] = {f"model.layers.{index}": "disk" if index else "cpu" for index in range(3)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    model: Any = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert model.model.layers[1].self_attn.o_proj.weight.is_meta
    ids, found = prompt(1, 60), []
    for each in (build(), model):
        with evict(each, policy, 0.3, recent=4, buffer=2, gates=gates_on("cpu")) as session:
            tokens = each.generate(ids, **GREEDY)
            cache = session.last_cache
            cache.save(tmp_path / "cache.safetensors")
            session.load_cache(tmp_path / "cache.safetensors").check()
            found.append((tokens.tolist(), kept(cache)))
    assert found[0] == found[1]
