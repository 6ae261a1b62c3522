"""`Session.extend` equals the calls of the model that it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tenure.eviction import SnapKV, evict

OPTIONS: Any = {"budget": 12, "recent": 4, "sinks": 1, "buffer": 3}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_logits_and_kept_entries_are_those_of_the_model_call(tiny_model, prompt, family, chunk):
    model, ids = tiny_model(family), prompt(2, 40)
    with evict(model, SnapKV(window=4), prefill_chunk=chunk, **OPTIONS) as session:
        cache, other = session.new_cache(), session.new_cache()
        for part in (ids[:, :25], ids[:, 25:26], ids[:, 26:]):
            with torch.no_grad():
                expected = model(part, past_key_values=other, use_cache=True).logits
            got = session.extend(cache, part)
            assert torch.equal(got, expected) and not got.requires_grad
        for one in cache.report().layer_indices:
            assert torch.equal(cache.positions(one), other.positions(one))
        last = session.extend(cache.fork(), ids[:, :5], logits_to_keep=2)
        torch.testing.assert_close(last, session.extend(cache, ids[:, :5])[:, -2:])
        cache.check()


def test_a_sequence_is_read_by_every_row(tiny_llama, prompt):
    ids = prompt(1, 9)
    with evict(tiny_llama, "knorm", **OPTIONS) as session:
        alone = session.new_cache()
        assert session.extend(alone, ids[0].tolist()).shape == (1, 9, 128)
        cache = session.new_cache()
        session.extend(cache, prompt(3, 20))
        rows = cache.fork()
        assert torch.equal(session.extend(rows, ids[0].tolist()), session.extend(cache, ids.expand(3, -1)))
        assert rows.tokens_seen.tolist() == [29] * 3


@pytest.mark.parametrize(("family", "behind"), [("llama", 2), ("qwen3", 2), ("gemma3", 0)])
def test_a_padded_row_is_read_as_if_it_were_alone(tiny_model, prompt, family, behind):
    """Positions are those of its real tokens, whether padding is on the left or behind a shorter question.

    Sliding windows count columns: padding behind a question takes the place of tokens there.
    """
    model, ids, question = tiny_model(family), prompt(2, 30), prompt(2, 6, seed=1)
    mask, asked = torch.ones_like(ids), torch.ones_like(question)
    mask[1, :11], asked[1, 6 - behind :] = 0, 0
    with evict(model, "full") as session:
        cache = session.new_cache()
        context = session.extend(cache, ids, mask)
        answer = session.extend(cache, question, asked)
        last = session.extend(cache, question[:, :1])
        for row, start, stop in ((0, 0, 6), (1, 11, 6 - behind)):
            alone = session.new_cache()
            torch.testing.assert_close(context[row, start:], session.extend(alone, ids[row, start:])[0])
            torch.testing.assert_close(answer[row, :stop], session.extend(alone, question[row, :stop])[0])
            torch.testing.assert_close(last[row], session.extend(alone, question[row, :1])[0])
        assert cache.tokens_seen.tolist() == [37, 26 - behind]


def test_positions_can_be_given(tiny_llama, prompt):
    ids = prompt(1, 10)
    with evict(tiny_llama, "knorm", **OPTIONS) as session:
        shifted = torch.arange(100, 110).unsqueeze(0)
        got = session.extend(session.new_cache(), ids, position_ids=shifted)
        with torch.no_grad():
            expected = tiny_llama(ids, position_ids=shifted, past_key_values=session.new_cache()).logits
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ids": torch.zeros(2, 0)}, r"got ids \(2, 0\); accepted: \(batch, n\) or \(n,\), of at least one token"),
        ({"ids": torch.zeros(1, 2, 3)}, r"got ids \(1, 2, 3\)"),
        ({"ids": [3, 4], "attention_mask": torch.ones(1, 42)}, r"got attention_mask \(1, 42\) for ids \(2, 2\)"),
        ({"ids": torch.tensor([[3]])}, "the cache holds 2 rows, the model got 1"),
    ],
)
def test_other_shapes_are_refused_and_change_nothing(tiny_llama, prompt, given, message):
    with evict(tiny_llama, "knorm", **OPTIONS) as session:
        cache = session.new_cache()
        session.extend(cache, prompt(2, 40))
        with pytest.raises(ValueError, match=message):
            session.extend(cache, **given)
        assert cache.columns_seen == 40
        cache.check()


def test_a_cache_of_another_block_is_refused(tiny_llama, tiny_model, prompt):
    with (
        evict(tiny_llama, "knorm") as session,
        evict(tiny_model("qwen3"), "knorm") as other,
        pytest.raises(ValueError, match=r"belongs to another evict\(\) block"),
    ):
        session.extend(other.new_cache(), prompt(1, 5))
