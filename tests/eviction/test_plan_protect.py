"""Tokens that the user protects: given in every form, never evicted, counted in the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tenure.eviction import evict
from tenure.eviction.protected_tokens import ProtectedTokens

POLICIES = ("retention", "snapkv", "knorm", "streaming_llm", "random")


def places(guard: ProtectedTokens, row: int, tokens: int) -> set[int]:
    table = guard.table([tokens] * (row + 1), torch.device("cpu"))
    return set(table[row].nonzero().squeeze(1).tolist())


def test_forms_that_mean_the_same_are_the_same():
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[2, 3, 4, 8, 9]] = True
    ranges = ProtectedTokens.of([(8, 10), (2, 4), (3, 5), (6, 6)])
    assert ranges == ProtectedTokens.of(mask) == ProtectedTokens.of([[2, 5], [8, 10]]) == ProtectedTokens.of(ranges)
    assert ranges.rows == (((2, 5), (8, 10)),)
    rows = ProtectedTokens.of(torch.stack([mask, ~mask]))
    assert rows.rows == (((2, 5), (8, 10)), ((0, 2), (5, 8), (10, 12))) and not rows.shared
    assert rows.for_rows([1, 1, 0]).rows == (rows.rows[1], rows.rows[1], rows.rows[0])
    assert ProtectedTokens.of([]).rows == ((),)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("system", r"protect is 'system'; give token ranges \[\(start, stop\), …\] or a bool mask"),
        (7, "protect is 7; give token ranges"),
        ([(1, 2, 3)], r"protect is \[\(1, 2, 3\)\]; give token ranges"),
        ([(-1, 4)], r"protect has the range \(-1, 4\): 0 <= start <= stop is needed"),
        (torch.ones(4), r"protect is a torch.float32 tensor of shape \(4,\); give token ranges"),
        (torch.ones(1, 1, 4, dtype=torch.bool), r"shape \(1, 1, 4\)"),
    ],
)
def test_other_forms_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ProtectedTokens.of(given)


spans = st.tuples(st.integers(0, 40), st.integers(0, 8)).map(lambda one: (one[0], one[0] + one[1]))
ranges = st.lists(spans, max_size=5)


@settings(max_examples=300, deadline=None)
@example([(0, 2)], 20, 6, 3, 9)  # two of three sinks are named anyway: three recent ones fit
@given(ranges, st.integers(1, 45), st.integers(0, 45), st.integers(0, 12), st.integers(0, 50))
def test_sinks_then_recents_fill_what_the_protected_leave(given, tokens, share, sinks, recent):
    guard = ProtectedTokens.of(given)
    inside = places(guard, 0, tokens)
    assert inside == {p for start, stop in given for p in range(start, min(stop, tokens))}
    assert guard.count(0, tokens) == len(inside)
    if len(inside) > share:
        with pytest.raises(ValueError, match=f"{len(inside)} of the {tokens} tokens of row 0 are protected, the"):
            guard.limits(0, tokens, share, sinks, recent)
        return
    first, newest = guard.limits(0, tokens, share, sinks, recent)
    assert first <= sinks and newest <= recent

    def kept(first: int, newest: int) -> set[int]:
        return inside | set(range(min(first, tokens))) | set(range(max(0, tokens - newest), tokens))

    assert len(kept(first, newest)) <= share
    if first < min(sinks, tokens):
        assert len(kept(first + 1, 0)) > share, "sinks give way only where they must"
        assert kept(first, newest) == kept(first, 0), "and no recent token is protected then"
    elif kept(first, newest) != kept(first, recent):
        assert len(kept(first, newest + 1)) > share, "recent tokens give way only where they must"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scope", ["global", "layer", "head", "pyramid"])
@torch.no_grad()
def test_protected_tokens_stay_in_every_head_while_others_go(tiny_llama, gates_for, prompt, policy, scope):
    options = {"gates": gates_for(tiny_llama), "sinks": 1, "recent": 2, "buffer": 3, "protect": [(10, 16), (30, 31)]}
    with evict(tiny_llama, policy, 12, scope, **options) as session:
        cache = session.new_cache()
        tiny_llama(prompt(2, 60), past_key_values=cache)
        for step in range(20):
            newest = range(58 + step, 60 + step)
            if step % 4 == 0:
                cache.compress()
                assert cache.entries == 2 * 12 * 6, "they count in the budget"
                for layer in range(3):
                    for row in cache.kept(layer):
                        for kept in row:
                            assert set(kept.tolist()) >= {0, 10, 11, 12, 13, 14, 15, 30, *newest}
            tiny_llama(prompt(2, 1, seed=step), past_key_values=cache)


@torch.no_grad()
def test_a_mask_protects_row_by_row_and_follows_its_rows(tiny_llama, prompt):
    mask, padding = torch.zeros(2, 30, dtype=torch.bool), torch.ones(2, 60, dtype=torch.long)
    mask[0, 20:24] = mask[1, 3:5] = True
    padding[1, :25] = 0
    with evict(tiny_llama, "streaming_llm", 8, sinks=0, recent=0, buffer=0, protect=mask) as session:
        cache = session.new_cache()
        tiny_llama(prompt(2, 60), attention_mask=padding, past_key_values=cache)
        assert cache.kept(0)[0][0].tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
        assert cache.kept(0)[1][0].tolist() == [0, 1, 2, 3, 4, 32, 33, 34], "among the row's real tokens"
        cache.select_rows(torch.tensor([1, 0, 0]))
        grown = torch.cat([padding[[1, 0, 0]], torch.ones(3, 1, dtype=torch.long)], dim=1)
        tiny_llama(prompt(3, 1), attention_mask=grown, past_key_values=cache)
        assert cache.kept(0)[0][0].tolist()[-5:] == [3, 4, 33, 34, 35]
        assert all(cache.kept(0)[row][1].tolist()[4:] == [20, 21, 22, 23] for row in (1, 2))
        with pytest.raises(ValueError, match="protect is a mask for 2 rows, the cache has 3; beams"):
            tiny_llama(prompt(3, 20))


@torch.no_grad()
def test_what_lies_ahead_is_protected_once_it_is_there(tiny_llama, prompt):
    with evict(tiny_llama, "streaming_llm", 10, sinks=0, recent=0, buffer=0, protect=[(28, 33), (500, 600)]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 30), past_key_values=cache)
        for step in range(20):
            tiny_llama(prompt(1, 1, seed=step), past_key_values=cache)
        assert {28, 29, 30, 31, 32} <= set(cache.kept(2)[0][0].tolist())
        assert cache.entries == 60


@torch.no_grad()
def test_protecting_more_than_the_budget_is_refused_before_the_prompt_runs(tiny_llama, prompt):
    ids, ran = prompt(1, 50), []
    hook = tiny_llama.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(True))
    cases: list[dict[str, Any]] = [{"budget": 0.2}, {"budget": 10}, {"budget": "65 entries"}]
    for options in [*cases, {"budget": 0.2, "prefill_chunk": 16}]:
        with (
            evict(tiny_llama, "knorm", protect=[(0, 11)], **options),
            pytest.raises(ValueError, match=r"11 of the 50 tokens of row 0 are .* leaves each head 10"),
        ):
            tiny_llama(ids)
    assert not ran
    with evict(tiny_llama, "knorm", 60, protect=[(0, 50)]):
        tiny_llama(ids)  # nothing has to go
    with evict(tiny_llama, "knorm", 0.2, "pyramid", protect=[(0, 10)]):  # too small a budget for a pyramid: level
        tiny_llama(ids)
    pyramid = evict(tiny_llama, "knorm", 0.5, "pyramid", protect=[(0, 5)])
    with pyramid, pytest.raises(ValueError, match="leaves each head 1:"):
        tiny_llama(ids)  # 25 on average, but the top layer gets 25 / 20
    hook.remove()


@torch.no_grad()
def test_protecting_more_than_a_budget_in_bytes_is_refused_at_the_eviction(tiny_llama, prompt):
    with evict(tiny_llama, "knorm", "5KiB", protect=[(0, 15)]) as session:
        cache = session.new_cache()
        with pytest.raises(ValueError, match=r"15 of the 50 tokens of row 0 are .* leaves each head 11"):
            tiny_llama(prompt(1, 50), past_key_values=cache)
        cache.check()
        assert cache.entries == 50 * 6, "nothing was evicted"


@torch.no_grad()
def test_compress_takes_protection_and_refuses_without_a_change(tiny_llama, prompt):
    with evict(tiny_llama, "full", observe=["knorm"]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(2, 50), past_key_values=cache)
        plan = cache.plan
        with pytest.raises(ValueError, match=r"20 of the 50 tokens of row 0 are .* leaves each head 10"):
            cache.compress("knorm", 10, protect=[(0, 20)])
        with pytest.raises(ValueError, match="a mask for 3 rows, the cache has 2"):
            cache.compress("knorm", 10, protect=torch.zeros(3, 50, dtype=torch.bool))
        assert cache.plan is plan and cache.entries == 2 * 50 * 6
        cache.compress("knorm", 20, "global", protect=[(30, 40)])
        assert all(set(range(30, 40)) <= set(kept.tolist()) for row in cache.kept(1) for kept in row)
        cache.compress(budget=12, sinks=0, recent=0)
        assert all(set(range(30, 40)) <= set(kept.tolist()) for row in cache.kept(1) for kept in row), "still"
        cache.compress(budget=5, protect=[])
        assert cache.entries == 2 * 5 * 6
        cache.check()
