"""Prompts cut into parts and put together again: the cache is the one that was computed."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction import evict
from tenure.eviction.serialization import cache_of_slices, check_sliceable, slice_of

from .remembered import assert_same


@pytest.mark.parametrize("observe", [(), ("retention",)])
@torch.no_grad()
def test_parts_of_two_prompts_make_a_third(any_tiny_model, family, gates_for, prompt, observe):
    model = any_tiny_model
    gates = gates_for(model) if observe else None
    with evict(model, "full", gates=gates, observe=observe) as session:
        if family == "gemma3":
            with pytest.raises(ValueError, match=r"cache layers of the kind Dynamic.*; prompts are cached in slices"):
                check_sliceable(session.recording)
            return
        check_sliceable(session.recording)
        ids = prompt(1, 30)
        other = torch.cat([ids[:, :12], prompt(1, 8, seed=1)], dim=1)
        long, short = session.new_cache(), session.new_cache()
        model(ids, past_key_values=long)
        model(other, past_key_values=short)
        parts = [slice_of(short, 0, 5), slice_of(long, 5, 12), slice_of(long, 12, 30)]
        kept = {name: tensor.clone() for name, tensor in parts[0].items()}
        joined = cache_of_slices(session.recording, parts)
        assert_same(joined, long, atol=1e-5, rtol=1e-5)
        question = prompt(1, 6, seed=2)
        logits = [model(question, past_key_values=cache).logits for cache in (joined, long)]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in parts[0].items()), "parts are copied"
        if observe:
            for cache in (joined, long):
                cache.compress("retention", 0.4)
            assert_same(joined, long, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_row_of_a_padded_stack_is_cut_as_if_it_were_alone(tiny_llama, gates_for, prompt):
    with evict(tiny_llama, "full", gates=gates_for(tiny_llama), observe=["retention"]) as session:
        caches = [session.new_cache(), session.new_cache()]
        for length, cache in zip((30, 17), caches, strict=True):
            tiny_llama(prompt(1, length), past_key_values=cache)
        stacked = session.stack(caches)
        for row, cache in enumerate(caches):
            part, alone = slice_of(stacked, 5, 17, row), slice_of(cache, 5, 17)
            assert part.keys() == alone.keys()
            assert all(torch.equal(tensor, alone[name]) for name, tensor in part.items())
        whole = slice_of(caches[0], 0, 30)
        caches[1].compress("retention", 0.5)
        stacked = session.stack(caches)
        part = slice_of(stacked, 0, 30, 0)
        assert all(torch.equal(part[name], tensor) for name, tensor in whole.items()), "the other row's do not matter"
        with pytest.raises(ValueError, match="has evicted entries"):
            slice_of(stacked, 0, 4, 1)


@torch.no_grad()
def test_what_cannot_be_cut_is_refused(tiny_llama, gates_for, prompt):
    with evict(tiny_llama, "full", gates=gates_for(tiny_llama), observe=["retention"]) as session:
        cache, padded = session.new_cache(), session.new_cache()
        tiny_llama(prompt(1, 60), past_key_values=cache)
        with pytest.raises(ValueError, match=r"got the tokens \[4, 61\); accepted: some of the 60"):
            slice_of(cache, 4, 61)
        part = slice_of(cache, 0, 4)
        cache.compress("retention", 0.7)
        with pytest.raises(ValueError, match="has evicted entries: export it as a whole"):
            slice_of(cache, 0, 4)
        tiny_llama(prompt(2, 9), past_key_values=padded)
        with pytest.raises(ValueError, match="got a cache of 2 rows; accepted: one, or the number of the row"):
            slice_of(padded, 0, 4)
        with pytest.raises(ValueError, match="got row 2; accepted: 0 to 1"):
            slice_of(padded, 0, 4, row=2)
        del part["layers.1.log_beta"]
        with pytest.raises(ValueError, match=r"got 1 slices that differ .* in layers\.1\.log_beta"):
            cache_of_slices(session.recording, [part])
    with (
        evict(tiny_llama, "full", observe=["snapkv", "h2o"]) as session,
        pytest.raises(ValueError, match=r"full, snapkv, h2o need a window of .* queries, the states of 'h2o', which"),
    ):
        check_sliceable(session.recording)
