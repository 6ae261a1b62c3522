"""Expected attention where RoPE is partial, absent or has several axes, against formulas written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tenure.eviction import ExpectedAttention, evict
from tenure.eviction.model_adapters import ROTARY_TYPES, QueryProbe, find_rotary
from tenure.retention.decoder_layers import full_attention_layers
from tenure.retention.seams import intercept
from tenure.scripts.bench.tiny_models import TEXT_ARCHITECTURES, Architecture
from tenure.scripts.bench.tiny_vision_models import VISION_MODELS

from .tiny_prompts import IDS

FUTURE = 7
SMOLLM3 = Architecture("smollm3", TEXT_ARCHITECTURES["smollm3"].settings | {"no_rope_layers": [0, 1, 1, 0]})
# The channels that a model rotates, in halves: pairs (i, i + half).
ROTATED = {"phi": 4, "smollm3": 0, "qwen2_vl": 8, "qwen3_5": 4}


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """A model, and a prompt that it has images in if it can."""
    if name in VISION_MODELS:
        model, inputs = VISION_MODELS[name]()
        return model, inputs
    model = (SMOLLM3 if name == "smollm3" else TEXT_ARCHITECTURES[name]).build()
    return model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def average_rotation(start: int, rotated: int, dim: int, theta: float = 10000.0) -> torch.Tensor:
    """fp64 `(dim, dim)`: the mean of RoPE's matrices (Su et al. 2021, section 3.4) of the next positions."""
    total = torch.zeros(dim, dim, dtype=torch.float64)
    for position in range(start, start + FUTURE):
        matrix, half = torch.eye(dim, dtype=torch.float64), rotated // 2
        for i in range(half):
            angle = position * theta ** (-2 * i / rotated)
            matrix[i, i] = matrix[i + half, i + half] = math.cos(angle)
            matrix[i, i + half], matrix[i + half, i] = -math.sin(angle), math.sin(angle)
        total += matrix / FUTURE
    return total


@pytest.mark.parametrize("name", ROTATED)
@torch.no_grad()
def test_scores_equal_the_formula(name: str) -> None:
    """Of the first full-attention layer, before which no layer knows positions: its queries are those at position 0."""
    model, inputs = built(name)
    mask, policy = inputs["attention_mask"].bool(), ExpectedAttention(future=FUTURE, epsilon=0.01)
    layers, before = full_attention_layers(model), QueryProbe()
    first = layers[0].layer_idx
    axes = (3,) if name in VISION_MODELS else ()
    with intercept(model, before, layers):
        model(**inputs, position_ids=torch.zeros(*axes, *mask.shape, dtype=torch.long))
    with evict(model, "full", observe=[policy]) as session:
        cache = session.new_cache()
        model(**inputs, past_key_values=cache)
        deltas = cache.rows.rope_deltas if axes else torch.zeros(len(mask), 1, dtype=torch.long)
        view = policy.view(cache.ragged[0], cache.tokens_seen)
        score = policy.score(view)
    assert deltas is not None and bool((deltas < 0).any()) == bool(axes), "an image takes fewer positions than tokens"
    group, dim = view.num_kv_groups, view.keys.shape[-1]
    for row in range(len(mask)):
        real = int(mask[row].sum())
        following = real + int(deltas[row])
        assert view.expected_queries.next_position[row] == following
        rotation = average_rotation(following, ROTATED[name], dim)
        for head in range(view.shape[1]):
            total = torch.zeros(real - 4, dtype=torch.float64)
            keys = view.keys[row, head, :real][4:].double()
            for member in range(group):
                queries = before.found[first][row, head * group + member, mask[row]][4:].double()
                mean, covariance = rotation @ queries.mean(0), rotation @ queries.T.cov(correction=0) @ rotation.T
                logits = keys @ mean * view.scaling + ((keys @ covariance) * keys).sum(1) * view.scaling**2 / 2
                total += logits.softmax(0) / group
            total = (total + 0.01) * view.values[row, head, :real][4:].double().norm(dim=-1)
            torch.testing.assert_close(score[row, head, 4:real].double(), total, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["smollm3", "cohere2", "jamba"])
@torch.no_grad()
def test_layers_without_rope_are_found(name: str) -> None:
    model, inputs = built(name)
    layers, seen = full_attention_layers(model), QueryProbe()
    rotary = find_rotary(model, layers)
    assert rotary is not None and model.config.model_type not in ROTARY_TYPES
    without = [layer.layer_idx for layer in layers if rotary.of_layer(layer.layer_idx) is not rotary]
    expected = [0, 3] if name == "smollm3" else [layer.layer_idx for layer in layers]
    assert without == expected
    with intercept(model, seen, layers):
        model(**inputs)
    with evict(model, "full", observe=["expected_attention"]) as session:
        cache = session.new_cache()
        model(**inputs, past_key_values=cache)
        for layer in cache.ragged:
            if layer.layer_idx in without:
                assert layer.statistics is not None
                wanted = seen.found[layer.layer_idx][:, :, 4:].mean(2)
                torch.testing.assert_close(layer.statistics.mean, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["glm", "stablelm", "ernie4_5", "qwen3_vl"])
@torch.no_grad()
def test_the_average_is_that_of_the_models_own_queries(name: str) -> None:
    """One token alone has the same hidden states wherever it stands: its queries are turned by position alone."""
    model, _ = built(name)
    layers, runs = full_attention_layers(model), []
    rotary = find_rotary(model, layers)
    assert rotary is not None and rotary.of_layer(1) is rotary
    for position in range(17, 22):
        queries = QueryProbe()
        with intercept(model, queries, layers):
            model(input_ids=torch.tensor([[9]]), position_ids=torch.full((1, 1), position), use_cache=False)
        runs.append(queries.found)
    angles = rotary.angles(torch.tensor([[17]]))
    for layer in layers:
        states = torch.cat([run[layer.layer_idx] for run in runs], 2)
        mean = rotary.undo(states[:, :, :1], angles)[:, :, 0]
        outer = mean.unsqueeze(-1) * mean.unsqueeze(-2)
        got, covariance = rotary.average(mean, outer, torch.tensor([17]), 5)
        wanted = states.mean(2)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(covariance, wanted.unsqueeze(-1) * wanted.unsqueeze(-2), atol=1e-5, rtol=1e-4)
