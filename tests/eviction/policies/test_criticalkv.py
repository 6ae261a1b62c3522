"""CriticalKV and its kin: two stages by hand, budgets of heads that compete."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction import AdaCriticalKV, AdaKV, CriticalKV, PyramidKV, SnapKV, evict
from tenure.eviction.policies.ada_criticalkv import head_budgets
from tenure.eviction.policies.common import best_of_each_head, ranks


def test_ranks_put_the_newer_of_equals_first():
    score = torch.tensor([[[1.0, 3, 2, 3, 9], [5, 5, 5, 0, 0]]])
    valid = torch.tensor([[[True] * 4 + [False], [True] * 3 + [False] * 2]])
    assert ranks(score, valid)[0, 0, :4].tolist() == [3, 1, 2, 0]
    assert ranks(score, valid)[0, 1, :3].tolist() == [2, 1, 0]
    chosen = best_of_each_head(score, valid, torch.tensor([[2, 9]]))
    assert chosen.tolist() == [[[False, True, False, True, False], [True] * 3 + [False] * 2]]


def critical_view(hand_view, policy, budget):
    """Attention of the one query (kernel 1): 0.4, 0.3, 0.1, 0.1, 0.1; the values' norms: 2, 2, 2, 20, 12."""
    keys = torch.tensor([4.0, 3, 1, 1, 1]).log().view(1, 1, 5, 1)
    values = torch.tensor([1.0, -1, 1, 10, 6]).view(1, 1, 5, 1)
    weight = torch.tensor([[1.0, -1.0]])
    return hand_view(policy, keys, values, torch.ones(1, 1, 1, 1), weight, budget=budget)


@pytest.mark.parametrize(
    ("options", "budget", "first"),
    [({}, 4, 2), ({}, 3, 1), ({"first_stage": 0.0}, 4, 0), ({"first_stage": 1.0}, 3, 3)],
)
def test_criticalkv_by_hand(hand_view, options, budget, first):
    policy = CriticalKV(window=1, kernel=1, epsilon=0.05, **options)
    score = policy.score(critical_view(hand_view, policy, budget))[0, 0]
    # The newest entry is the window's own: the first of the first stage, and kept whatever the stage.
    stages = torch.tensor([0.45 * 2, 0.35 * 2, 0.15 * 2, 0.15 * 20, torch.inf])
    stages[: max(0, first - 1)] = torch.inf
    torch.testing.assert_close(score, stages)


def test_head_budgets_by_hand():
    """Eight places: a floor of one each, then by score; 9 and 8 are no entries."""
    heads = [0.1, 0.2, 0.3, 0.4, 0.5, 9.0], [0.01, 0.02, 0.45, 0.6, 0.7, 0.8], [0.03, 0.04, 8, 8, 8, 8]
    score = torch.tensor([heads])
    valid = torch.ones(1, 3, 6, dtype=torch.bool)
    valid[0, 0, 5] = False
    valid[0, 2, 2:] = False
    assert head_budgets(score, valid, torch.tensor([2]), 0.5).tolist() == [[1, 4, 1]]
    assert head_budgets(score, valid, torch.tensor([3]), 0.67).tolist() == [[3, 4, 2]]
    assert head_budgets(score, valid, torch.tensor([9]), 0.2).tolist() == [[5, 6, 2]]


@torch.no_grad()
def test_ada_criticalkv_keeps_adakvs_numbers_and_criticalkvs_choice(tiny_llama, prompt):
    """Each head keeps as many entries as under AdaKV; among them all of its first stage; the rest by value."""
    ids = prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    with evict(tiny_llama, "full", observe=[AdaCriticalKV(window=4)]) as session:
        whole = session.new_cache()
        tiny_llama(ids, attention_mask=mask, past_key_values=whole)
        ada, critical, alone = whole.fork(), whole.fork(), whole.fork()
        ada.compress(AdaKV(window=4), 0.4, sinks=0, recent=0)
        critical.compress(AdaCriticalKV(window=4), 0.4, sinks=0, recent=0)
        alone.compress(SnapKV(window=4), 0.4, sinks=0, recent=0)
        assert torch.equal(ada.lengths(), critical.lengths())
        assert not torch.equal(ada.lengths(), alone.lengths()), "heads compete"
        same = [
            a.tolist() == c.tolist()
            for layer in range(3)
            for row in range(2)
            for a, c in zip(ada.kept(layer)[row], critical.kept(layer)[row], strict=True)
        ]
        assert not all(same), "values have a say"


@torch.no_grad()
def test_defaults_reach_the_plan(tiny_llama, prompt):
    for policy, scope, floor in ((AdaKV(window=4), "layer", 0.2), (PyramidKV(window=1), "pyramid", 0.0)):
        with evict(tiny_llama, policy, 0.4, sinks=0, recent=0) as session:
            tiny_llama(prompt(1, 60))
            assert (session.plan.scope, session.plan.floor) == (scope, floor)
            lengths = session.report().lengths[0]
            assert lengths.sum() == 24 * 6
            if scope == "pyramid":
                assert lengths[0, 0] > lengths[1, 0] > lengths[2, 0]
