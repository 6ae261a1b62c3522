"""Units on a tiny model: all cells, and what becomes of those that fail."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tenure.eval import CaseBuilder, Record, evaluate, parse_cells
from tenure.eval.sweep import Failure, Unit, UnitRunner, export_cases
from tenure.eviction import KeyDiff, Knorm
from tenure.scripts.sweep_checks import make_builder

LENGTH = 350
CELLS = parse_cells(["full", "keydiff", "knorm", "streaming_llm"], [0.5, 0.2])
UNIT = Unit("needle", LENGTH, 3, 1)


@pytest.fixture
def runner(tiny_model, tokenizer, texts):
    model = tiny_model("llama", vocab_size=512, max_position_embeddings=1024)
    return UnitRunner(
        model, tokenizer, CELLS, lambda length, seed: CaseBuilder(tokenizer, texts, length, seed), together=3
    )


def without_times(results):
    times = {"seconds": 0.0, "compress_seconds": 0.0, "read_seconds": 0.0}
    return [dataclasses.replace(one, **times) if isinstance(one, Record) else one for one in results]


def failing(message: str):
    def score(self, view):
        raise RuntimeError(message)

    return score


def test_a_unit_is_all_cells_on_one_case(runner, tokenizer, texts):
    results = runner.run(UNIT)
    case = CaseBuilder(tokenizer, texts, LENGTH, 3).case("needle", 1)
    assert without_times(results) == without_times(evaluate(runner.model, tokenizer, [case], CELLS, together=3))
    assert [(one.policy, one.budget) for one in results] == [(cell.name, cell.budget) for cell in CELLS]
    assert {(one.seed, one.index, one.length) for one in results} == {(3, 1, LENGTH)}


def test_cells_that_fail_are_recorded_and_the_rest_is_measured(runner, monkeypatch):
    expected = without_times(runner.run(UNIT))
    monkeypatch.setattr(Knorm, "score", failing("no scores\nand more"))
    monkeypatch.setattr(KeyDiff, "score", failing("neither"))
    results = without_times(runner.run(UNIT))
    assert len(results) == len(CELLS)
    for cell, result, before in zip(CELLS, results, expected, strict=True):
        if cell.policy.name in ("knorm", "keydiff"):
            assert isinstance(result, Failure)
            assert (result.policy, result.budget, result.index) == (cell.name, cell.budget, 1)
            assert result.error in ("RuntimeError: no scores", "RuntimeError: neither")
            assert "raise RuntimeError(message)" in result.traceback
        else:
            assert dataclasses.replace(result, kl=0.0) == dataclasses.replace(before, kl=0.0)
            assert result.kl == pytest.approx(before.kl, abs=1e-6)  # batches of other sizes round in other ways


def test_a_case_that_cannot_be_made_or_read_fails_as_a_whole(runner, monkeypatch):
    (failure,) = runner.run(Unit("needle", 40, 0, 0))
    assert isinstance(failure, Failure) and failure.policy is None
    assert failure.error.startswith("ValueError: a context of 40 tokens is too short")
    reads = []

    def unreadable(*args, **kwargs):
        reads.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner.model, "forward", unreadable)
    (failure,) = runner.run(UNIT)
    assert isinstance(failure, Failure) and failure.name == "needle, 350 tokens, seed 3, case 1"
    assert len(reads) == 2, "the context is not tried again for every cell"
    assert runner.run(UNIT) is not None
    monkeypatch.undo()
    assert all(isinstance(one, Record) for one in runner.run(UNIT))


def test_numbers_that_are_none_are_a_failure(runner, monkeypatch):
    import torch

    nothing = torch.tensor([float("nan")])
    monkeypatch.setattr("tenure.eval.runner.kl_to_full", lambda full, other: nothing.expand(full.shape[:-1]))
    results = runner.run(UNIT)
    assert len(results) == len(CELLS) and all(isinstance(one, Failure) for one in results)
    assert all("not finite: KL nan" in one.error for one in results)


def test_exported_cases_are_those_that_are_run(runner, tokenizer, texts, tmp_path):
    """Another program that follows the lines gets the records' answers."""
    units = [Unit("needle", LENGTH, 0, 0), Unit("phrase", LENGTH, 5, 2)]
    path = tmp_path / "cases" / "all.jsonl"
    assert export_cases(path, units, runner.builder, tokenizer) == 2
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [path.name for path in path.parent.iterdir()] == ["all.jsonl"]
    for unit, line in zip(units, lines, strict=True):
        assert Unit.of(line) == unit
        case = CaseBuilder(tokenizer, texts, unit.length, unit.seed).case(unit.task, unit.index)
        assert tuple(line["context_ids"]) == case.context_ids and tuple(line["answer_ids"]) == case.answer_ids
        assert line["context"] == tokenizer.decode(case.context_ids) and case.question in line["prompt_end"]
        assert line["question"] == case.question and line["answers"] == [case.answer] and line["match"] == "all"
        (record,) = [one for one in runner.run(unit) if isinstance(one, Record) and one.policy == "full"]
        assert tokenizer.decode(_greedy(runner.model, line), skip_special_tokens=True).startswith(record.prediction)


def _greedy(model, line) -> list[int]:
    """Greedy decoding by `generate`, from the line alone."""
    import torch

    prompt = torch.tensor([line["context_ids"] + line["question_ids"]])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=line["max_new_tokens"], do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_both_kinds_of_question_and_sliding_windows(family, tiny_model, tokenizer, texts):
    model = tiny_model(family, vocab_size=512, max_position_embeddings=1024)
    cells = parse_cells(["full", "knorm", "snapkv"], [0.5, 0.2], (False, True))
    runner = UnitRunner(model, tokenizer, cells, lambda length, seed: CaseBuilder(tokenizer, texts, length, seed))
    alone = runner.run(UNIT)
    assert [(one.policy, one.budget, one.aware) for one in alone] == [(c.name, c.budget, c.aware) for c in cells]
    assert all(isinstance(one, Record) for one in alone)
    runner.together = 4
    for one, other in zip(without_times(alone), without_times(runner.run(UNIT)), strict=True):
        assert dataclasses.replace(one, kl=0.0) == dataclasses.replace(other, kl=0.0)


def test_several_kinds_of_text_take_turns(tokenizer):
    kinds = [["Alpha is first. " * 200], ["Beta is second. " * 200]]
    mixed = make_builder(tokenizer, kinds, LENGTH, 3)
    for index, word in enumerate(["Alpha", "Beta", "Alpha"]):
        case = mixed.case("needle", index)
        assert case == CaseBuilder(tokenizer, kinds[index % 2], LENGTH, 3).case("needle", index)
        assert word in tokenizer.decode(case.context_ids)
    assert isinstance(make_builder(tokenizer, kinds[:1], LENGTH, 3), CaseBuilder)
