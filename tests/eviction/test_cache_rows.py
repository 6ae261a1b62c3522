"""Forks, rows that move, and tokens taken back."""

from __future__ import annotations

import copy

import pytest
import torch

from tenure.eviction import Random, SnapKV, evict


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("copied", [lambda cache: cache.fork(), copy.deepcopy])
@torch.no_grad()
def test_forks_are_independent(tiny_model, prompt, family, copied):
    model, token = tiny_model(family), prompt(1, 1, seed=2)
    with evict(model, SnapKV(window=4), 0.3, recent=4, buffer=2) as session:
        cache = session.new_cache()
        model(prompt(1, 50), past_key_values=cache)
        expected = model(token, past_key_values=copied(cache)).logits
        fork = copied(cache)
        for column in prompt(1, 9, seed=3)[0]:
            model(column.view(1, 1), past_key_values=fork)  # appends and evicts
        assert torch.equal(model(token, past_key_values=copied(cache)).logits, expected)
        late = copied(cache)
        alone = session.new_cache()
        model(prompt(1, 50), past_key_values=alone)
        for column in prompt(1, 9, seed=4)[0]:
            logits = [model(column.view(1, 1), past_key_values=one).logits for one in (cache, alone)]
            assert torch.equal(*logits), "what the forks did is not seen, not even when evicting"
        assert torch.equal(model(token, past_key_values=late).logits, expected)
        for one in (cache, fork, late):
            one.check()


@torch.no_grad()
def test_a_fork_shares_its_storage_until_it_writes(tiny_llama, prompt):
    with evict(tiny_llama, "knorm", 0.5) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 80), past_key_values=cache)
        fork = cache.fork()

        def shared() -> list[bool]:
            pairs = zip(cache.stores, fork.stores, strict=True)
            return [one.key.data_ptr() == other.key.data_ptr() for one, other in pairs]

        assert all(shared())
        tiny_llama(prompt(1, 1), past_key_values=fork)
        assert not any(shared())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_rows_move_with_everything_they_own(tiny_model, prompt, family):
    model, ids = tiny_model(family), prompt(3, 30)
    mask = torch.ones(3, 31, dtype=torch.long)
    mask[1, :11] = 0
    with evict(model, SnapKV(window=4), 0.4, "layer", recent=4, buffer=1) as session:
        cache = session.new_cache()
        model(ids, attention_mask=mask[:, :30], past_key_values=cache)
        moves = {
            "reorder": ([2, 0, 0], lambda c, rows: c.reorder_cache(rows)),
            "select": ([1], lambda c, rows: c.batch_select_indices(rows)),
            "mask": ([1, 2], lambda c, rows: c.batch_select_indices(torch.tensor([False, True, True]))),
            "repeat": ([0, 0, 1, 1, 2, 2], lambda c, rows: c.batch_repeat_interleave(2)),
        }
        for rows, move in moves.values():
            fork, plain = cache.fork(), cache.fork()
            move(fork, torch.tensor(rows))
            fork.check()
            assert fork.tokens_seen.tolist() == [[30, 19, 30][row] for row in rows]
            tokens, logits, expected = ids[:, :5], [], []
            for i in range(4):
                grown = torch.cat([mask, torch.ones(3, i, dtype=torch.long)], 1)
                step = tokens[:, i : i + 1]
                logits.append(model(step[rows], attention_mask=grown[rows], past_key_values=fork).logits)
                expected.append(model(step, attention_mask=grown, past_key_values=plain).logits[rows])
            fork.check()
            torch.testing.assert_close(torch.stack(logits), torch.stack(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_newest_tokens_can_be_taken_back(tiny_llama, prompt):
    ids, question = prompt(2, 40), prompt(2, 6, seed=1)
    mask = torch.ones(2, 46, dtype=torch.long)
    mask[0, 5:12] = 0
    mask[1, 40:43] = 0  # a shorter question
    with evict(tiny_llama, SnapKV(window=4), 0.4, recent=4, buffer=8) as session:
        cache = session.new_cache()
        tiny_llama(ids, attention_mask=mask[:, :40], past_key_values=cache)
        lengths = cache.lengths()
        first = tiny_llama(question, attention_mask=mask, past_key_values=cache.fork()).logits
        tiny_llama(question, attention_mask=mask, past_key_values=cache)
        cache.crop(-2)
        cache.check()
        assert cache.query_positions.amax(1).tolist() == [36, 40]
        assert cache.tokens_seen.tolist() == [37, 41]
        cache.crop(40)
        cache.check()
        assert torch.equal(cache.lengths(), lengths) and cache.get_seq_length() == 40
        torch.testing.assert_close(tiny_llama(question, attention_mask=mask, past_key_values=cache).logits, first)
        with pytest.raises(ValueError, match="cannot remove 60 of 46 columns"):
            cache.crop(-60)
        with pytest.raises(ValueError, match="were evicted in the meantime"):
            cache.crop(-20)
        cache.check()


@torch.no_grad()
def test_tokens_of_which_something_was_evicted_cannot_be_taken_back(tiny_llama, prompt):
    with evict(tiny_llama, Random(), 0.5, "head", sinks=0, recent=0) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 40), past_key_values=cache)
        tiny_llama(prompt(1, 3), past_key_values=cache)
        cache.crop(-3)
        before = cache.lengths()
        with pytest.raises(ValueError, match="were evicted in the meantime"):
            cache.crop(-4)
        assert torch.equal(cache.lengths(), before) and cache.tokens_seen.tolist() == [40]
        cache.check()
