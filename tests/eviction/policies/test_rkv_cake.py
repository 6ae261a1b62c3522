"""R-KV and CAKE: kept entries against plain float64 code, and CAKE's budgets by hand and against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tenure.eviction import CAKE, RKV, evict
from tenure.eviction.plan import BudgetLayout, allocate, by_preference
from tenure.retention import RetentionGates

from ..oracles import Oracle, check_top

MODELS = (("llama", {"num_key_value_heads": 4}), ("llama", {"num_key_value_heads": 2}), ("qwen3", {}))


def kept_and_layers(model, ids, policy, budget):
    """The entries of each layer, bool `(num_kv_heads, tokens)`, and what the layers computed, in float64."""
    n = ids.shape[1]
    layers = Oracle(model, RetentionGates.for_model(model, gate_width=8)).read(ids[0].tolist())
    with evict(model, policy, budget, sinks=0, recent=0) as session:
        cache = session.new_cache()
        session.extend(cache, ids)
        kept = {
            index: torch.stack([torch.isin(torch.arange(n), head) for head in cache.kept(place)[0]])
            for place, index in enumerate(layers)
        }
    return kept, layers


def redundancy(keys):
    """By loops over a head's keys, as the paper and the released code have it."""
    n = len(keys)
    unit = [key / key.norm() for key in keys]
    total = [0.0] * n
    for i in range(n):
        row = [0.0 if i == j else float(unit[i] @ unit[j]) for j in range(n)]
        similar = [j for j in range(n) if row[j] > 0.5]
        row[max(similar, default=0)] = 0.0
        for j in range(n):
            total[j] += row[j] / n
    return torch.tensor(total, dtype=torch.float64).softmax(0)


@pytest.mark.parametrize(("family", "sizes"), MODELS)
@torch.no_grad()
def test_rkv_is_the_released_codes(tiny_model, prompt, family, sizes):
    model, ids, budget, window = tiny_model(family, **sizes), prompt(1, 61), 24, 8
    kept, layers = kept_and_layers(model, ids, RKV(mix=0.5), budget)
    for index, layer in layers.items():
        queries = layer.queries.view(layer.keys.shape[0], layer.group, 61, -1)[:, :, -window:]
        logits = torch.einsum("hgqd,hkd->hgqk", queries, layer.keys[:, :-window]) * layer.scaling
        mean = logits.max(1).values.softmax(-1).mean(1)
        pooled = F.max_pool1d(mean, 7, stride=1, padding=3)
        for head, keys in enumerate(layer.keys):
            score = 0.5 * pooled[head] - 0.5 * redundancy(keys)[:-window]
            score = torch.cat([score, torch.full((window,), 9.0)])
            check_top([score], [kept[index][head]], budget, f"layer {index}, head {head}")


@torch.no_grad()
def test_rkv_prefers_what_was_not_said_twice(hand_view):
    """Without attention the scores are the redundancy's; entry 1 resembles 0 and 2, entry 3 nothing."""
    keys = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, -0.1], [0.0, 1.0], [1.0, 1.0]]).view(1, 1, 5, 2)
    view = hand_view(RKV(window=1, mix=0.0), keys, queries=torch.zeros(1, 1, 1, 2))
    score = RKV(window=1, mix=0.0).score(view)[0, 0]
    assert score[:4].argmax() == 3 and score[4] == torch.inf
    torch.testing.assert_close(score[:4], -redundancy(keys[0, 0].double()).float()[:4])


@pytest.mark.parametrize(("family", "sizes"), MODELS)
@torch.no_grad()
def test_cake_is_the_released_codes(tiny_model, prompt, family, sizes):
    model, ids, budget, window, tokens = tiny_model(family, **sizes), prompt(1, 61), 24, 8, 61
    policy = CAKE(window=window, tau_entropy=1.6, tau_variance=0.4)
    kept, layers = kept_and_layers(model, ids, policy, budget)
    preferences, scores = [], {}
    for index, layer in layers.items():
        stored = torch.ones(layer.keys.shape[:2], dtype=torch.bool)
        attention = layer.attention(window, stored)[..., :-window]
        entropy = -(attention * (attention + 1e-10).log()).sum()
        preferences.append(float(entropy ** (1 / 1.6) * attention.var(2).sum() ** (1 / 0.4)))
        pooled = F.avg_pool1d(attention.mean(2) + 200 * attention.var(2), 5, stride=1, padding=2).mean(1)
        scores[index] = torch.cat([pooled, torch.full((len(pooled), window), 1e9)], 1)
    numbers = [int(one / sum(preferences) * (budget - window) * len(layers)) for one in preferences]
    left = (budget - window) * len(layers) - sum(numbers)
    assert 0 <= left < len(layers) and max(numbers) < tokens - window and len(set(numbers)) > 1, "a plain case"
    for place, index in enumerate(layers):
        count = window + numbers[place] + (place < left)
        for head, score in enumerate(scores[index]):
            check_top([score], [kept[index][head]], count, f"layer {index}, head {head}")


@torch.no_grad()
def test_cake_rows_have_budgets_of_their_own(tiny_llama, prompt):
    ids = prompt(2, 50)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    policy, alone = CAKE(window=6), []
    for row, pad in ((0, 0), (1, 13)):
        with evict(tiny_llama, policy, 0.4, sinks=0, recent=0) as session:
            cache = session.new_cache()
            session.extend(cache, ids[row : row + 1, pad:])
            alone.append([cache.kept(layer)[0] for layer in range(3)])
    with evict(tiny_llama, policy, 0.4, sinks=0, recent=0) as session:
        cache = session.new_cache()
        session.extend(cache, ids, mask)
        for layer in range(3):
            for row in range(2):
                for one, other in zip(cache.kept(layer)[row], alone[row][layer], strict=True):
                    assert torch.equal(one, other)
        session.extend(cache, ids[:, :1])
        cache.compress(budget=0.2)
        cache.check()


def test_budgets_by_preference():
    assert by_preference(10, [1.0, 3.0], 100, 4) == [4 + 3, 4 + 9]
    assert by_preference(10, [1.0, 1.0, 1.0], 100, 0) == [10] * 3
    assert by_preference(10, [0.0, 1.0, 1.9], 100, 4) == [4 + 1, 4 + 6, 4 + 11], "rounded down, the rest to the first"
    assert by_preference(10, [9.0, 1.0, 1.0], 14, 4) == [14, 8, 8], "what a layer cannot hold goes to the others"
    assert by_preference(3, [1.0, 2.0], 100, 4) == [3, 3], "no room for the window"
    assert by_preference(10, [0.0, 0.0], 100, 4) == [10, 10] == by_preference(10, [1.0, math.inf], 100, 4)
    for average, tokens in ((20, 50), (8, 300)):
        assert sum(by_preference(average, [5.0, 0.1, 2.0, 0.7], tokens, 7)) == 4 * average
    assert sum(by_preference(29, [5.0, 0.1, 2.0, 0.7], 31, 7)) < 4 * 29, "its excess is given away once"


def test_preferences_need_a_policy_that_has_them(tiny_llama):
    refused = pytest.raises(ValueError, match=r"needs a policy with layer preferences \(cake\), got 'knorm'")
    with refused, evict(tiny_llama, "knorm", 0.5, "preference"):
        pass
    with pytest.raises(ValueError, match=r"same number of key/value heads, got \(2, 3\): give another scope"):
        allocate("preference", 100, 50, BudgetLayout((2, 3), 8))
