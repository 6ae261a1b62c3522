"""Budgets in entries, their allocation, and that bytes are never exceeded."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenure.eviction import Knorm, Policy, SnapKV, evict
from tenure.eviction.plan import (
    Budget,
    BudgetLayout,
    EvictionPlan,
    ProtectedTokens,
    allocate,
    apportion,
    plan_from_json,
    plan_to_json,
    pyramid,
)
from tenure.eviction.policies.policy import Protection
from tenure.eviction.policies.registry import get_policy
from tenure.eviction.storage.segment_store import StorageConfig

ONE = BudgetLayout((1,), 100)
SIX = BudgetLayout((2, 2, 2), 72)


def test_a_budget_counts_in_tokens_or_shares():
    assert [Budget(0.29).total(n, ONE) for n in (1, 10, 100)] == [1, 2, 29]
    assert [Budget(7).total(n, SIX) for n in (1, 100)] == [42, 42]
    assert all(Budget(1.0).total(n, ONE) == n for n in range(1, 500)) and Budget(1.0).unlimited
    assert not Budget(1).unlimited and not Budget(0.999).unlimited and not Budget("9 entries").unlimited
    seven: Any = np.int64(7)
    half: Any = np.float32(0.5)
    assert Budget(seven) == Budget(7) and type(Budget(half).amount) is float


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("65536 entries", 65536, "entries"), ("1 entry", 1, "entries"), ("512MiB", 512 * 2**20, "bytes"),
        ("2GB", 2 * 10**9, "bytes"), ("1.5 kib", 1536, "bytes"), (" 300 B ", 300, "bytes"), ("1TiB", 2**40, "bytes"),
        ("0.5TB", 5 * 10**11, "bytes"), ("7mb", 7 * 10**6, "bytes"),
    ],
)  # fmt: skip
def test_a_budget_may_be_text(text, number, unit):
    assert Budget(text)._parsed() == (number, unit)
    assert Budget(text).in_bytes == (unit == "bytes")


@pytest.mark.parametrize("text", ["lots", "", "0.2", "12", "MiB", "3 apples", "1.5 entries", "-2GB", "2 G B"])
def test_other_text_is_refused_with_what_is_accepted(text):
    with pytest.raises(ValueError, match=r"is not understood: give a float in \(0, 1\], .* or '512MiB' or '2GB'"):
        Budget(text)


@pytest.mark.parametrize("text", ["0 entries", "0MB", "0.1B"])
def test_text_for_nothing_is_out_of_range(text):
    with pytest.raises(ValueError, match="is out of range"):
        Budget(text)


def test_totals_of_a_row_are_not_multiplied_by_its_heads():
    assert Budget("40 entries").total(1000, SIX) == 40
    with pytest.raises(ValueError, match=r"'5 entries' is less than one entry .* the least is '6 entries'"):
        Budget("5 entries").total(1000, SIX)


@pytest.mark.parametrize("layout", [ONE, SIX, BudgetLayout((3, 3), 1), BudgetLayout((8,) * 32, 264)])
def test_the_least_number_of_bytes_that_is_named_is_accepted(layout):
    with pytest.raises(ValueError, match="is less than one entry") as error:
        Budget("1B").total(10, layout)
    least = str(error.value).split("'")[-2]
    assert Budget(least).total(10, layout) >= layout.segments
    with pytest.raises(ValueError, match="is less than one entry"):
        Budget(f"{int(least[:-1]) - 2}B").total(10, layout)


@given(st.integers(1, 500), st.lists(st.floats(0.01, 50), min_size=1, max_size=12))
def test_apportioned_shares_add_up_and_are_off_by_less_than_one(total, weights):
    shares = apportion(total, weights)
    assert sum(shares) == total and min(shares) >= 0
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


@pytest.mark.parametrize("scope", ["global", "layer", "head", "pyramid"])
@given(heads=st.lists(st.integers(1, 4), min_size=1, max_size=6), per_head=st.integers(1, 60), more=st.integers(0, 5))
def test_an_allocation_adds_up_exactly(scope, heads, per_head, more):
    layout = BudgetLayout(tuple(heads), 1)
    total = per_head * layout.segments + more
    allocation = allocate(scope, total, 100, layout, window=8)
    assert sum(allocation.groups) == total
    assert allocation.average == total // layout.segments
    assert len(allocation.shares) == len(heads)
    if scope != "pyramid":
        assert all(0 < share <= math.ceil(total / layout.segments) for share in allocation.shares)


def test_the_pyramid_is_that_of_kvpress():
    """Numbers from kvpress 0.5.5, `PyramidKVPress(compression_ratio, window_size).get_layer_budget`, four layers."""
    kvpress = {
        (0.8, 1000, 8): [390, 263, 137, 10],
        (0.8, 1000, 64): [200, 200, 200, 200],  # the top layer would not hold the window
        (0.2, 1000, 64): [936, 845, 755, 664],  # the bottom layer cannot hold more than there is
        (0.5, 512, 8): [499, 337, 175, 13],
    }
    for (ratio, tokens, window), budgets in kvpress.items():
        got = pyramid(tokens * (1 - ratio), tokens, 4, window)
        assert [round(one) for one in got] == budgets
        assert sum(got) == pytest.approx(4 * tokens * (1 - ratio))
    assert pyramid(10.0, 100, 1) == [10.0]
    assert pyramid(6.0, 100, 3) == [6.0] * 3, "6 / 20 would leave the top layer nothing"


def test_a_new_policy_brings_its_scope_and_floor_unless_they_are_given():
    class Floored(Knorm):
        default_scope = "layer"
        default_floor = 0.2

    plan = EvictionPlan(Knorm(), Budget(10), "head")
    assert (plan.changed(Floored(), None).scope, plan.changed(Floored(), None).floor) == ("layer", 0.2)
    given = plan.changed(Floored(), 0.5, scope="global", floor=0.0)
    assert (given.scope, given.floor, given.budget) == ("global", 0.0, Budget(0.5))
    assert plan.changed(None, None, floor=0.4) == EvictionPlan(Knorm(), Budget(10), "head", floor=0.4)


def test_a_plan_is_due_after_the_prompt_and_then_beyond_the_buffer():
    plan = EvictionPlan(Knorm(), Budget(10), "global", buffer=5)
    layout = BudgetLayout((2, 2), 1)
    assert plan.due(stored=41, tokens=11, new=11, layout=layout)
    assert not plan.due(stored=40, tokens=10, new=10, layout=layout)
    assert not plan.due(stored=60, tokens=30, new=1, layout=layout)
    assert plan.due(stored=61, tokens=30, new=1, layout=layout)
    assert not plan.due(stored=61, tokens=30, new=0, layout=layout), "a row without a new token is left alone"


# The model is the same for all examples: nothing writes to it.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scope=st.sampled_from(["global", "layer", "head", "pyramid"]),
    kibibytes=st.integers(2, 40),
    length=st.integers(20, 150),
    pads=st.lists(st.integers(0, 15), min_size=1, max_size=3),
    policy=st.sampled_from([Knorm(), SnapKV(window=4)]),
)
def test_bytes_are_never_exceeded_after_an_eviction(tiny_llama, scope, kibibytes, length, pads, policy: Policy):
    torch.manual_seed(length)
    ids = torch.randint(3, 128, (len(pads), length))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    with torch.no_grad(), evict(tiny_llama, policy, f"{kibibytes}KiB", scope, sinks=1, recent=2) as session:
        cache = session.new_cache()
        tiny_llama(ids, attention_mask=mask, past_key_values=cache)
        report, allowed = session.report(), len(pads) * kibibytes * 1024
        assert cache.nbytes == report.bytes <= allowed
        if report.evictions and scope != "pyramid":  # its lower layers may have fewer than they may keep
            segments, entry = 6, (8 + 8) * 4 + 4
            full = [min((length - pad) * segments, kibibytes * 1024 / entry) for pad in pads]
            used = sum((n - segments) / (1 + StorageConfig.slack) - 1 for n in full)
            assert report.entries > used, "the bytes are used"
        cache.check()


@torch.no_grad()
def test_bytes_count_what_policies_keep_of_an_entry(tiny_llama, gates_for, prompt):
    def kept(policy, **options) -> int:
        with evict(tiny_llama, policy, "16KiB", scope="global", **options) as session:
            tiny_llama(prompt(1, 200))
            assert session.report().bytes <= 16 * 1024
            return session.report().entries

    # log β makes an entry of 68 bytes one of 72.
    assert kept("retention", gates=gates_for(tiny_llama)) == pytest.approx(kept("knorm") * 68 / 72, abs=2)


@torch.no_grad()
def test_a_floor_leaves_every_head_something(tiny_llama, gates_for, prompt):
    lengths = {}
    for floor in (0.0, 0.6, 1.0):
        options = {"gates": gates_for(tiny_llama), "floor": floor, "sinks": 0, "recent": 1}
        with evict(tiny_llama, "retention", 20, **options) as session:
            tiny_llama(prompt(2, 100))
            lengths[floor] = session.report().lengths
        assert lengths[floor].sum((1, 2)).tolist() == [120, 120], "the total is exact"
    assert lengths[0.0].min() < 12 <= lengths[0.6].min() < lengths[0.6].max()
    assert torch.equal(lengths[1.0], torch.full((2, 3, 2), 20))


@torch.no_grad()
def test_600_tokens_under_32_entries_a_head_without_growth(tiny_model, gates_for, prompt):
    model = tiny_model("llama", max_position_embeddings=1024)
    buffer, most, shapes = 16, 0, set()
    options = {"gates": gates_for(model), "sinks": 2, "recent": 4, "buffer": buffer}
    with evict(model, "retention", 32, "global", **options) as session:
        cache = session.new_cache()
        model(prompt(1, 50), past_key_values=cache)
        first = cache.nbytes
        token = prompt(1, 1)
        for step in range(620):
            token = model(token, past_key_values=cache).logits.argmax(-1)
            assert cache.entries <= (32 + buffer) * 6
            most = max(most, cache.nbytes)
            if step % 100 == 99:
                shapes.add(tuple(cache.lengths().flatten().tolist()))
        cache.check()
        report = session.report()
    assert most <= first * (32 + buffer) / 32 * (1 + StorageConfig.slack), "bytes do not grow either"
    assert 620 // (buffer + 1) <= report.evictions - 1 <= 620 // buffer + 1, "one eviction in `buffer` tokens"
    assert report.peak_entries <= max(50, 32 + buffer + 1) * 6
    assert len(shapes) == 6, "the budget is shared out anew between layers and heads"


@pytest.mark.parametrize(
    ("policy", "protection", "entries", "prompt", "later"),
    [
        ("retention", None, 200, (4, 16), (4, 32)),  # a tenth behind the prompt, then up to half
        ("retention", None, 51, (4, 1), (4, 21)),
        ("retention", None, 20, (2, 0), (4, 6)),
        ("retention", Protection(4, 32, 0.25), 51, (4, 8), (4, 8)),
        ("retention", Protection(0, 0), 51, (0, 0), (0, 0)),
        ("snapkv", None, 51, (4, 32), (4, 32)),
        ("snapkv", None, 20, (4, 16), (4, 16)),
        ("snapkv", Protection(4, 8, 0.29, 1.0), 100, (4, 8), (4, 8)),
        ("snapkv", Protection(4, 99, 0.29, 0.5), 100, (4, 25), (4, 46)),
    ],
)
def test_protected_tokens_take_a_share_of_a_heads_entries(policy, protection, entries, prompt, later):
    plan = EvictionPlan(get_policy(policy), Budget(entries), "global", protection=protection)
    assert plan.protected(0, 1000, entries) == prompt
    assert plan.protected(0, 1000, entries, later=True) == later
    given = EvictionPlan(get_policy(policy), Budget(entries), "global", 4, 8, protection=protection)
    assert given.protected(0, 1000, entries) == (4, 8), "given numbers have no share"


@torch.no_grad()
def test_more_is_protected_while_a_text_continues(tiny_llama, gates_for, prompt):
    gates = gates_for(tiny_llama)
    with evict(tiny_llama, "retention", 20, gates=gates, buffer=0) as session:
        cache = session.new_cache()
        seen = 0
        for tokens, recent in ((100, 0), (10, 6), (1, 6)):  # of 20 entries two are protected, later four and six
            session.extend(cache, prompt(1, tokens)[0].tolist())
            seen += tokens
            newest = set(range(seen - recent, seen))
            heads = [head.tolist() for layer in range(len(cache.ragged)) for head in cache.kept(layer)[0]]
            assert all(newest | {0, 1} <= set(head) for head in heads)
            assert recent or any(seen - 1 not in head for head in heads), "nothing recent is protected"
        fork = cache.fork().compress(budget=19)
        heads = [head.tolist() for layer in range(len(fork.ragged)) for head in fork.kept(layer)[0]]
        assert any(not newest <= set(head) for head in heads), "behind a text that has ended"


def test_a_plan_returns_from_json_as_it_was():
    protect = ProtectedTokens.of([(0, 4), (9, 12)])
    own = Protection(2, 6, 0.5)
    policy = get_policy("snapkv", window=16)
    plan = EvictionPlan(policy, Budget("512MiB"), "layer", floor=0.25, protect=protect, protection=own)
    document = json.loads(json.dumps(plan_to_json(plan)))
    assert plan_from_json(document, ()) == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sinks": "4"}, "the plan: got '4' as sinks; accepted: a whole number"),
        ({"budget": True}, "got True as budget; accepted: a number or text"),
        ({"budget": 1.5}, "budget 1.5 is out of range"),
        ({"scope": "row"}, "unknown scope 'row'; known: global"),
        ({"policy": {"name": "snapkv"}}, "policy lacks options; accepted fields: name, options"),
        ({"policy": {"name": "mine", "options": {}}}, "unknown policy 'mine'; known: "),
        ({"protect": {"rows": [[[0, 1, 2]]]}}, r"got a list of 3 as protect.rows\[0\]\[0\]; accepted: a list of 2"),
        ({"protection": {"share": 2}}, "got 2 as protection.share; accepted: a number from 0 to 1"),
        ({"late": 1}, "got unknown fields late; accepted: policy, budget"),
    ],
)
def test_json_that_is_no_plan(changes, message):
    document = plan_to_json(EvictionPlan(get_policy("snapkv"), Budget(0.5), "global"))
    with pytest.raises(ValueError, match=message):
        plan_from_json(document | changes, ())
