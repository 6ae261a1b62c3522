"""The generated tasks: exact lengths, reproducible, answerable from their documents, and scored as RULER scores."""

from __future__ import annotations

import re

import pytest

from tenure.eval import GENERATED, RETRIEVAL, RULER, TASKS, CaseBuilder, answer_score, evaluate, get_task, parse_cells
from tenure.eval.prompts import encode, token_spans
from tenure.eval.summary import accuracy_interval
from tenure.eval.tasks.documents import fit
from tenure.eval.tasks.words import ALL_ADJECTIVES, ALL_NOUNS, Keys
from tenure.training import templates as training_templates
from tenure.training.vocabulary import VOCABULARY

ADJECTIVES = "quick brown lazy green small heavy bright quiet early narrow solid plain"
NOUNS = "river garden window mountain letter village market forest engine harbor"
VERBS = "carried painted followed measured repaired described visited counted opened"
LENGTH = 1500  # the tests' tokenizer knows few words, so that a UUID takes many tokens


@pytest.fixture(scope="module")
def many_texts() -> list[str]:
    """Enough words and passages for every task."""
    first, second, third = ADJECTIVES.split(), NOUNS.split(), VERBS.split()
    sentences = []
    for number in range(240):
        a, b = first[number % 12], second[number % 10]
        c, d = third[number % 9], second[(number * 7 + 3) % 10]
        sentences.append(f"In year {1700 + number} a {a} {b} was {c} by people from the {d} near Northtown {number}.")
    return [" ".join(sentences[start : start + 60]) for start in range(0, 240, 60)]


@pytest.fixture(scope="module")
def built(tokenizer, many_texts):
    return CaseBuilder(tokenizer, many_texts, LENGTH)


@pytest.mark.parametrize("task", GENERATED)
def test_a_document_has_exactly_the_length_and_its_evidence(task, built, tokenizer):
    made = built.text(task, 2)
    ids = encode(tokenizer, made.document, plain=True)
    assert len(ids) == LENGTH
    assert all(piece in made.document for piece in made.draft.evidence)
    for start, stop in token_spans(tokenizer, made.document, made.draft.evidence):
        assert 0 <= start < stop <= LENGTH
    case = built.case(task, 2)
    assert case.length == LENGTH and case.task == task
    assert case.accepts(tokenizer.decode(case.answer_ids)), "the gold answer is right"
    assert not case.accepts(case.question) or task == "repetition", "the question does not give the answer away"


def test_spans_are_where_the_evidence_stands(built, tokenizer):
    for task in ("niah_single_2", "niah_multiquery", "recall", "dialogue"):
        case = built.case(task, 1)
        evidence = built.text(task, 1, LENGTH - len(built.frame(TASKS[task].layout).before)).draft.evidence
        for (start, stop), piece in zip(case.facts, evidence, strict=True):
            assert piece in tokenizer.decode(case.context_ids[start:stop])
            assert piece not in tokenizer.decode(case.context_ids[start + 2 : stop])


def test_cases_are_a_function_of_seed_and_index(tokenizer, many_texts):
    first, again = (CaseBuilder(tokenizer, many_texts, 700, seed=1) for _ in range(2))
    other = CaseBuilder(tokenizer, many_texts, 700, seed=2)
    for task in ("niah_multikey_1", "vt", "qa_2", "dialogue"):
        wanted = first.case(task, 3)
        again.case(task, 0)
        assert again.case(task, 3) == wanted
        assert other.case(task, 3).context_ids != wanted.context_ids
        assert first.case(task, 4).context_ids != wanted.context_ids


def test_there_are_the_thirteen_kinds_of_ruler():
    assert len(RULER) == 13 and sum(name.startswith("niah_") for name in RULER) == 8
    assert set(GENERATED) - set(RULER) == {"dialogue", "recall", "repetition", "verbatim"}
    assert {*GENERATED, *RETRIEVAL} == set(TASKS) and len(TASKS) == 21


@pytest.mark.parametrize(
    ("task", "count"), [("niah_multivalue", 4), ("niah_multiquery", 4), ("vt", 5), ("cwe", 10), ("fwe", 3)]
)
def test_tasks_with_several_answers(task, count, built):
    made = built.text(task, 0)
    assert len(made.draft.answers) == count
    if task in ("cwe", "fwe"):  # the answers really are the most frequent
        words = re.findall(r"\b[a-z]{4,9}\b", made.document.split("\n")[-1].partition("words. ")[2] or made.document)
        counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
        least = min(words.count(answer) for answer in made.draft.answers)
        more = [word for number, word in counts if number > least and word not in made.draft.answers]
        assert not set(more) - {"words", "coded"}
    if task == "vt":
        chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", made.document)
        assert [name for name, _ in chain] == list(made.draft.answers)
        assert [source for _, source in chain[1:]] == list(made.draft.answers[:-1])


def test_dialogue_facts_are_told_early(tokenizer, many_texts):
    builder = CaseBuilder(tokenizer, many_texts, 3000)
    depths = [builder.case("dialogue", index).depth for index in range(6)]
    assert max(depths) < 0.4


def test_two_hops_need_both_documents(built):
    made = built.text("qa_2", 1)
    filed, rule = made.draft.evidence
    person = re.search(r"filed by (\w+)", filed)
    assert person is not None and rule.startswith(person[1]) and made.draft.answers[0] in rule
    assert made.document.count(filed) == 1 and person[1] not in made.draft.question


def test_scores():
    assert answer_score("it is 123, and 4567.", ["123", "4567", "89"]) == pytest.approx(2 / 3)
    assert answer_score("It is Paris", ["paris", "London"], "any") == 1.0
    assert answer_score("4567", ["456"]) == 0.0, "not a part of a longer number"
    assert answer_score("1,234", ["1234"]) == 1.0
    for answers, match in (([], "all"), (["a"], "some")):
        with pytest.raises(ValueError, match="expected answers and a match of 'all' or 'any'"):
            answer_score("a", answers, match)


def test_intervals_of_partly_right_answers():
    assert accuracy_interval([1.0, 0.0, 1.0]).low == pytest.approx(0.2077, abs=1e-3)  # Wilson
    partly = accuracy_interval([0.25, 0.5, 0.75, 1.0])
    assert partly.value == 0.625 and 0.25 <= partly.low < 0.625 < partly.high <= 1.0


def test_errors_name_what_is_accepted(tokenizer, many_texts):
    with pytest.raises(ValueError, match="unknown task 'niah'; known tasks: needle, phrase, date, multikey, niah_"):
        get_task("niah")
    with pytest.raises(ValueError, match="100 tokens is too short for task 'niah_multikey_3': give at least"):
        CaseBuilder(tokenizer, many_texts, 100).text("niah_multikey_3", 0)
    with pytest.raises(ValueError, match="texts to hide facts in are empty"):
        CaseBuilder(tokenizer, [""], 500)
    with pytest.raises(ValueError, match="no sentence of 12 words"):
        CaseBuilder(tokenizer, ["Too short. Each one."] * 3, 500).text("qa_1", 0)


def test_every_length_can_be_met(tokenizer):
    line = "The crew wrote down the weather of the day."
    for length in range(100, 160):
        text = fit(tokenizer, lambda units: " ".join(["Start."] + [line] * units), length, "probe")
        assert len(encode(tokenizer, text, plain=True)) == length


def test_the_words_are_not_those_of_training():
    strings = [text for family in training_templates.FAMILIES for row in family.templates for text in row]
    strings += [word for words in VOCABULARY.values() for word in words]
    known = {part for string in strings for part in re.findall(r"\w+", string.lower())}
    assert not {*ALL_ADJECTIVES, *ALL_NOUNS} & known


def test_keys_run_out_loudly():
    import random

    keys = Keys(random.Random(0))
    assert len({keys.letters(1, "ab"), keys.letters(1, "ab")}) == 2
    with pytest.raises(ValueError, match="no more keys that differ"):
        keys.letters(1, "ab")


def test_the_runner_takes_generated_cases_before_and_after_the_question(tiny_model, tokenizer, many_texts):
    model = tiny_model("llama", vocab_size=512, max_position_embeddings=2048)
    cases = list(CaseBuilder(tokenizer, many_texts, 700).cases(["niah_multivalue", "needle"], 1))
    cells = parse_cells(["full", "snapkv"], [0.2], aware=(False, True))
    assert [(cell.name, cell.aware) for cell in cells] == [
        ("full", False), ("full", True), ("snapkv", False), ("snapkv", True),
    ]  # fmt: skip
    records = evaluate(model, tokenizer, cases, cells)
    full, _, agnostic, aware = records[:4]
    assert agnostic.aware is False and aware.aware is True and full.kl == 0.0
    # The budget is a share of what was read: with the question, more.
    asked = len(cases[0].question_ids)
    assert agnostic.entries == int(0.2 * 700) * 6 and aware.entries == int(0.2 * (700 + asked)) * 6
    assert aware.kl != agnostic.kl and 0.0 <= aware.score <= 1.0
