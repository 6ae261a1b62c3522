"""Tokens taken back: the cache is as if they had never come, whatever its policy accumulates, or it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tenure.eviction import H2O, RaggedCache, SnapKV, evict, policy_names
from tenure.eviction.forward_state import RollbackConfig

from .remembered import assert_same

EVICTING = [name for name in policy_names() if name != "full"]
ACCUMULATING = {"h2o": "the states of 'h2o'", "expected_attention": "the statistics of the queries"}


class Chat:
    """A batch of two rows whose context is padded at the left, and questions to it."""

    def __init__(self, model: Any, prompt: Any) -> None:
        self.model, self.prompt = model, prompt
        self.ids, self.mask = prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
        self.mask[1, :13] = 0

    def context(self, session: Any) -> RaggedCache:
        cache = session.new_cache()
        self.model(self.ids, attention_mask=self.mask, past_key_values=cache)
        return cache

    def ask(self, cache: RaggedCache, seed: int, length: int, answer: int = 20, **options: Any) -> torch.Tensor:
        """The context's question number `seed` and the tokens generated after it."""
        asked = torch.ones(2, length, dtype=torch.long)
        asked[0, : length // 3] = 0  # a shorter question in one row
        whole = torch.cat([self.ids, self.prompt(2, length, seed=seed)], dim=1)
        mask = torch.cat([self.mask, asked], dim=1)
        options |= {"max_new_tokens": answer, "min_new_tokens": answer, "do_sample": False}
        return self.model.generate(whole, attention_mask=mask, past_key_values=cache, **options)


@pytest.mark.parametrize("policy", policy_names())
@torch.no_grad()
def test_a_question_taken_back_leaves_what_a_fresh_fork_has(tiny_llama, gates_for, prompt, policy):
    """Questions of one and more tokens, one with beams; then another question and the next eviction."""
    chat = Chat(tiny_llama, prompt)
    with evict(tiny_llama, policy, 0.5, gates=gates_for(tiny_llama), sinks=2, recent=4, buffer=40) as session:
        cache = chat.context(session)
        fresh, window = cache.fork(), session.window_size
        for seed, length in enumerate((5, 1, 9), start=1):
            chat.ask(cache, seed, length)
            assert cache.columns_seen == 40 + length + 19, "the last token of an answer is not run"
            cache.crop(-(length + 19))
            assert_same(cache, fresh, window=window)
        other = fresh.fork()
        assert torch.equal(chat.ask(cache, 7, 6), chat.ask(other, 7, 6))
        assert_same(cache, other, window=window)
        before = cache.entries
        for one in (cache, other):
            one.compress(budget=9)
        assert policy == "full" or cache.entries < before
        assert_same(cache, other, window=window)


@pytest.mark.parametrize("policy", EVICTING)
@torch.no_grad()
def test_a_question_during_which_something_was_evicted_is_not_taken_back(tiny_llama, gates_for, prompt, policy):
    """Not even if all its own entries are there: the context's are not."""
    chat = Chat(tiny_llama, prompt)
    with evict(tiny_llama, policy, 0.5, gates=gates_for(tiny_llama), sinks=2, recent=32, buffer=8) as session:
        cache = chat.context(session)
        chat.ask(cache, 1, 5)
        as_it_was = cache.fork()
        with pytest.raises(ValueError, match=r"were evicted in the meantime, at \d+ columns: cannot go back to 40;"):
            cache.crop(-24)
        assert_same(cache, as_it_was, window=session.window_size)
        token, mask = prompt(2, 1), torch.cat([chat.mask, torch.ones(2, 25, dtype=torch.long)], 1)
        mask[0, 40:41] = 0
        logits = [tiny_llama(token, attention_mask=mask, past_key_values=one).logits for one in (cache, as_it_was)]
        assert torch.equal(*logits)


@pytest.mark.parametrize("policy", [SnapKV(window=8), "h2o", "expected_attention", "retention_defensive"])
@torch.no_grad()
def test_turns_can_be_taken_back_one_by_one(tiny_llama, gates_for, prompt, policy):
    """From a conversation of three turns to before the third, and from there to the context."""
    chat = Chat(tiny_llama, prompt)
    with evict(tiny_llama, policy, 30, gates=gates_for(tiny_llama), buffer=500) as session:
        cache, window = chat.context(session), session.window_size
        fresh, mask, columns = cache.fork(), chat.mask, [40]
        states = [fresh]
        for turn in range(3):
            mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
            tiny_llama(prompt(2, 5, seed=turn), attention_mask=mask, past_key_values=cache)
            for seed in range(3):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
                tiny_llama(prompt(2, 1, seed=seed), attention_mask=mask, past_key_values=cache)
            columns.append(cache.columns_seen)
            states.append(cache.fork())
        assert columns == [40, 48, 56, 64]
        for turn in (2, 0):
            cache.crop(columns[turn] - cache.columns_seen)
            assert_same(cache, states[turn], window=window)


@torch.no_grad()
def test_rows_that_moved_are_taken_back_as_they_stand(tiny_llama, gates_for, prompt):
    chat, rows = Chat(tiny_llama, prompt), torch.tensor([1, 1, 0])
    with evict(tiny_llama, "h2o", 0.5, buffer=90, observe=["expected_attention", SnapKV(window=8)]) as session:
        cache = chat.context(session)
        fresh = cache.fork()
        chat.ask(cache, 1, 5)
        for one in (cache, fresh):
            one.select_rows(rows)
        cache.select_rows(torch.tensor([2, 0, 1]))
        fresh.select_rows(torch.tensor([2, 0, 1]))
        cache.crop(40 - cache.columns_seen)
        assert_same(cache, fresh, window=8)


@torch.no_grad()
def test_beams_are_taken_back_too(tiny_llama, prompt):
    ids = prompt(1, 40)
    with evict(tiny_llama, "h2o", 0.5, buffer=60, observe=["expected_attention", SnapKV(window=8)]) as session:
        cache = session.new_cache()
        tiny_llama(ids, past_key_values=cache)
        fresh, whole = cache.fork(), torch.cat([ids, prompt(1, 5, seed=1)], dim=1)
        cache.batch_repeat_interleave(3)
        fresh.batch_repeat_interleave(3)
        tiny_llama.generate(whole, past_key_values=cache, num_beams=3, max_new_tokens=12, do_sample=False)
        cache.crop(40 - cache.columns_seen)
        assert_same(cache, fresh, window=8)


@pytest.mark.parametrize("policy", [name for name in policy_names() if name not in ACCUMULATING])
@torch.no_grad()
def test_some_generated_tokens_can_be_taken_back_anywhere(tiny_llama, gates_for, prompt, policy):
    ids, more = prompt(1, 90), prompt(1, 50, seed=1)
    with evict(tiny_llama, policy, 0.5, gates=gates_for(tiny_llama), buffer=90) as session:
        cache = session.new_cache()
        tiny_llama(ids, past_key_values=cache)
        for i in range(7):
            tiny_llama(more[:, i : i + 1], past_key_values=cache)
        shorter = cache.fork()
        for i in range(RollbackConfig.spare_queries):
            tiny_llama(more[:, 7 + i : 8 + i], past_key_values=cache)
        cache.crop(-RollbackConfig.spare_queries)
        assert_same(cache, shorter, window=session.window_size)
        cache.crop(-7)
        assert cache.columns_seen == 90


@torch.no_grad()
def test_where_a_sum_cannot_be_told_apart_the_places_are_named(tiny_llama, prompt):
    ids = prompt(1, 40)
    for policy, message in ACCUMULATING.items():
        with evict(tiny_llama, policy, 0.5, buffer=90) as session:
            cache = session.new_cache()
            tiny_llama(ids, past_key_values=cache)
            tiny_llama(ids[:, :6], past_key_values=cache)
            for i in range(4):
                tiny_llama(ids[:, i : i + 1], past_key_values=cache)
            before = cache.fork()
            with pytest.raises(ValueError, match=rf"cannot go back to 48 columns: {message} .* \(at 40, 46\); go back"):
                cache.crop(-2)
            assert_same(cache, before)
            cache.crop(-4)
            assert cache.columns_seen == 46
    with evict(tiny_llama, SnapKV(window=60), 0.9, buffer=200) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 100), past_key_values=cache)
        for i in range(RollbackConfig.spare_queries + 2):
            tiny_llama(ids[:, :1] + i, past_key_values=cache)
        with pytest.raises(ValueError, match="cannot go back to 101 columns: the window of the last 60 queries can be"):
            cache.crop(-RollbackConfig.spare_queries - 1)
        cache.crop(-RollbackConfig.spare_queries - 2)
        assert cache.columns_seen == 100


@torch.no_grad()
def test_everything_can_be_taken_back_while_nothing_was_evicted(tiny_llama, prompt):
    with evict(tiny_llama, "full", observe=["h2o", "expected_attention", SnapKV(window=8)]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(2, 30), past_key_values=cache)
        cache.crop(-30)
        assert cache.columns_seen == cache.entries == 0
        fresh = session.new_cache()
        for one in (cache, fresh):
            tiny_llama(prompt(1, 20), past_key_values=one)
        assert_same(cache, fresh, window=8)


@torch.no_grad()
def test_marks_are_few_and_cost_no_copies_while_decoding(tiny_llama, prompt):
    with evict(tiny_llama, H2O(), 0.5, buffer=900, observe=[SnapKV(window=8)]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 40), past_key_values=cache)
        for seed in range(9):
            tiny_llama(prompt(1, 3, seed=seed), past_key_values=cache)
            assert len(cache.rollback_points.columns) <= RollbackConfig.max_points
        assert cache.rollback_points.columns == [40, 58, 61, 64], "the context's end, and the newest"
        tiny_llama(prompt(1, 1), past_key_values=cache)
        ring, places = cache.ragged[0].window, cache.rollback_points.columns
        for seed in range(5):
            tiny_llama(prompt(1, 1, seed=seed), past_key_values=cache)
        assert cache.ragged[0].window is ring, "the ring is written in place"
        assert cache.rollback_points.columns == places
        cache.crop(40 - cache.columns_seen)
        assert cache.rollback_points.columns == [40]


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("chunk", [None, 16])
@torch.no_grad()
def test_drafts_count_for_nothing_until_they_are_accepted(tiny_llama, gates_for, prompt, policy, chunk):
    """Rejected drafts leave no trace, through evictions: as if only the accepted tokens had come."""
    options: dict[str, Any] = {"gates": gates_for(tiny_llama), "sinks": 2, "recent": 4, "buffer": 3}
    with evict(tiny_llama, policy, 24, prefill_chunk=chunk, **options) as session:
        drafted, plain = session.new_cache(), session.new_cache()
        drafted.activate_past_recording()
        sizes = [(30, 5), (3, 2), (1, 4), (2, 0), (4, 6), (1, 0), (3, 3)]  # accepted and rejected tokens
        for seed, (accepted, rejected) in enumerate(sizes):
            ids = prompt(1, accepted + rejected, seed=seed)
            tiny_llama(ids, past_key_values=drafted, logits_to_keep=rejected + 1)
            drafted.crop(-rejected)
            if chunk and not seed:  # chunks end where the drafts begin
                plain.begin_input([30])
                for start, stop in ((0, 16), (16, 29), (29, 30)):
                    tiny_llama(ids[:, start:stop], past_key_values=plain)
                plain.end_input(completed=True)
            else:
                tiny_llama(ids[:, :accepted], past_key_values=plain)
            assert drafted.entries <= (24 + 3) * 6
            assert_same(drafted, plain, atol=1e-4, rtol=1e-3, window=session.window_size)
        assert plain.report().evictions > 2


@torch.no_grad()
def test_what_waits_is_done_before_anything_else(tiny_llama, prompt):
    """Without a `crop` after it, a forward was no draft: the next use of the cache evicts."""
    for use in (
        lambda cache: cache.fork(),
        lambda cache: cache.select_rows(torch.tensor([0, 0])),
        lambda cache: tiny_llama(prompt(1, 1), past_key_values=cache),
        lambda cache: cache.activate_past_recording(),
        lambda cache: cache.compress(budget=50),
    ):
        with evict(tiny_llama, "h2o", 12, buffer=2) as session:
            cache = session.new_cache()
            cache.activate_past_recording()
            tiny_llama(prompt(1, 40), past_key_values=cache)
            assert cache.report().evictions == 0
            use(cache)
            assert cache.report().evictions == 1 and cache.entries <= 2 * 13 * 6


@torch.no_grad()
def test_a_draft_that_raises_leaves_no_trace(tiny_llama, prompt):
    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    with evict(tiny_llama, "h2o", 12, buffer=20, observe=["expected_attention", SnapKV(window=8)]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 40), past_key_values=cache)
        fresh = cache.fork()
        cache.activate_past_recording()
        hook = tiny_llama.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            tiny_llama(prompt(1, 4), past_key_values=cache)
        hook.remove()
        assert_same(cache, fresh, window=8)
        tiny_llama(prompt(1, 4), past_key_values=cache)
        cache.crop(-4)
        assert_same(cache, fresh, window=8)
