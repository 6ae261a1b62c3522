"""Value norms and what a window attends to are computed once for forks of one cache."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction import evict, layer_view


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Entries a head, each time norms are computed."""
    counts: list[int] = []
    real = layer_view.value_norms
    counting = lambda values, weight: counts.append(values.shape[2]) or real(values, weight)  # noqa: E731
    monkeypatch.setattr(layer_view, "value_norms", counting)
    return counts


def kept_by(cache) -> list[list[list[int]]]:
    """Positions by layer, and by row and head."""
    stores = cache.stores
    return [[part.tolist() for part in store.position[store.dense_index()[0]].flatten(0, 1)] for store in stores]


@torch.no_grad()
def test_forks_compute_value_norms_once_and_keep_what_a_cache_alone_keeps(tiny_llama, prompt, computed):
    policies = ("criticalkv(window=4)", "defensive(window=4)", "ada_criticalkv(window=4)")
    layers = tiny_llama.config.num_hidden_layers
    with evict(tiny_llama, "full", observe=policies) as session:
        cache = session.new_cache()
        tiny_llama(prompt(2, 40), past_key_values=cache)
        kept = []
        for policy in policies:
            for budget in (0.5, 0.25):
                fork = cache.fork()
                fork.compress(policy, budget, sinks=1, recent=4)
                kept.append(kept_by(fork))
        assert computed == [40] * layers
        for number, (policy, budget) in enumerate((p, b) for p in policies for b in (0.5, 0.25)):
            alone = session.new_cache()
            tiny_llama(prompt(2, 40), past_key_values=alone)
            alone.compress(policy, budget, sinks=1, recent=4)
            assert kept_by(alone) == kept[number]
        assert len(computed) == layers * 7, "a cache without forks shares nothing"


@torch.no_grad()
def test_forks_look_through_a_window_once(tiny_llama, prompt, monkeypatch):
    looked: list[int | None] = []
    real = layer_view.window_risk_by_heads
    monkeypatch.setattr(layer_view, "window_risk_by_heads", lambda *what: looked.append(what[-1]) or real(*what))
    layers = tiny_llama.config.num_hidden_layers
    with evict(tiny_llama, "full", observe=["snapkv(window=4)", "defensive(window=4)"]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(2, 40), past_key_values=cache)
        for budget in (0.5, 0.25):
            for policy in ("snapkv(window=4)", "adakv(window=4)", "defensive(window=4)"):
                cache.fork().compress(policy, budget, sinks=1, recent=4)
        assert sorted(looked, key=str) == [5] * layers + [None] * layers, "once for each window and pooling"
        longer = cache.fork()
        tiny_llama(prompt(2, 3), past_key_values=longer)
        longer.compress("snapkv(window=4)", 0.5, sinks=1, recent=4)
        assert len(looked) == 3 * layers


@torch.no_grad()
def test_what_goes_on_is_computed_anew(tiny_llama, prompt, computed):
    layers = tiny_llama.config.num_hidden_layers
    with evict(tiny_llama, "full", observe=["criticalkv(window=4)"]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 30), past_key_values=cache)
        longer = cache.fork()
        for seed in (1, 2):  # two continuations of one length
            other = longer.fork()
            tiny_llama(prompt(1, 5, seed), past_key_values=other)
            other.compress("criticalkv(window=4)", 0.5, sinks=1, recent=4)
        cache.fork().compress("criticalkv(window=4)", 0.5, sinks=1, recent=4)
        assert computed == [35] * layers * 2 + [30] * layers
