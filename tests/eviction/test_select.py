"""Selection, budgets and the choice of what stays, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.eviction.budget import Budget, Plan
from tenure.eviction.compress import choose
from tenure.eviction.layer import RaggedLayer
from tenure.eviction.policies import Policy
from tenure.eviction.rows import Rows
from tenure.eviction.select import select_top
from tenure.eviction.store import SegmentStore
from tenure.retention.seams import AttentionLayer


def naive_top(scores: list[float], k: int, order: list[int]) -> list[bool]:
    """The k best by (score, order), by sorting."""
    best = sorted((i for i, s in enumerate(scores) if s > float("-inf")), key=lambda i: (scores[i], order[i]))
    chosen = set(best[max(0, len(best) - max(0, k)) :])
    return [i in chosen for i in range(len(scores))]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_select_top_equals_sorting(data):
    n = data.draw(st.integers(1, 9))
    values = st.sampled_from([-float("inf"), -2.0, 0.0, 0.5, 1.0, float("inf")])  # few values: many ties
    rows = data.draw(st.lists(st.lists(values, min_size=n, max_size=n), min_size=1, max_size=4))
    k = [data.draw(st.integers(0, n + 2)) for _ in rows]
    orders = [data.draw(st.permutations(range(n))) for _ in rows]
    got = select_top(torch.tensor(rows), k, lambda: torch.tensor(orders))
    assert got.tolist() == [naive_top(*one) for one in zip(rows, k, orders, strict=True)]


def test_ties_are_broken_only_when_there_are_too_many():
    def never() -> torch.Tensor:
        raise AssertionError("no ties to break")

    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    assert select_top(scores, [3], never).tolist() == [[True, False, True, True]]
    assert select_top(scores, [9], never).all()


class Given(Policy):
    """Scores handed in, one `(batch, heads, n)` tensor a layer."""

    name = "given"

    def __init__(self, scores: dict[int, torch.Tensor]) -> None:
        self.scores = scores

    def score(self, view):
        return self.scores[view.layer_idx]


def ragged_layers(keeps: list[torch.Tensor], tokens: int) -> tuple[list[RaggedLayer], list[SegmentStore]]:
    """Layers, and their stores, that hold the entries marked in `keeps`, each bool `(batch, heads, tokens)`."""
    layers, stores = [], []
    for index, keep in enumerate(keeps):
        batch, heads = keep.shape[:2]
        layer = RaggedLayer(AttentionLayer(index, "", torch.nn.Identity(), heads, heads, 4))
        key = torch.zeros(batch, heads, tokens, 4)
        step = Rows().open(batch, tokens, None, torch.device("cpu"), 0, 0)
        layer.lazy_initialization(key)
        layer.store = SegmentStore.from_dense(key, key, {}, step)
        layer.store.compact(keep)
        layers.append(layer)
        stores.append(layer.store)
    return layers, stores


@pytest.mark.parametrize("scope", ["global", "layer", "head"])
@pytest.mark.parametrize("seed", range(4))
def test_choice_equals_plain_loops_over_rows_layers_and_heads(scope, seed):
    torch.manual_seed(seed)
    batch, tokens, head_counts = 3, 20, (2, 2, 3)
    layers, stores = ragged_layers([torch.rand(batch, heads, tokens) < 0.8 for heads in head_counts], tokens)
    views = [store.dense_index()[1] for store in stores]
    scores = {i: torch.randn(view.shape).mul(2).round() for i, view in enumerate(views)}
    plan = Plan(Given(scores), Budget(5), scope, sinks=1, recent=2)
    due = [True, False, True]
    got = choose(layers, plan, [tokens] * batch, due, None)

    segments = sum(head_counts)
    groups: dict[tuple[int, ...], list[tuple]] = {}
    for layer, heads in enumerate(head_counts):
        first = sum(head_counts[:layer])
        for row in range(batch):
            for head in range(heads):
                positions = stores[layer].dense(stores[layer].position)[row, head].tolist()
                group = {"global": (row,), "layer": (row, layer), "head": (row, layer, head)}[scope]
                for i, (place, valid) in enumerate(zip(positions, views[layer][row, head].tolist(), strict=True)):
                    if valid:
                        protected = place < 1 or place >= tokens - 2
                        score = float("inf") if protected else scores[layer][row, head, i].item()
                        entry = (score, place, segments - first - head, (layer, row, head, i))
                        groups.setdefault(group, []).append(entry)
    expected = [torch.zeros_like(view) for view in views]
    for group, entries in groups.items():
        rivals = len({(layer, head) for *_, (layer, _, head, _) in entries})
        stay = sorted(entries)[-5 * rivals :] if due[group[0]] else entries
        for *_, (layer, row, head, i) in stay:
            expected[layer][row, head, i] = True
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_a_budget_counts_in_tokens_or_shares():
    assert [Budget(0.29).per_head(n) for n in (1, 10, 100)] == [1, 2, 29]
    assert [Budget(7).per_head(n) for n in (1, 100)] == [7, 7]
    assert all(Budget(1.0).per_head(n) == n for n in range(1, 500)) and Budget(1.0).unlimited
    assert not Budget(1).unlimited and not Budget(0.999).unlimited


def test_a_plan_is_due_after_the_prompt_and_then_beyond_the_buffer():
    plan = Plan(Given({}), Budget(10), "global", buffer=5)
    assert plan.due(stored=41, tokens=11, new=11, segments=4)
    assert not plan.due(stored=40, tokens=10, new=10, segments=4)
    assert not plan.due(stored=60, tokens=30, new=1, segments=4)
    assert plan.due(stored=61, tokens=30, new=1, segments=4)
    assert not plan.due(stored=61, tokens=30, new=0, segments=4), "a row without a new token is left alone"
