"""Hidden states are what the attention was given, row by row and token by token, until something is evicted."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from tenure.eviction import LayerView, Policy, RaggedCache, evict
from tenure.eviction.integrations.kvpress import from_press
from tenure.retention import UnsupportedModelError


@dataclass(frozen=True)
class Loudest(Policy):
    """Keeps tokens whose hidden states are large; falls back to the newest once they are gone."""

    name: ClassVar[str] = "loudest"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    def score(self, view: LayerView) -> torch.Tensor:
        score = view.positions.float() - view.time.view(-1, 1, 1) - 1
        assert view.inputs is not None
        for row, before in enumerate(view.inputs.evicted_by):
            if before is None:
                size = view.inputs.row(row)[0][0].norm(dim=-1)
                score[row, :, : len(size)] = size
        return score


def inputs_of(cache: RaggedCache, row: int) -> list[tuple[torch.Tensor, list[int]]]:
    """Hidden states `(n, hidden_size)` and positions of a row, layer by layer."""
    found = []
    for layer in cache.ragged:
        assert layer.inputs is not None
        hidden, positions = layer.inputs.row(row)
        found.append((hidden[0], positions[0].tolist()))
    return found


@pytest.fixture
def given(any_tiny_model):
    """Each full-attention layer's input as a hook sees it, forward by forward."""
    seen: dict[int, list[torch.Tensor]] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.setdefault(module.layer_idx, []).append(kwargs["hidden_states"])

    for layer in any_tiny_model.model.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@torch.no_grad()
def test_inputs_are_those_of_the_model(any_tiny_model, given, prompt):
    """Two forwards, the second row padded on the left: only real tokens count, at the positions RoPE gave them."""
    ids = prompt(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with evict(any_tiny_model, Loudest(), 1.0) as session:
        cache = session.new_cache()
        any_tiny_model(ids[:, :15], attention_mask=mask[:, :15], position_ids=positions[:, :15], past_key_values=cache)
        any_tiny_model(ids[:, 15:], attention_mask=mask, position_ids=positions[:, 15:], past_key_values=cache)
    for row in range(2):
        start = 6 * row
        for layer, (hidden, places) in zip(cache.ragged, inputs_of(cache, row), strict=True):
            assert places == list(range(20 - start))
            assert torch.equal(hidden, torch.cat(given[layer.layer_idx], dim=1)[row, start:])


@torch.no_grad()
def test_inputs_follow_the_cache(tiny_llama, prompt):
    """Forks, rows, taking back, and a forward that raises."""
    ids = prompt(2, 24)
    with evict(tiny_llama, Loudest(), 1.0) as session:
        whole = session.new_cache()
        tiny_llama(ids, past_key_values=whole)
        cache = session.new_cache()
        tiny_llama(ids[:, :10], past_key_values=cache)
        fork = cache.fork()
        tiny_llama(prompt(2, 9, seed=5), past_key_values=fork)
        fork.crop(-9)
        handle = tiny_llama.model.layers[1].self_attn.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny_llama(ids[:, 10:], past_key_values=fork)
        handle.remove()
        fork.select_rows(torch.tensor([1, 1, 0]))
        tiny_llama(ids[[1, 1, 0], 10:], past_key_values=fork)
        for row, former in enumerate([1, 1, 0]):
            for ours, theirs in zip(inputs_of(fork, row), inputs_of(whole, former), strict=True):
                torch.testing.assert_close(ours[0], theirs[0])
                assert ours[1] == theirs[1]
        assert len(inputs_of(cache, 0)[0][1]) == 10, "the fork took nothing from it"
        cache.reset()
        tiny_llama(ids, past_key_values=cache)
        assert len(inputs_of(cache, 0)[0][1]) == 24


@torch.no_grad()
def test_each_row_has_its_inputs_until_its_first_eviction(tiny_llama, prompt):
    ids, mask = prompt(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :15] = 0
    with evict(tiny_llama, Loudest(), 20, sinks=0, recent=0, buffer=0) as session:
        cache = session.new_cache()
        tiny_llama(ids, attention_mask=mask, past_key_values=cache)
        inputs = cache.ragged[0].inputs
        assert inputs is not None and inputs.evicted_by == (Loudest(), None) and inputs.forwards
        for _ in range(6):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            tiny_llama(ids[:, :1], attention_mask=mask, past_key_values=cache)
        inputs = cache.ragged[0].inputs
        assert inputs is not None and inputs.evicted_by == (Loudest(), Loudest()) and not inputs.forwards
        cache.check()


def test_what_cannot_be_recorded_is_told(tiny_llama, prompt, monkeypatch):
    ids = prompt(1, 12)
    with (
        pytest.raises(ValueError, match="policy 'loudest' scores a prompt as a whole: leave prefill_chunk unset"),
        evict(tiny_llama, "full", observe=[Loudest()], prefill_chunk=4),
    ):
        pass
    with evict(tiny_llama, "full") as session, torch.no_grad():
        tiny_llama(ids)
        assert session.last_cache.ragged[0].inputs is None, "nobody asked"
        with pytest.raises(ValueError, match="'loudest' needs hidden_states, which this session does not record"):
            session.last_cache.compress(Loudest(), 0.5)
    with evict(tiny_llama, Loudest(), 0.5), pytest.raises(ValueError, match=r"position_ids \(batch, 12\), got \(3, 1"):
        tiny_llama(ids, position_ids=torch.arange(12).expand(3, 1, 12))
    monkeypatch.setattr("tenure.eviction.model_adapters.ROTARY_TYPES", ("gemma3_text",))
    message = "policy 'loudest' does not support LlamaForCausalLM: it needs queries before RoPE"
    with pytest.raises(UnsupportedModelError, match=message), evict(tiny_llama, Loudest()):
        pass


def test_without_kvpress_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ImportError, match=r"presses need kvpress: pip install 'tenure\[kvpress\]'"):
        from_press(object())
