"""Tiny random models of every supported family, and the real model for tests marked `real`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: their threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, and by the tests' own processes
# Triton kernels run in its interpreter, on the CPU. It is read when Triton is first imported, whichever test does it.
# On a machine with a GPU, TRITON_INTERPRET=0 runs the same tests compiled.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# How long inputs take to make says nothing on a machine whose cores others use.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # wide enough that attention is not uniform
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma3")


def build_tiny(family: str, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model in eval mode, the same weights at every call."""
    sizes = SIZES | overrides
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(head_dim=8, **sizes))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(sliding_window=None, head_dim=8, **sizes))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=16, **sizes))
    elif family == "qwen3_moe":
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
        settings: dict[str, Any] = sizes | moe | {"head_dim": 8}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
    elif family == "phi3":
        model = Phi3ForCausalLM(Phi3Config(**sizes))
    elif family == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"][: int(sizes["num_hidden_layers"])]
        config = Gemma3TextConfig(head_dim=8, sliding_window=16, layer_types=kinds, query_pre_attn_scalar=8, **sizes)
        model = Gemma3ForCausalLM(config)
    else:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    return model.eval()


# Files that take a minute or more begin first, so that no worker is left with one at the end (Makefile's `--dist
# loadfile --no-loadscope-reorder` hands files out in this order).
LONG_FILES = (
    "training/test_launch.py", "serving/server/test_examples.py", "training/test_trainer.py", "test_packaging.py",
    "serving/server/test_lifecycle.py", "eviction/test_long_generation.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG_FILES)}
    own = os.path.dirname(__file__)
    items.sort(key=lambda item: places.get(os.path.relpath(item.path, own), len(places)))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def any_tiny_model(family: str) -> PreTrainedModel:
    return build_tiny(family)


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    return build_tiny("llama")


@pytest.fixture
def tiny_model():
    """The factory itself, for tests that choose family and sizes."""
    return build_tiny


@pytest.fixture(scope="session")
def real_model_path() -> str:
    from tenure.training.assets import demo_model

    return str(demo_model())


@pytest.fixture(scope="session")
def essay_texts() -> list[str]:
    from tenure.training.assets import essays

    return [document.text for document in essays("eval")]


@pytest.fixture
def nan_outputs() -> Iterator[None]:
    """`torch.empty` and its relatives give NaN, and of integers the greatest."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        assert torch.zeros(1).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
