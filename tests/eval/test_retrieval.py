"""Cases are deterministic, exact in length, answerable, and cut before the question."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from tenure.eval import RETRIEVAL, TASKS, CaseBuilder, get_task
from tenure.eval.prompts import chat_frame, encode, token_texts
from tenure.eval.tasks import words as evaluation_words
from tenure.eval.tasks.documents import SourceTexts, split_sentences

LENGTH = 420


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("task", RETRIEVAL)
@pytest.mark.parametrize("kind", ["tokenizer", "plain_tokenizer"])
def test_every_context_has_the_exact_length_and_holds_the_answer(task, kind, texts, request):
    tokenizer = request.getfixturevalue(kind)
    for length in (LENGTH, LENGTH + 1, 777):
        case = CaseBuilder(tokenizer, texts, length, seed=3).case(task, 5)
        assert len(case.context_ids) == case.length == length
        assert case.answer in text_of(tokenizer, case.context_ids)
        start, end = case.facts[0]
        assert case.answer in text_of(tokenizer, case.context_ids[start:end])
        assert case.depth == start / length


@pytest.mark.parametrize("task", RETRIEVAL)
def test_a_case_is_a_function_of_seed_and_index(task, tokenizer, texts):
    first = CaseBuilder(tokenizer, texts, LENGTH, seed=1)
    again = CaseBuilder(tokenizer, texts, LENGTH, seed=1)
    assert again.case(task, 3) == first.case(task, 3)  # whatever was built before
    assert first.case(task, 4) != first.case(task, 3)
    assert CaseBuilder(tokenizer, texts, LENGTH, seed=2).case(task, 3) != first.case(task, 3)


@pytest.mark.parametrize("task", RETRIEVAL)
def test_nothing_of_the_question_is_in_the_context_and_the_turn_stays_open(task, tokenizer, texts):
    case = CaseBuilder(tokenizer, texts, LENGTH).case(task, 0)
    context, question = text_of(tokenizer, case.context_ids), text_of(tokenizer, case.question_ids)
    assert case.question not in context
    assert context.startswith("<|im_start|>user\n") and "<|im_end|>" not in context
    assert question.startswith(f"\n\n{case.question}<|im_end|>\n<|im_start|>assistant\n")
    assert case.answer not in question
    assert case.accepts(text_of(tokenizer, case.answer_ids))


def test_reply_and_answer_are_split_as_one_text_would_be(tokenizer, texts):
    case = CaseBuilder(tokenizer, texts, LENGTH).case("needle", 0)
    reply = f"The special magic number for {case.key} is {case.answer}."
    assert [*case.question_ids, *case.answer_ids][-len(encode(tokenizer, reply)) :] == encode(tokenizer, reply)


def test_depths_spread_over_the_document(tokenizer, texts):
    builder = CaseBuilder(tokenizer, texts, 900)
    depths = sorted(builder.case("needle", index).depth for index in range(20))
    assert depths[0] < 0.2 and depths[-1] > 0.8
    assert max(b - a for a, b in itertools.pairwise(depths)) < 0.12


def test_distractors_differ_in_key_and_value(tokenizer, texts):
    case = CaseBuilder(tokenizer, texts, LENGTH).case("multikey", 2)
    planted = [text_of(tokenizer, case.context_ids[start:end]) for start, end in case.facts]
    assert len({re.findall(r"\d{5}", sentence)[0] for sentence in planted}) == 4
    assert [case.key in sentence for sentence in planted] == [True, False, False, False]


def test_the_haystack_is_the_given_text(tokenizer, texts):
    case = CaseBuilder(tokenizer, texts, LENGTH).case("needle", 1)
    start, end = case.facts[0]
    before = case.context_ids[len(chat_frame(tokenizer, "").before) : start]
    flat = " ".join(" ".join(texts).split())
    assert text_of(tokenizer, before).split("afterwards.\n\n")[1].strip() in f"{flat} {flat}"
    assert text_of(tokenizer, case.context_ids[end:]).strip() in f"{flat} {flat}"


def test_special_tokens_spelled_in_the_text_stay_text(tokenizer):
    builder = CaseBuilder(tokenizer, ["It ends with <|im_end|> here. " * 200], LENGTH)
    assert tokenizer.eos_token_id not in builder.case("needle", 0).context_ids


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("velvet 12345.", True),
        ("It is 12,345", True),
        ("123456", False),
        ("91234 5", False),
        ("", False),
    ],
)
def test_accepted_numbers(text, accepted, tokenizer, texts):
    case = CaseBuilder(tokenizer, texts, LENGTH).case("needle", 0)
    assert case.accepts(
        text.replace("12345", case.answer).replace("12,345", f"{case.answer[:2]},{case.answer[2:]}")
    ) is (accepted or case.answer in text)


def test_accepted_phrases(tokenizer, texts):
    case = CaseBuilder(tokenizer, texts, LENGTH).case("phrase", 0)
    first, second, third = case.answer.split()
    assert case.accepts(f"\"{first.upper()} {second}\n{third}'.")
    assert not case.accepts(f"{first} {third} {second}")
    assert not case.accepts(f"{first} {second} {third}s")


def test_what_cannot_be_built_is_refused(tokenizer, texts):
    with pytest.raises(ValueError, match=r"100 tokens is too short for task 'needle': give at least \d+"):
        CaseBuilder(tokenizer, texts, 100).case("needle", 0)
    with pytest.raises(ValueError, match="texts to hide facts in are empty"):
        CaseBuilder(tokenizer, ["  \n"], LENGTH)
    with pytest.raises(ValueError, match=r"unknown task 'nedle'; known tasks: needle, phrase"):
        get_task("nedle")


def test_the_shortest_length_named_by_the_refusal_works(tokenizer, texts):
    with pytest.raises(ValueError, match="give at least") as refusal:
        CaseBuilder(tokenizer, texts, 80).case("multikey", 0)
    least = int(str(refusal.value).split()[-1])
    assert CaseBuilder(tokenizer, texts, least).case("multikey", 0).length == least


def test_sentences_join_to_the_text(texts):
    text = 'First, e.g. this.  Second "one"! (Third)\nhas 3.5 lines? "Last" one'
    assert " ".join(split_sentences(text)) == " ".join(text.split())
    assert split_sentences(text)[0] == "First, e.g. this."


def test_token_texts_join_to_the_text(tokenizer):
    text = "Plain words, naïve façade — 漢字 and 🙂.\n\n  Indented."
    ids = encode(tokenizer, text)
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert "" in pieces  # a character of several tokens shows at its last one


def test_training_never_sees_the_evaluation_templates():
    import inspect

    from tenure.training import facts, synthetic
    from tenure.training import templates as training

    source = " ".join(inspect.getsource(module) for module in (training, facts, synthetic))
    source = source.lower().replace(str(training.HELD_OUT).lower(), "")
    source = re.sub(r"held_out = \(.*?\)", "", source)
    words = set(re.findall(r"[a-z]+", source))
    for phrase in evaluation_words.RESERVED_PHRASES:
        assert phrase not in source
    for vocabulary in (
        evaluation_words.CITIES,
        evaluation_words.PEOPLE,
        evaluation_words.GEMS,
        evaluation_words.ADJECTIVES,
        evaluation_words.NOUNS,
    ):
        assert not [word for word in vocabulary if word.lower() in words]


@pytest.mark.parametrize("task", RETRIEVAL)
def test_every_template_has_a_reserved_phrase(task):
    draft = TASKS[task].generator.draft(random.Random(0), SourceTexts(["One sentence."]), (), LENGTH)
    for text in (*draft.evidence, draft.question, draft.reply):
        assert any(phrase in text for phrase in evaluation_words.RESERVED_PHRASES)


@pytest.mark.real
def test_evaluation_essays_are_not_training_essays():
    from tenure.training.assets import essays

    evaluation = {document.text for document in essays("eval")}
    training = {document.text for document in essays("train")}
    assert evaluation and training and not evaluation & training
