"""States that policies keep of entries: padding, chunks, forks, rows, failures, refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from tenure.eviction import (
    H2O,
    CriticalKV,
    Defensive,
    ExpectedAttention,
    Policy,
    RaggedCache,
    SnapKV,
    evict,
)
from tenure.retention.decoder_layers import UnsupportedModelError
from tenure.scripts.bench.tiny_models import TEXT_ARCHITECTURES


@dataclass(frozen=True)
class Witness(Policy):
    """How many forwards have seen each entry, and the position of the last query that did, plus `extra`."""

    extra: int = 0

    name: ClassVar[str] = "witness"
    states: ClassVar[tuple[str, ...]] = ("forwards", "last")

    def observe(self, view, queries, query_positions):
        last = query_positions.amax(1).view(-1, 1, 1).expand(view.shape).float()
        return {"forwards": view.state("forwards") + 1, "last": last + self.extra}

    def score(self, view):
        return view.state("forwards")


def states(cache: RaggedCache, policy: Policy, layer: int = 0) -> dict[str, list]:
    """By name `[row][head]` the values of the entries."""
    view = policy.view(cache.ragged[layer], cache.tokens_seen)
    return {
        name: [
            [view.state(name)[row, head][view.valid[row, head]].tolist() for head in range(view.shape[1])]
            for row in range(view.shape[0])
        ]
        for name in policy.states
    }


@torch.no_grad()
def test_states_follow_their_entries(tiny_llama, prompt):
    """Through padding, an eviction that leaves heads with different entries, a fork, and a selection of rows."""
    ids, policy = prompt(2, 40), Witness()
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    with evict(tiny_llama, "knorm", 0.5, "layer", sinks=0, recent=3, buffer=2, observe=[policy]) as session:
        cache = session.new_cache()
        tiny_llama(ids, attention_mask=mask, past_key_values=cache)
        for more in range(4):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            tiny_llama(prompt(2, 1, seed=more), attention_mask=mask, past_key_values=cache)
        cache.check()
        for row, tokens in enumerate((44, 29)):
            for head, kept in enumerate(cache.kept(0)[row]):
                seen = [5 if place < tokens - 4 else tokens - place for place in kept.tolist()]
                assert states(cache, policy)["forwards"][row][head] == seen
                assert states(cache, policy)["last"][row][head] == [tokens - 1] * len(kept)
        before, fork = states(cache, policy), cache.fork()
        tiny_llama(prompt(2, 1), attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=fork)
        assert states(cache, policy) == before, "the fork's observations are its own"
        assert states(fork, policy)["last"][0][0][0] == 44
        cache.select_rows(torch.tensor([1, 1, 0]))
        assert states(cache, policy)["forwards"] == [before["forwards"][row] for row in (1, 1, 0)]


@torch.no_grad()
def test_policies_that_differ_in_an_option_do_not_share_states(tiny_llama, prompt):
    one, other = Witness(), Witness(extra=100)
    with evict(tiny_llama, one, 0.5, observe=[other, other]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 20), past_key_values=cache)
        assert states(cache, one)["last"][0][0] == [19] * 10
        assert states(cache, other)["last"][0][0] == [119] * 10
        assert session.report().kept_bytes == 10 * 6 * (8 * 4 * 2 + 4 + 4 * 4)


@torch.no_grad()
def test_without_states_nothing_is_stored_or_called(tiny_llama, prompt):
    with evict(tiny_llama, SnapKV(window=4), 0.5) as session:
        tiny_llama(prompt(1, 20))
        assert session.observers.policies == () and session.observers.rotary is None
        assert set(session.last_cache.stores[0].buffers) == {"key", "value", "position"}
        assert session.last_cache.ragged[0].statistics is None


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("filled", [False, True])
@torch.no_grad()
def test_a_forward_that_raises_leaves_no_observation(tiny_llama, prompt, at, filled):
    policies = [Witness(), ExpectedAttention()]

    def fail(*_):
        raise RuntimeError("on purpose")

    with evict(tiny_llama, "knorm", 0.5, recent=4, observe=policies) as session:
        cache = session.new_cache()
        if filled:
            tiny_llama(prompt(1, 40), past_key_values=cache)
        before = [states(cache, policies[0], layer) for layer in range(3)] if filled else None
        statistics = [layer.statistics for layer in cache.ragged]
        hook = tiny_llama.model.layers[at].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            tiny_llama(prompt(1, 9, seed=1), past_key_values=cache)
        hook.remove()
        cache.check()
        if filled:
            assert [states(cache, policies[0], layer) for layer in range(3)] == before
        assert all(one is layer.statistics for one, layer in zip(statistics, cache.ragged, strict=True))
        tiny_llama(prompt(1, 3, seed=1), past_key_values=cache)
        assert states(cache, policies[0])["forwards"][0][0][-1] == 1


def test_what_was_not_observed_cannot_be_compressed_with(tiny_llama, prompt):
    with evict(tiny_llama, "full", observe=[Defensive(window=4), SnapKV()]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 30), past_key_values=cache)
        with pytest.raises(ValueError, match=r"'h2o' needs attention of every entry as H2O\(.*\) observes it, which"):
            cache.compress("h2o", 0.5)
        with pytest.raises(ValueError, match=r"'defensive' needs worst, value of every entry as Defensive\(window=32"):
            cache.compress("defensive", 0.5)
        with pytest.raises(ValueError, match="'expected_attention' needs query_statistics"):
            cache.compress("expected_attention", 0.5)
        cache.compress(Defensive(window=4), 0.5)
        cache.compress(CriticalKV(window=4), 0.4)
        cache.check()


@pytest.mark.parametrize("policy", ["criticalkv", "defensive"])
def test_a_model_without_an_output_projection_is_refused_by_name(tiny_llama, policy):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    tiny_llama.model.layers[1].self_attn.o_proj = Doubled()
    message = f"policy '{policy}' does not support LlamaForCausalLM: it needs the output .*o_proj.*layers.1.self_attn"
    with pytest.raises(UnsupportedModelError, match=message), evict(tiny_llama, "knorm", observe=[policy]):
        pass
    with evict(tiny_llama, "snapkv") as session, pytest.raises(UnsupportedModelError, match=message):
        session.new_cache().compress(policy, 0.5)


@pytest.mark.parametrize("name", ["gpt2", "ministral3", "gemma4_text"])
def test_a_model_whose_rotation_is_not_known_is_refused_by_name(name):
    """Learned positions, queries that grow with their position, and a rotation by another function."""
    model = TEXT_ARCHITECTURES[name].build()
    kind = type(model).__name__
    message = f"policy 'expected_attention' does not support {kind}: it needs queries before RoPE, .*'{name}'"
    with pytest.raises(UnsupportedModelError, match=message), evict(model, "expected_attention"):
        pass


@torch.no_grad()
def test_h2o_costs_the_same_in_pieces(tiny_llama, prompt, monkeypatch):
    ids, policy = prompt(1, 30), H2O()

    def observed() -> dict[str, list]:
        with evict(tiny_llama, "full", observe=[policy]) as session:
            tiny_llama(ids)
            return states(session.last_cache, policy)

    whole = observed()
    monkeypatch.setattr("tenure.eviction.policies.h2o.HELD_ON_CPU", 1000)
    torch.testing.assert_close(observed()["attention"], whole["attention"], atol=1e-6, rtol=1e-6)
