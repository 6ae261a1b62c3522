"""Expected attention against sampled queries at positions to come, and against loops."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction import ExpectedAttention, evict


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"covariance": False}, {"value_norm": False}, {"epsilon": 0.01, "future": 7}])
@torch.no_grad()
def test_the_score_equals_loops(tiny_model, prompt, family, options):
    model, policy, ids = tiny_model(family), ExpectedAttention(**options), prompt(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with evict(model, "knorm", 0.7, "layer", sinks=2, recent=3, buffer=0, observe=[policy]) as session:
        cache = session.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        for layer in cache.ragged:
            view = policy.view(layer, cache.tokens_seen)
            score, statistics, rotary = policy.score(view), view.expected_queries, view.rotary
            scale = view.scaling
            for row in range(2):
                for head in range(view.shape[1]):
                    valid = view.valid[row, head].nonzero().flatten().tolist()
                    inner = [i for i in valid if view.positions[row, head, i] >= 4]
                    keys = view.keys[row, head, inner]
                    total = torch.zeros(len(inner))
                    for group in range(view.num_kv_groups):
                        index = head * view.num_kv_groups + group
                        mean, cov = rotary.average(
                            statistics.mean[row : row + 1],
                            statistics.covariance[row : row + 1],
                            statistics.next_position[row : row + 1],
                            policy.future,
                        )
                        logits = [key @ mean[0, index] * scale for key in keys]
                        if policy.covariance:
                            logits = [
                                x + key @ cov[0, index] @ key * scale**2 / 2
                                for x, key in zip(logits, keys, strict=True)
                            ]
                        total += torch.stack(logits).softmax(0) / view.num_kv_groups
                    if policy.value_norm:
                        total = (total + policy.epsilon) * view.values[row, head, inner].norm(dim=-1)
                    torch.testing.assert_close(score[row, head, inner], total, atol=1e-6, rtol=1e-3)
                    assert score[row, head, [i for i in valid if i not in inner]].isinf().all()


@torch.no_grad()
def test_the_expectation_is_that_of_gaussian_queries(tiny_llama, prompt):
    """exp(q·k) averaged over many queries drawn with the mean and covariance, at one position to come."""
    policy = ExpectedAttention(future=1, value_norm=False)
    with evict(tiny_llama, "full", observe=[policy]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 40), past_key_values=cache)
        layer = cache.ragged[0]
        layer.scaling /= 8  # small logits: fewer samples do
        view = policy.view(layer, cache.tokens_seen)
        statistics = view.expected_queries
        torch.manual_seed(0)
        expected = torch.zeros(2, 36)
        for index in range(4):
            spread = torch.distributions.MultivariateNormal(
                statistics.mean[0, index], statistics.covariance[0, index] + 1e-6 * torch.eye(8)
            ).sample((40_000,))
            cos, sin = view.rotary.angles(torch.tensor([[40]]))
            rotated = view.rotary._rotate(spread.view(1, 1, -1, 8), cos, sin)
            weights = (rotated[0, 0] @ view.keys[0, index // 2, 4:].t() * view.scaling).exp().mean(0)
            expected[index // 2] += weights / weights.sum() / 2
        torch.testing.assert_close(policy.score(view)[0, :, 4:], expected, atol=2e-3, rtol=2e-2)


@torch.no_grad()
def test_a_prompt_of_fewer_tokens_than_the_first_ones(tiny_llama, prompt):
    with evict(tiny_llama, "expected_attention", 2, sinks=0, recent=0, buffer=0) as session:
        tiny_llama.generate(prompt(1, 3), max_new_tokens=6, do_sample=False)
        session.last_cache.check()
        assert session.report().entries == 2 * 6
