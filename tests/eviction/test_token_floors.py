"""Floors for groups of tokens: their best entries keep a share of the budget, and the budget is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tenure.eviction import evict
from tenure.eviction.plan import plan_from_json, plan_to_json
from tenure.eviction.presets import make_plan
from tenure.eviction.token_floors import TokenFloor, token_floors

IMAGE = [(10, 22)]


def inside(cache: Any, row: int = 0) -> list[list[int]]:
    """Entries of tokens 10 … 21 by layer and head."""
    return [
        [int(((place >= 10) & (place < 22)).sum()) for place in cache.kept(layer.layer_idx)[row]]
        for layer in cache.ragged
    ]


@pytest.mark.parametrize("policy", ["retention", "knorm", "streaming_llm", "random"])
@pytest.mark.parametrize("scope", ["global", "layer", "head", "pyramid"])
@torch.no_grad()
def test_the_tokens_of_a_floor_keep_their_share(tiny_llama, gates_for, prompt, policy, scope):
    gates = gates_for(tiny_llama)
    with evict(tiny_llama, "full", 1.0, gates=gates, observe=[policy]) as session:
        whole = session.new_cache()
        tiny_llama(prompt(1, 60), past_key_values=whole)
        free = whole.fork().compress(policy, 12, scope, sinks=0, recent=0)
        held = whole.fork().compress(policy, 12, scope, sinks=0, recent=0, token_floors=[(IMAGE, 0.5)])
        assert held.entries == free.entries, "a floor costs nothing beyond the budget"
        held.check()
        heads = [count for layer in inside(held) for count in layer]
        assert sum(heads) >= 6 * len(heads) - len(heads) * (scope == "pyramid")
        if scope == "head":
            assert min(heads) >= 6
        if scope == "layer":
            assert all(sum(layer) >= 6 * len(layer) for layer in inside(held))
        # A floor that the tokens reach anyway changes nothing.
        least = min(sum(layer) / len(layer) for layer in inside(free)) / 12 if scope != "head" else 0.0
        if scope == "global" and sum(map(sum, inside(free))):
            least = sum(map(sum, inside(free))) / (12 * len(heads))
            same = whole.fork().compress(policy, 12, scope, sinks=0, recent=0, token_floors=[(IMAGE, least)])
            for layer in same.ragged:
                kept = zip(same.kept(layer.layer_idx)[0], free.kept(layer.layer_idx)[0], strict=True)
                assert all(torch.equal(one, other) for one, other in kept)


@torch.no_grad()
def test_the_best_tokens_fill_the_floor_and_protected_ones_stay(tiny_llama, gates_for, prompt):
    gates = gates_for(tiny_llama)
    with evict(tiny_llama, "full", 1.0, gates=gates, observe=["knorm"]) as session:
        whole = session.new_cache()
        tiny_llama(prompt(1, 60), past_key_values=whole)
        guard = [(30, 34), (58, 60)]
        held = whole.fork().compress("knorm", 10, "head", sinks=0, recent=0, protect=guard, token_floors=[(IMAGE, 0.4)])
        alone = whole.fork().compress("knorm", 10, "head", sinks=0, recent=0, protect=guard)
        for layer in held.ragged:
            for kept, plain in zip(held.kept(layer.layer_idx)[0], alone.kept(layer.layer_idx)[0], strict=True):
                kept, plain = set(kept.tolist()), set(plain.tolist())
                assert {30, 31, 32, 33, 58, 59} <= kept and len(kept) == 10
                assert len(kept & set(range(10, 22))) == 4, "six protected and four of the floor fill ten entries"
                won = plain & set(range(10, 22))
                assert won <= kept, "at most four win without a floor, and these are the floor's best"


@torch.no_grad()
def test_floors_hold_in_chunks_while_decoding_and_in_a_saved_cache(tiny_llama, gates_for, prompt, tmp_path):
    options = {"gates": gates_for(tiny_llama), "buffer": 2, "token_floors": [(IMAGE, 0.5)], "sinks": 0, "recent": 2}
    with evict(tiny_llama, "streaming_llm", 10, "head", prefill_chunk=16, **options) as session:
        cache = session.new_cache()
        tiny_llama(prompt(2, 60), past_key_values=cache)
        for _ in range(6):
            tiny_llama(prompt(2, 1), past_key_values=cache)
            assert all(count >= 5 for row in (0, 1) for layer in inside(cache, row) for count in layer)
        cache.save(tmp_path / "cache")
        assert session.load_cache(tmp_path / "cache").plan.token_floors == cache.plan.token_floors


def test_a_plan_with_floors_in_json():
    plan = make_plan("knorm", 0.2, token_floors=[(IMAGE, 0.25), (torch.tensor([True, False, True]), 0.5)])
    assert plan_from_json(plan_to_json(plan), ()) == plan
    assert plan.token_floors[1].tokens.rows == (((0, 1), (2, 3)),)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("image", "token_floors is 'image'; give pairs"),
        ([(IMAGE, 0.0)], r"has the share 0.0; give pairs \(tokens, share\)"),
        ([(IMAGE, True)], "has the share True"),
        ([(IMAGE, 0.7), ([(0, 2)], 0.4)], "shares that add up to 1.1; give pairs"),
        ([IMAGE], "give pairs"),
        ([("image", 0.5)], "protect is 'image'; give token ranges"),
    ],
)
def test_other_floors_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        token_floors(given)


def test_a_mask_for_other_rows_is_refused(tiny_llama, prompt):
    mask = torch.ones(3, 20, dtype=torch.bool)
    with (
        evict(tiny_llama, "knorm", 10, token_floors=[(mask, 0.5)]) as session,
        pytest.raises(ValueError, match="a mask for 3 rows, the cache has 2"),
    ):
        tiny_llama(prompt(2, 20), past_key_values=session.new_cache())


def test_a_floor_follows_its_rows():
    floor = TokenFloor(token_floors([(torch.eye(2, dtype=torch.bool), 0.5)])[0].tokens, 0.5)
    assert floor.for_rows([1, 1]).tokens.rows == (((1, 2),), ((1, 2),))
