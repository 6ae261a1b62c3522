"""Where calibration cases come from, and what their losses are."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tenure.eval import CaseBuilder, Cell, draw_cases, evaluate, long_enough, losses_of, tasks_of
from tenure.eval.prompts import encode

TASKS = ["needle", "phrase"]


def ships(tokenizer, case) -> set[str]:
    """The numbers of the ships that the document speaks of: each text has its own."""
    words = tokenizer.decode(list(case.context_ids)).split()
    return {after for word, after in pairwise(words) if word == "ship"}


def test_texts_take_turns_and_documents_stay_within_theirs(tokenizer, texts):
    drawn = list(draw_cases(tokenizer, texts, 7, [400], TASKS, seed=0))
    numbers = [number for number, _ in drawn]
    assert sorted(numbers[:3]) == sorted(numbers[3:6]) == [0, 1, 2] and numbers[6] == numbers[0]
    for number, case in drawn:
        assert case.length == 400
        assert ships(tokenizer, case) == {str(number)}
    assert {case.task for _, case in drawn} == set(TASKS)
    assert len({case.context_ids for _, case in drawn}) == 7
    assert len({round(case.depth, 3) for _, case in drawn}) > 4


def test_the_seed_decides_and_a_longer_run_begins_like_a_short_one(tokenizer, texts):
    first = list(draw_cases(tokenizer, texts, 4, [400, 450], TASKS, seed=1))
    assert first == list(draw_cases(tokenizer, texts, 6, [400, 450], TASKS, seed=1))[:4]
    assert first != list(draw_cases(tokenizer, texts, 4, [400, 450], TASKS, seed=2))
    assert {case.length for _, case in draw_cases(tokenizer, texts, 12, [400, 450], TASKS, seed=1)} == {400, 450}


def test_no_texts(tokenizer):
    with pytest.raises(ValueError, match="no text to draw documents from"):
        next(draw_cases(tokenizer, [], 1, [400], TASKS, seed=0))


def test_short_texts_are_left_out(tokenizer, texts):
    tokens = len(encode(tokenizer, texts[1], plain=True))
    mixed = ["Too short.", texts[1]]
    assert long_enough(tokenizer, mixed, tokens) == [1] and long_enough(tokenizer, mixed, tokens + 1) == []


@pytest.mark.parametrize(
    ("loss", "tasks"), [("kl", ("needle", "date")), ("answers", ("needle", "date")), ("phrase", ("phrase",))]
)
def test_a_loss_names_its_tasks(loss, tasks):
    assert tasks_of(loss, ["needle", "date"]) == tasks


def test_unknown_losses_and_tasks():
    with pytest.raises(ValueError, match="unknown loss 'perplexity'; known: kl, answers, needle, phrase"):
        tasks_of("perplexity", ["needle"])
    with pytest.raises(ValueError, match="unknown task 'needles'"):
        tasks_of("kl", ["needles"])


def test_losses_line_up_with_cases_and_budgets(tiny_model, tokenizer, texts):
    model = tiny_model("llama", vocab_size=512, max_position_embeddings=1024)
    cases = list(CaseBuilder(tokenizer, texts, 400).cases(["needle"], 3))
    cells = [Cell.of("full"), *(Cell.of("knorm", budget) for budget in (0.5, 0.1))]
    records = evaluate(model, tokenizer, cases, cells)
    kl = losses_of(records, [0.5, 0.1], "kl", max_loss=100.0)
    assert kl.shape == (3, 2)
    for index in range(3):
        assert kl[index].tolist() == [record.kl for record in records[3 * index + 1 : 3 * index + 3]]
    middle = float(np.median(kl))
    assert losses_of(records, [0.5, 0.1], "kl", middle).max() == middle
    answers = [[True, True, False], [True, False, True], [False, False, True]]  # full, 50%, 10%
    told = [replace(record, correct=answers[index // 3][index % 3]) for index, record in enumerate(records)]
    assert losses_of(told, [0.5, 0.1], "needle").tolist() == [[0, 1], [1, 0], [0, 0]]
