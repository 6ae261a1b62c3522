"""Prompts and gates shared by the eviction tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tenure.eviction import LayerView, Policy, SnapKV, evict
from tenure.eviction.cache_layer import RaggedLayer
from tenure.eviction.forward_state import SequenceState
from tenure.eviction.storage.segment_store import SegmentStore
from tenure.retention import RetentionGates
from tenure.retention.decoder_layers import AttentionLayer

from .saved import OPTIONS, filled


@pytest.fixture
def gates_for() -> Callable[[PreTrainedModel], RetentionGates]:
    """Random gates whose log β differ from token to token, head to head and layer to layer."""

    def make(model: PreTrainedModel) -> RetentionGates:
        torch.manual_seed(1)
        return RetentionGates.for_model(model, gate_width=8, init_std=0.5, initial_bias=2.0)

    return make


@pytest.fixture
def prompt() -> Callable[..., torch.Tensor]:
    """Token ids `(batch, length)` free of special tokens; the same for the same arguments."""

    def make(batch: int, length: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 128, (batch, length), generator=generator)

    return make


@pytest.fixture
def hand_view() -> Callable[..., LayerView]:
    """A view of a layer whose entries, queries and projection are written down by hand; `scaling` is 1."""

    def make(
        policy: Policy,
        keys: torch.Tensor,  # (batch, heads, n, dim)
        values: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,  # (batch, query heads, window, dim) of the last tokens
        weight: torch.Tensor | None = None,  # (query heads * dim, hidden), W_O
        lengths: list[int] | None = None,  # entries of each (row, head); the last ones are taken away
        budget: int = 0,
        log_beta: torch.Tensor | None = None,
        **states: torch.Tensor,
    ) -> LayerView:
        batch, heads, n, dim = keys.shape
        num_heads = heads if queries is None else queries.shape[1]
        module = nn.Module()
        if weight is not None:
            num_heads = weight.shape[0] // dim
            module.o_proj = nn.Linear(*weight.shape, bias=False)
            module.o_proj.weight.data = weight.t().contiguous()
        layer = RaggedLayer(AttentionLayer(0, "attention", module, num_heads, heads, dim), policy.window_size)
        stored = {policy.state_key(name): tensor for name, tensor in states.items()}
        if log_beta is not None:
            stored["log_beta"] = log_beta
        step = SequenceState().new_step(batch, n, None, keys.device, 0, 0)
        layer.store = SegmentStore.from_dense(keys, keys.clone() if values is None else values, stored, step)
        if lengths is not None:
            layer.store.compact(torch.arange(n) < torch.tensor(lengths).view(batch, heads, 1))
        recorded = None
        if queries is not None:
            layer.window = queries
            recorded = torch.arange(n - queries.shape[2], n).expand(batch, -1)
        return policy.view(layer, torch.full((batch,), n), recorded, torch.full((batch,), budget))

    return make


@pytest.fixture
def saved(tiny_llama, prompt, tmp_path) -> Path:
    """The file of a cache of `tiny_llama` under SnapKV."""
    file = tmp_path / "context.safetensors"
    with evict(tiny_llama, "snapkv", 0.4, **OPTIONS) as session:
        filled(session, tiny_llama, prompt)[0].save(file)
    return file


@pytest.fixture
def views(tiny_model, gates_for, prompt):
    """Views of ragged layers of a batch with padding, for any policy; calls `use(view)` for each layer."""

    @torch.no_grad()
    def make(policy: Policy, use, padded: bool = True) -> None:
        model, ids = tiny_model("qwen3"), prompt(2, 30)
        mask = torch.ones_like(ids)
        mask[1, : 11 if padded else 0] = 0
        with evict(model, "random", 0.6, "layer", gates_for(model), observe=[policy, SnapKV(window=12)]) as session:
            cache = session.new_cache()
            model(ids, attention_mask=mask, past_key_values=cache)
            grown = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
            model(prompt(2, 3, seed=1), attention_mask=grown, past_key_values=cache)
            budget = torch.full((2,), 9)
            for layer in cache.ragged:
                use(policy.view(layer, cache.tokens_seen, cache.query_positions, budget))

    return make
