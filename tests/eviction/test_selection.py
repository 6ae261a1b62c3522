"""Selection, budgets and the choice of what stays, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.eviction.cache_layer import RaggedLayer
from tenure.eviction.forward_state import SequenceState
from tenure.eviction.ops.naive import top_by_mass, top_of_rows
from tenure.eviction.plan import Budget, EvictionPlan
from tenure.eviction.policies import Policy
from tenure.eviction.protected_tokens import ProtectedTokens
from tenure.eviction.selection import choose
from tenure.eviction.storage.segment_store import SegmentStore
from tenure.retention.decoder_layers import AttentionLayer


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
    got = top_of_rows(torch.tensor(rows), k, lambda: torch.tensor(orders))
    assert got.tolist() == [naive_top(*one) for one in zip(rows, k, orders, strict=True)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.125, 0.25, 1.0, 3.0]), min_size=1, max_size=9), st.floats(-1, 12, width=32))
def test_top_by_mass_equals_sorting(values, mass):
    """The sums are exact, so the number of equal values that are needed is beyond doubt."""
    expected, total = [False] * len(values), 0.0
    for i in sorted(range(len(values)), key=lambda i: (values[i], i), reverse=True):
        if total >= mass:
            break
        expected[i], total = True, total + values[i]
    assert top_by_mass(torch.tensor([values]), torch.tensor([mass])).tolist() == [expected]


def test_top_by_mass_of_many_distinct_values():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 5, 400, generator=generator).softmax(-1)
    mass = torch.rand(3, 5, generator=generator)
    taken = top_by_mass(values, mass)
    sums = values.masked_fill(~taken, 0.0).sum(-1)
    least = values.masked_fill(~taken, torch.inf).amin(-1)
    assert bool((sums >= mass - 1e-6).all()) and bool((sums - least < mass + 1e-6).all())
    assert bool((values.masked_fill(taken, 0.0).amax(-1) <= least).all())


def test_ties_are_broken_only_when_there_are_too_many():
    def never() -> torch.Tensor:
        raise AssertionError("no ties to break")

    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    assert top_of_rows(scores, [3], never).tolist() == [[True, False, True, True]]
    assert top_of_rows(scores, [9], never).all()


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
        step = SequenceState().new_step(batch, tokens, None, torch.device("cpu"), 0, 0)
        layer.lazy_initialization(key)
        layer.store = SegmentStore.from_dense(key, key, {}, step)
        layer.store.compact(keep)
        layers.append(layer)
        stores.append(layer.store)
    return layers, stores


@pytest.mark.parametrize(
    ("scope", "floor"),
    [("global", 0.0), ("global", 0.4), ("global", 1.0), ("layer", 0.0), ("layer", 0.2), ("head", 0.0), ("head", 0.5),
     ("pyramid", 0.0)],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(4))
def test_choice_equals_plain_loops_over_rows_layers_and_heads(scope, floor, seed):
    torch.manual_seed(seed)
    batch, tokens, head_counts, budget = 3, 20, (2, 2, 3), 6
    if scope == "pyramid":
        head_counts, budget = (2, 2, 2), 11
    layers, stores = ragged_layers([torch.rand(batch, heads, tokens) < 0.8 for heads in head_counts], tokens)
    views = [store.dense_index()[1] for store in stores]
    scores = {i: torch.randn(view.shape).mul(2).round() for i, view in enumerate(views)}
    plan = EvictionPlan(Given(scores), Budget(budget), scope, sinks=1, recent=2, floor=floor)
    due = [True, False, True]
    guard = {0: {5, 9}, 1: {3}, 2: {5, 9}}  # what `protect` names, row by row
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    for row, places in guard.items():
        mask[row, list(places)] = True
    plan = plan.changed(None, None, protect=ProtectedTokens.of(mask))
    got = choose(layers, plan, [tokens] * batch, due, None)

    segments = sum(head_counts)
    # The pyramid's bottom layer can hold no more than all 20 tokens, which leaves 2 · 11 − 20 for the top one.
    allowed = {"global": [42], "layer": [12, 12, 18], "head": [6] * 7, "pyramid": [20, 20, 11, 11, 2, 2]}[scope]
    groups: dict[tuple[int, int], list[list]] = {}
    for layer, heads in enumerate(head_counts):
        first = sum(head_counts[:layer])
        share = allowed[first] if scope == "pyramid" else budget
        for row in range(batch):
            # Two named tokens, then sinks, then recent ones, as far as a head's share goes.
            wanted = [*guard[row], 0, 19, 18] if due[row] else []
            stay = set(wanted[:share])
            for head in range(heads):
                positions = stores[layer].dense(stores[layer].position)[row, head].tolist()
                entries = []
                for i, (place, valid) in enumerate(zip(positions, views[layer][row, head].tolist(), strict=True)):
                    if valid:
                        score = float("inf") if place in stay else scores[layer][row, head, i].item()
                        entries.append([score, place, segments - first - head, (layer, row, head, i)])
                if floor and scope in ("global", "layer"):
                    for entry in sorted(entries)[-max(1, int(floor * 6)) :]:
                        entry[0] = float("inf")
                group = {"global": 0, "layer": layer}.get(scope, first + head)
                groups.setdefault((row, group), []).extend(entries)
    expected = [torch.zeros_like(view) for view in views]
    for (row, group), entries in groups.items():
        for *_, (layer, _, head, i) in sorted(entries)[-allowed[group] :] if due[row] else entries:
            expected[layer][row, head, i] = True
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
