"""The scores of policies with a formula against plain loops, and what they keep."""

from __future__ import annotations

import math

import pytest
import torch

from tenure.eviction import (
    KeyDiff,
    Knorm,
    LayerView,
    Random,
    Retention,
    SnapKV,
    StreamingLLM,
    evict,
)
from tenure.eviction.policies.retention import log_geometric_sum


def entries(view: LayerView):
    """(row, head, [index of valid entries])"""
    for row in range(view.shape[0]):
        for head in range(view.shape[1]):
            yield row, head, view.valid[row, head].nonzero().squeeze(1).tolist()


def test_retention_is_the_log_of_what_is_left_at_the_next_token(views):
    def use(view: LayerView) -> None:
        score = Retention().score(view)
        for row, head, valid in entries(view):
            for i in valid:
                age = view.time[row].item() + 1 - view.positions[row, head, i].item()
                beta = math.exp(view.log_beta[row, head, i].item())
                assert score[row, head, i].item() == pytest.approx(math.log(beta**age), rel=1e-3, abs=1e-5)

    views(Retention(), use)


def test_lookahead_judges_later_and_a_threshold_lets_go(hand_view):
    log_beta = torch.tensor([[[-0.5, -0.1, -0.3, -0.2]]])
    age = torch.tensor([5.0, 4.0, 3.0, 2.0])  # T + 1 - i with T = 4
    view = hand_view(Retention(), torch.ones(1, 1, 4, 2), log_beta=log_beta)
    torch.testing.assert_close(Retention().score(view), age * log_beta)
    expected = torch.stack([((age + s) * log_beta).exp() for s in range(10)]).sum(0).log()
    torch.testing.assert_close(Retention(lookahead=10).score(view), expected)
    unfading = log_geometric_sum(torch.tensor([0.0, -1e-9, -1e-4]), 10)  # n at β = 1
    torch.testing.assert_close(unfading, torch.tensor([10.0, 10.0, 9.99551]).log())
    below = Retention(threshold=0.5).score(view)  # the retentions are 0.08, 0.67, 0.41, 0.67
    assert (below == -torch.inf).tolist() == [[[True, False, True, False]]]
    torch.testing.assert_close(below[0, 0, 1::2], (age * log_beta)[0, 0, 1::2])
    assert (Retention(lookahead=10, threshold=0.5).score(view) == -torch.inf).tolist() == [[[True, False, True, False]]]


@torch.no_grad()
def test_below_the_threshold_nothing_stays_even_if_there_is_room(tiny_llama, gates_for, prompt):
    gates, ids = gates_for(tiny_llama), prompt(1, 60)
    with evict(tiny_llama, "full", gates=gates, observe=["retention"]) as session:
        cache = session.new_cache()
        tiny_llama(ids, past_key_values=cache)
        fading = {}
        for layer in cache.ragged:
            view = Retention().view(layer, cache.tokens_seen)
            fading[layer.layer_idx] = Retention().score(view).exp()[0] < 0.3
        counts = [int(one.sum()) for one in fading.values()]
        assert 60 < sum(counts) < 340, "some of the 360 entries have faded"
        cache.compress(Retention(threshold=0.3), 0.95, sinks=2, recent=5)
        for index, gone in fading.items():
            for head, kept in zip(gone, cache.kept(index)[0], strict=True):
                stays = ~head
                stays[:2] = stays[-5:] = True
                assert kept.tolist() == stays.nonzero().squeeze(1).tolist()
        cache.check()


@torch.no_grad()
def test_a_row_that_is_not_due_keeps_what_is_below_the_threshold(tiny_llama, gates_for, prompt):
    """A long row evicts while a short one beside it has room."""
    ids, policy = prompt(2, 60), Retention(threshold=0.9)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    with evict(tiny_llama, policy, 30, gates=gates_for(tiny_llama), recent=4) as session:
        tiny_llama(ids, attention_mask=mask)
        assert session.last_cache.lengths()[1].tolist() == [[20, 20]] * 3
        assert session.last_cache.lengths()[0].sum() < 30 * 6


def test_keydiff_and_knorm_equal_loops(views):
    def use(view: LayerView) -> None:
        keydiff, knorm = KeyDiff().score(view), Knorm().score(view)
        for row, head, valid in entries(view):
            keys = [view.keys[row, head, i] for i in valid]
            anchor = torch.stack([key / key.norm() for key in keys]).mean(0)
            for i, key in zip(valid, keys, strict=True):
                cosine = (key @ anchor / key.norm() / anchor.norm()).item()
                assert keydiff[row, head, i].item() == pytest.approx(-cosine, abs=1e-5)
                assert knorm[row, head, i].item() == pytest.approx(-key.norm().item(), rel=1e-5)

    views(KeyDiff(), use)


@pytest.mark.parametrize("policy", [SnapKV(window=8, kernel=5), SnapKV(window=6, kernel=3, pool="max")], ids=str)
def test_snapkv_equals_loops(views, policy):
    def use(view: LayerView) -> None:
        score, half = policy.score(view), policy.kernel // 2
        for row, head, valid in entries(view):
            time = int(view.time[row])
            observers = [i for i, at in enumerate(view.query_positions[row].tolist()) if at >= 0]
            assert view.query_positions[row].tolist() == list(range(time - policy.window, time))
            mean = {i: 0.0 for i in valid}
            for group in range(view.num_kv_groups):
                for j in observers:
                    query = view.queries[row, head * view.num_kv_groups + group, j]
                    seen = [i for i in valid if view.positions[row, head, i] <= view.query_positions[row, j]]
                    weights = (view.keys[row, head, seen] @ query * view.scaling).softmax(0)
                    for i, weight in zip(seen, weights.tolist(), strict=True):
                        mean[i] += weight / len(observers) / view.num_kv_groups
            own = {i for i in valid if view.positions[row, head, i] >= time - policy.window}
            mean = {i: 0.0 if i in own else value for i, value in mean.items()}
            for i in valid:
                near = [mean.get(k, 0.0) for k in range(i - half, i + half + 1)]
                pooled = sum(near) / policy.kernel if policy.pool == "avg" else max(near)
                expected = 1.0 if i in own else pooled
                assert score[row, head, i].item() == pytest.approx(expected, abs=1e-5)

    views(policy, use)


def test_remembered_queries_are_the_last_ones_in_order(tiny_llama, prompt):
    """Written one token at a time, past the ring's size, they equal those of one forward."""
    ids = prompt(1, 20)
    with torch.no_grad(), evict(tiny_llama, "full", observe=[SnapKV(window=6)]) as session:
        whole, pieces = session.new_cache(), session.new_cache()
        tiny_llama(ids, past_key_values=whole)
        for start, end in ((0, 9), (9, 17), (17, 18), (18, 19), (19, 20)):
            tiny_llama(ids[:, start:end], past_key_values=pieces)
        for one, other in zip(whole.ragged, pieces.ragged, strict=True):
            views = [
                SnapKV(window=4).view(layer, cache.tokens_seen, cache.query_positions)
                for layer, cache in ((one, whole), (other, pieces))
            ]
            assert views[0].query_positions.tolist() == views[1].query_positions.tolist() == [[16, 17, 18, 19]]
            torch.testing.assert_close(views[0].queries, views[1].queries, atol=1e-5, rtol=1e-5)


def test_streaming_keeps_first_and_last(tiny_llama, prompt):
    with torch.no_grad(), evict(tiny_llama, StreamingLLM(first=2), 6, sinks=0, recent=0) as session:
        tiny_llama(prompt(1, 30))
        assert session.last_cache.kept(1)[0][0].tolist() == [0, 1, 26, 27, 28, 29]


def test_random_is_reproducible_spread_and_seeded(tiny_llama, prompt):
    def kept(seed: int, batch: int) -> list[list[int]]:
        with torch.no_grad(), evict(tiny_llama, Random(seed), 0.5, sinks=0, recent=0) as session:
            tiny_llama(prompt(batch, 200))
            return [head.tolist() for layer in range(3) for head in session.last_cache.kept(layer)[-1]]

    assert kept(0, 1) == kept(0, 3)
    assert kept(0, 1) != kept(1, 1)
    sets = kept(0, 1)
    assert len({tuple(one) for one in sets}) == 6, "every layer and head draws its own"
    for one in sets:
        assert abs(sum(one) / len(one) - 99.5) < 25, "no preference for old or new"
