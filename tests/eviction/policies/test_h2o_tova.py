"""H2O and TOVA by hand and against loops over all queries."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tenure.eviction import H2O, TOVA, evict


@pytest.mark.parametrize("pieces", [[40], [25, 1, 1, 13]])
@torch.no_grad()
def test_h2o_sums_what_every_query_attended_to(tiny_llama, prompt, pieces):
    """Against the weights that transformers' eager attention gives."""
    ids, policy, mean = prompt(2, 40), H2O(), H2O(average=True, recent=0.0)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    tiny_llama.config._attn_implementation = "eager"
    weights = tiny_llama(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    tiny_llama.config._attn_implementation = "sdpa"
    with evict(tiny_llama, "full", observe=[policy, mean]) as session:
        cache, start = session.new_cache(), 0
        for size in pieces:
            start += size
            tiny_llama(ids[:, start - size : start], attention_mask=mask[:, :start], past_key_values=cache)
        for layer, expected in zip(cache.ragged, weights, strict=True):
            view = policy.view(layer, cache.tokens_seen, None, torch.tensor([10, 10]))
            for row, pad in enumerate((0, 7)):
                sums = expected[row, :, pad:, pad:].sum(1).unflatten(0, (2, 2)).mean(1)
                torch.testing.assert_close(view.state("attention")[row, :, : 40 - pad], sums, atol=1e-5, rtol=1e-4)
                score = policy.score(view)[row, :, : 40 - pad]
                assert torch.equal(score.isinf(), (torch.arange(40 - pad) >= 35 - pad).expand_as(score)), "half recent"
                shown = mean.score(mean.view(layer, cache.tokens_seen))[row, :, : 40 - pad]
                torch.testing.assert_close(shown, sums / torch.arange(40 - pad, 0, -1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_h2o_forgets_with_the_entry_and_goes_on(tiny_llama, prompt):
    with evict(tiny_llama, H2O(), 12, sinks=0, recent=0, buffer=2) as session:
        out = tiny_llama.generate(prompt(1, 40), max_new_tokens=20, do_sample=False)
        session.last_cache.check()
        assert out.shape == (1, 60)
        for head in session.last_cache.kept(0)[0]:
            assert set(range(54, 59)) <= set(head.tolist()), "about half of the budget is recent"
            assert head[0] < 40, "and some are older"


def test_tova_is_the_mean_over_all_heads_at_the_position(hand_view):
    """Two KV heads that kept different tokens: (0, 1, 2, 3) and (0, 1)."""
    keys = torch.zeros(1, 2, 4, 1)
    keys[0, 0, :, 0] = torch.tensor([1.0, 2, 3, 4]).log()
    keys[0, 1, :2, 0] = torch.tensor([1.0, 4]).log()
    view = hand_view(TOVA(), keys, queries=torch.ones(1, 2, 1, 1), lengths=[4, 2])
    score = TOVA().score(view)
    torch.testing.assert_close(score[0, 0, :3], torch.tensor([(0.1 + 0.2) / 2, (0.2 + 0.8) / 2, 0.3 / 2]))
    torch.testing.assert_close(score[0, 1, :2], torch.tensor([(0.1 + 0.2) / 2, (0.2 + 0.8) / 2]))
    assert score[0, 0, 3] == torch.inf, "the newest stays"


@torch.no_grad()
def test_tova_heads_keep_the_same_tokens(tiny_llama, prompt):
    with evict(tiny_llama, TOVA(), 0.3, sinks=0, recent=0, buffer=3) as session:
        tiny_llama.generate(prompt(1, 40), max_new_tokens=15, do_sample=False)
        for layer in range(3):
            one, other = session.last_cache.kept(layer)[0]
            assert torch.equal(one, other)


@torch.no_grad()
def test_tova_equals_eager_attention(tiny_llama, prompt):
    ids = prompt(1, 30)
    tiny_llama.config._attn_implementation = "eager"
    weights = tiny_llama(ids, output_attentions=True, use_cache=False).attentions
    tiny_llama.config._attn_implementation = "sdpa"
    with evict(tiny_llama, "full", observe=["tova"]) as session:
        cache = session.new_cache()
        tiny_llama(ids, past_key_values=cache)
        for layer, expected in zip(cache.ragged, weights, strict=True):
            view = TOVA().view(layer, cache.tokens_seen, cache.query_positions)
            mean = F.pad(expected[0, :, -1, :-1].mean(0), (0, 1), value=torch.inf)
            torch.testing.assert_close(TOVA().score(view)[0], mean.expand(2, -1), atol=1e-6, rtol=1e-4)
