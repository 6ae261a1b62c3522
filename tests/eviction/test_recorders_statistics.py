"""Statistics of the queries before RoPE, and the rotation that takes it back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tenure.eviction import LayerView, evict
from tenure.eviction.forward_state import SequenceState
from tenure.eviction.model_adapters import Rotary
from tenure.eviction.recorded import QueryStatistics, StatisticsConfig
from tenure.eviction.recorders import Observers


def queries_before_rope(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """`(batch, num_heads, n, head_dim)` by the module's own projection and norm."""
    width = module.config.num_attention_heads * module.head_dim
    states = module.q_proj(hidden) if hasattr(module, "q_proj") else module.qkv_proj(hidden)[..., :width]
    states = states.view(*hidden.shape[:2], -1, module.head_dim)
    return (module.q_norm(states) if hasattr(module, "q_norm") else states).transpose(1, 2)


@pytest.mark.parametrize("pieces", [[30], [3, 20, 1, 1, 5]])
@torch.no_grad()
def test_statistics_are_those_of_the_queries_before_rope(any_tiny_model, prompt, pieces):
    """Of real tokens behind the first four, in every family, at once or piece by piece."""
    model, ids, inputs = any_tiny_model, prompt(2, 30), {}
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.setdefault(module.layer_idx, []).append(kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    with evict(model, "full", observe=["expected_attention"]) as session:
        session.observers.statistics = StatisticsConfig(chunk=8)
        cache, start = session.new_cache(), 0
        for size in pieces:
            part = slice(start, start + size)
            model(ids[:, part], attention_mask=mask[:, : start + size], past_key_values=cache)
            start += size
        for layer in cache.ragged:
            queries = queries_before_rope(layer.attention.module, torch.cat(inputs[layer.layer_idx], 1))
            statistics = LayerView(layer, cache.tokens_seen).expected_queries
            assert statistics.next_position.tolist() == [30, 30], "without position_ids padding has positions too"
            for row, pad in enumerate((0, 2)):
                chosen = queries[row, :, pad + StatisticsConfig.skipped_tokens :]
                assert statistics.count[row] == chosen.shape[1]
                torch.testing.assert_close(statistics.mean[row], chosen.mean(1), atol=1e-5, rtol=1e-4)
                for head in range(chosen.shape[0]):
                    expected = chosen[head].t().cov(correction=0)
                    torch.testing.assert_close(statistics.covariance[row, head], expected, atol=1e-5, rtol=1e-4)
    for handle in handles:
        handle.remove()


def test_statistics_of_rows_are_merged_and_selected():
    torch.manual_seed(0)
    queries = torch.randn(2, 1, 7, 3) + 100  # a large mean: squares would cancel
    counts = torch.tensor([[True] * 7, [False, True, True, False, True, True, True]])
    statistics = QueryStatistics.empty(2, 1, 3, queries.device)
    assert statistics.covariance.eq(0).all()
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        statistics = statistics.updated(queries[:, :, part], counts[:, part], torch.tensor([7, 5]))
    for row in range(2):
        expected = queries[row, 0, counts[row]].t().cov(correction=0)
        torch.testing.assert_close(statistics.covariance[row, 0], expected, atol=1e-4, rtol=1e-4)
    swapped = statistics.select(torch.tensor([1, 0, 1]))
    assert swapped.count.tolist() == [5, 7, 5] and swapped.next_position.tolist() == [5, 7, 5]
    assert torch.equal(swapped.scatter[2], statistics.scatter[1])


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_the_average_rotation_is_the_mean_of_the_rotations(tiny_model, family):
    model = tiny_model(family)
    rotary, dim = Rotary(model), model.get_submodule("model.layers.1.self_attn").head_dim
    torch.manual_seed(0)
    mean, root = torch.randn(1, 2, dim), torch.randn(1, 2, dim, dim)
    covariance = root @ root.transpose(2, 3)
    positions = torch.arange(17, 22)
    # One rotation a position, written as a matrix: the images of the unit vectors.
    cos, sin = rotary.angles(positions.unsqueeze(0))
    matrices = [
        rotary._rotate(torch.eye(dim).view(1, dim, 1, dim), cos[:, i : i + 1], sin[:, i : i + 1]).view(dim, dim).t()
        for i in range(5)
    ]
    average = torch.stack(matrices).mean(0)
    got_mean, got_covariance = rotary.average(mean, covariance, torch.tensor([17]), 5)
    torch.testing.assert_close(got_mean, mean @ average.t(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_covariance, average @ covariance @ average.t(), atol=1e-4, rtol=1e-4)


def test_position_ids_of_another_form_are_refused(tiny_llama):
    observers = Observers([], Rotary(tiny_llama))
    step = SequenceState().new_step(2, 5, None, torch.device("cpu"), 0, 0)
    with pytest.raises(ValueError, match=r"need position_ids \(batch, 5\), got \(3, 2, 5\)"):
        observers.begin(step, torch.zeros(3, 2, 5), 0)
