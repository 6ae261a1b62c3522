"""The generator of retrieval documents: reproducible, of the promised length, and every answer in its document."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from tenure.eval.tasks.words import ADJECTIVES, CITIES, GEMS, NOUNS, PEOPLE, RESERVED_PHRASES
from tenure.training import templates
from tenure.training.corpus import split_sentences
from tenure.training.facts import FACT_KINDS
from tenure.training.synthetic import RetrievalDocument, RetrievalDocuments
from tenure.training.vocabulary import VOCABULARY

FINGERPRINT = """
import importlib.util, hashlib, sys
spec = importlib.util.spec_from_file_location("fixtures", sys.argv[1])
fixtures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)
from tenure.training.synthetic import RetrievalDocuments
tokenizer = fixtures.build_tokenizer(fixtures.CHAT_TEMPLATE)
documents = RetrievalDocuments([fixtures.prose(seed) for seed in range(3)], tokenizer, lengths=(700, 1000), seed=5)
digest = hashlib.sha256()
for index in (40, 3, 11):
    example = documents[index]
    digest.update(repr((example.input_ids, example.loss_mask)).encode())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def documents(texts: list[str], chat_tokenizer: Any) -> RetrievalDocuments:
    return RetrievalDocuments(texts, chat_tokenizer, lengths=(700, 1000), seed=5)


@pytest.fixture(scope="module")
def sample(documents: RetrievalDocuments) -> list[RetrievalDocument]:
    return [documents.document(index) for index in range(150)]


def test_same_index_same_example_in_any_order(documents: RetrievalDocuments, sample: list[RetrievalDocument]) -> None:
    for index in (77, 3, 149, 3):
        assert documents[index] == sample[index].example
    assert sample[0].example != sample[1].example


def test_prompts_are_the_documents_and_change_no_token(
    texts: list[str], chat_tokenizer: Any, sample: list[RetrievalDocument]
) -> None:
    prompts = RetrievalDocuments(texts, chat_tokenizer, lengths=(700, 1000), seed=5, prompt_share=1.0)
    kinds = set()
    for index in range(40):
        document, before = prompts.document(index), sample[index]
        assert document.example.input_ids == before.example.input_ids
        assert before.example.prompt_tokens == 0
        start = document.example.prompt_tokens
        assert not any(document.example.loss_mask[: start + 1]) and any(document.example.loss_mask)
        if document.example.kind == "retrieval":
            assert start == document.document_stop
        kinds.add(document.example.kind)
    assert kinds == {"retrieval", "text"}


def test_seed_changes_every_example(texts: list[str], chat_tokenizer: Any, sample: list[RetrievalDocument]) -> None:
    other = RetrievalDocuments(texts, chat_tokenizer, lengths=(700, 1000), seed=6)
    assert all(other[index].input_ids != sample[index].example.input_ids for index in range(10))


def test_another_process_gives_identical_ids(documents: RetrievalDocuments) -> None:
    digest = hashlib.sha256()
    for index in (40, 3, 11):
        example = documents[index]
        digest.update(repr((example.input_ids, example.loss_mask)).encode())
    fixtures = os.path.join(os.path.dirname(__file__), "conftest.py")
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    command = [sys.executable, "-c", FINGERPRINT, fixtures]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == digest.hexdigest()


def test_lengths_are_reached_and_not_exceeded(sample: list[RetrievalDocument]) -> None:
    targets = {min(target for target in (700, 1000) if len(d.example.input_ids) <= target) for d in sample}
    assert targets == {700, 1000}
    for document in sample:
        size = len(document.example.input_ids)
        target = 700 if size <= 700 else 1000
        assert target * 0.9 <= size <= target
        assert len(document.example.loss_mask) == size


def test_targets_are_the_answers_and_their_end(sample: list[RetrievalDocument], chat_tokenizer: Any) -> None:
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    for document in (d for d in sample if d.example.kind == "retrieval"):
        ids, mask = document.example.input_ids, document.example.loss_mask
        expected = [False] * len(ids)
        for answer in document.answers:
            assert chat_tokenizer.decode(ids[answer.start : answer.stop]) == answer.question.answer
            assert ids[answer.stop] == end
            expected[answer.start : answer.stop + 1] = [True] * (answer.stop + 1 - answer.start)
        assert document.answers and mask == expected


def test_every_value_stands_in_the_document_and_in_the_answer(
    sample: list[RetrievalDocument], chat_tokenizer: Any
) -> None:
    for document in sample:
        text = chat_tokenizer.decode(document.example.input_ids[: document.document_stop])
        for answer in document.answers:
            question = answer.question
            assert question.text not in text
            for value in question.values:
                assert value in text, question
                assert value.strip(" ,") in question.answer, question


def test_whole_conversation_is_what_the_chat_template_renders(
    sample: list[RetrievalDocument], chat_tokenizer: Any
) -> None:
    document = next(d for d in sample if d.example.kind == "retrieval")
    text = chat_tokenizer.decode(document.example.input_ids)
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", text, re.DOTALL)
    messages = [{"role": role, "content": content} for role, content in turns]
    assert [role for role, _ in turns] == ["user", "assistant"] * len(document.answers)
    assert chat_tokenizer.apply_chat_template(messages, tokenize=False) == text
    assert turns[0][1].endswith("\n\n" + document.answers[0].question.text)
    assert [turns[2 * i][1] for i in range(1, len(document.answers))] == [a.question.text for a in document.answers[1:]]


def test_all_kinds_occur_and_groups_are_the_share_asked_for(sample: list[RetrievalDocument]) -> None:
    asked = [answer.question.kind for document in sample for answer in document.answers]
    assert set(asked) == set(FACT_KINDS)
    assert 0.2 < asked.count("group") / len(asked) < 0.4
    plain = [d.example for d in sample if d.example.kind == "text"]
    assert 5 <= len(plain) <= 30


def test_plain_text_has_its_second_half_as_target(
    sample: list[RetrievalDocument], texts: list[str], chat_tokenizer: Any
) -> None:
    document = next(d for d in sample if d.example.kind == "text")
    size = len(document.example.input_ids)
    assert size in (700, 1000) and document.answers == ()
    assert document.example.loss_mask == [position >= size // 2 for position in range(size)]
    beginning = " ".join(chat_tokenizer.decode(document.example.input_ids[:100]).split())
    assert any(beginning in " ".join(text.split()) for text in texts)


def test_facts_stand_at_all_depths(documents: RetrievalDocuments, chat_tokenizer: Any) -> None:
    depths = []
    for index in range(60):
        document = documents.document(index)
        text = chat_tokenizer.decode(document.example.input_ids[: document.document_stop])
        values = [a.question.values[0] for a in document.answers if a.question.kind != "quotation"]
        depths += [text.index(value) / len(text) for value in values]
    counts = [sum(low <= depth < low + 0.25 for depth in depths) for low in (0, 0.25, 0.5, 0.75)]
    assert min(counts) > 0.15 * len(depths)


def test_group_members_differ_in_key_and_value_only(texts: list[str], chat_tokenizer: Any) -> None:
    documents = RetrievalDocuments(texts, chat_tokenizer, kinds=("group",), text_share=0.0, facts=(1, 1))
    document = documents.document(0)
    text = chat_tokenizer.decode(document.example.input_ids[: document.document_stop])
    inserted = [s.strip() for s in split_sentences(text) if s.strip() not in " ".join(" ".join(texts).split())]
    assert 3 <= len(inserted) <= 7  # the chat template's head is glued to the first sentence


def test_dialogues_tell_facts_in_turns(texts: list[str], chat_tokenizer: Any) -> None:
    documents = RetrievalDocuments(
        texts, chat_tokenizer, lengths=(700, 1000), seed=5, text_share=0.0, dialogue_share=1.0, prompt_share=1.0
    )
    for index in range(40):
        document = documents.document(index)
        ids = document.example.input_ids
        text = chat_tokenizer.decode(ids[: document.document_stop])
        speaker = next(one for one, _ in templates.SPEAKERS if f"\n{one}: " in text)
        assert document.answers and 0.9 * 700 <= len(ids) <= 1000
        assert document.example.prompt_tokens == document.document_stop
        for answer in document.answers:
            question = answer.question
            assert question.kind == "told" and speaker in question.text
            told = next(line for line in text.split("\n") if question.values[0] in line)
            assert told.startswith(f"{speaker}: ")
            assert chat_tokenizer.decode(ids[answer.start : answer.stop]) == question.answer


def test_repetitions_are_asked_for_from_any_place(texts: list[str], chat_tokenizer: Any) -> None:
    documents = RetrievalDocuments(
        texts, chat_tokenizer, lengths=(700, 1000), seed=5, text_share=0.0, repetition_share=1.0
    )
    starts = set()
    short = RetrievalDocuments(texts, chat_tokenizer, lengths=(512,), text_share=0.0, repetition_share=1.0)
    for index in range(100):
        document = short.document(index)
        assert len(document.example.input_ids) == 512 and document.document_stop > 200 and document.answers
    for index in range(40):
        document = documents.document(index)
        assert len(document.example.input_ids) in (700, 1000) and document.answers
        text = chat_tokenizer.decode(document.example.input_ids[: document.document_stop])
        for answer in document.answers:
            assert text.count(answer.question.answer) >= 2, answer.question
            assert answer.question.text not in text
            starts.add(text.index(answer.question.answer) * 10 // len(text))
    assert len(starts) > 2


def test_forms_mix_in_the_shares_asked_for(texts: list[str], chat_tokenizer: Any) -> None:
    documents = RetrievalDocuments(
        texts, chat_tokenizer, seed=5, text_share=0.2, dialogue_share=0.25, repetition_share=0.25
    )
    kinds = [{a.question.kind for a in documents.document(index).answers} for index in range(150)]
    told, repeated = (sum(kind in one for one in kinds) for kind in ("told", "repetition"))
    assert 15 <= told <= 45 and 15 <= repeated <= 45
    assert not any({"told", "repetition"} & one and len(one) > 1 for one in kinds)


def test_without_chat_template_plain_lines(texts: list[str], plain_tokenizer: Any) -> None:
    documents = RetrievalDocuments(texts, plain_tokenizer, lengths=(1000,), text_share=0.0)
    document = documents.document(1)
    text = plain_tokenizer.decode(document.example.input_ids)
    expected = "\n\n".join(f"Question: {a.question.text}\nAnswer: {a.question.answer}" for a in document.answers) + "\n"
    assert text.endswith("\n\n" + expected) and text.count("Question: ") == len(document.answers)
    newline = plain_tokenizer("\n")["input_ids"][0]
    for answer in document.answers:
        ids = document.example.input_ids[answer.start : answer.stop + 1]
        assert plain_tokenizer.decode(ids).strip() == answer.question.answer.strip()
        assert newline == document.example.input_ids[answer.stop] or plain_tokenizer.decode(ids).endswith("\n\n")
        assert all(document.example.loss_mask[answer.start : answer.stop + 1])


def test_short_lengths_work_and_shorter_ones_are_refused(texts: list[str], chat_tokenizer: Any) -> None:
    short = RetrievalDocuments(texts, chat_tokenizer, lengths=(256,), kinds=("number", "color"), text_share=0.0)
    for index in range(30):
        document = short.document(index)
        assert document.answers and 0.9 * 256 <= len(document.example.input_ids) <= 256
    with pytest.raises(ValueError, match="at least 128, got"):
        RetrievalDocuments(texts, chat_tokenizer, lengths=(64,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("number", "novel")}, r"unknown kinds of facts \['novel'\]; choose from number"),
        ({"facts": (3, 2)}, "facts must be a range"),
        ({"questions": (0, 2)}, "questions must be a range"),
        ({"fact_share": 0.5}, "at most 0.65 together"),
        ({"dialogue_share": 0.7, "repetition_share": 0.5}, "shares of the documents, at most 1 together"),
        ({"repetition_share": 0.5, "lengths": (128, 512)}, r"lengths of 512 tokens or more, got \[128, 512\]"),
    ],
)
def test_wrong_options_are_named(texts: list[str], chat_tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalDocuments(texts, chat_tokenizer, **options)


def test_empty_texts_are_refused(chat_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="2 texts given, all of them empty"):
        RetrievalDocuments(["", " \n"], chat_tokenizer)


def test_sentences_join_to_the_text() -> None:
    text = 'One sentence. "Two," he said!  Three\nwraps?\n\nA heading\n\nLast' + " word" * 400
    pieces = split_sentences(text)
    assert "".join(pieces) == text
    assert pieces[:5] == ["One sentence.", ' "Two," he said!', "  Three\nwraps?", "\n\nA heading", pieces[4]]
    assert max(map(len, pieces)) < 700


def test_templates_are_many_and_hold_nothing_of_the_evaluation() -> None:
    kinds: dict[str, int] = {}
    for family in templates.FAMILIES:
        kinds[family.kind] = kinds.get(family.kind, 0) + len(family.templates)
    assert len(kinds) >= 12 and min(kinds.values()) >= 4
    assert min(len(templates.ALIASES), len(templates.RECORDS), len(templates.REPEATS)) >= 4
    strings = [part for family in templates.FAMILIES for template in family.templates for part in template]
    strings += [part for row in (*templates.ALIASES, *templates.RECORDS, *templates.REPEATS) for part in row]
    rows = (*templates.FIRST_PERSON, *templates.SPEAKERS, templates.ASIDES, templates.ACKNOWLEDGEMENTS)
    strings += [part for row in rows for part in row]
    strings += [*templates.REPETITION_INTRODUCTIONS, *templates.REPETITION_QUESTIONS]
    strings += [*templates.QUOTATION_QUESTIONS, *templates.INTRODUCTIONS, *templates.BRIEF, *templates.SENTENCE]
    strings += [word for words in VOCABULARY.values() for word in words]
    for held_out in {*templates.HELD_OUT, *RESERVED_PHRASES}:
        assert not [string for string in strings if held_out in string.lower()]
    evaluation = {word.lower() for words in (CITIES, PEOPLE, GEMS, ADJECTIVES, NOUNS) for word in words}
    assert not evaluation & {part for string in strings for part in re.findall(r"\w+", string.lower())}


@pytest.mark.real
def test_real_tokenizer_is_quick_and_exact(real_model_path: str, essay_texts: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model_path)
    documents = RetrievalDocuments(essay_texts, tokenizer, lengths=(1024,), text_share=0.0)
    started = time.perf_counter()
    examples = [documents.document(index) for index in range(40)]
    assert 40 / (time.perf_counter() - started) > 20
    for document in examples:
        assert 0.98 * 1024 <= len(document.example.input_ids) <= 1024
        text = tokenizer.decode(document.example.input_ids)
        head = tokenizer.apply_chat_template([{"role": "user", "content": "X"}], tokenize=False).split("X")[0]
        assert text.startswith(head)


@pytest.mark.real
def test_long_documents_of_the_real_tokenizer(real_model_path: str, essay_texts: list[str]) -> None:
    """Forty of 131,072 tokens, of which 36 could not be made once: their answers are in them, and none is short."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(real_model_path)
    documents = RetrievalDocuments(essay_texts, tokenizer, lengths=(131_072,))
    for index in range(40):
        document = documents.document(index)
        assert 131_000 < len(document.example.input_ids) <= 131_072 and any(document.example.loss_mask)
        text = tokenizer.decode(document.example.input_ids[: document.document_stop])
        assert document.answers or document.example.kind == "text"
        for answer in document.answers:
            shown = tokenizer.decode(document.example.input_ids[answer.start : answer.stop])
            assert shown.strip() == answer.question.answer.strip()
            assert all(value in text for value in answer.question.values)


@pytest.mark.parametrize("shares", [{}, {"repetition_share": 1.0}, {"dialogue_share": 1.0}])
def test_documents_of_128k_tokens(plain_tokenizer: Any, texts: list[str], shares: dict[str, float]) -> None:
    """Passages of more than a thousand sentences, from texts that are repeated as needed."""
    source = RetrievalDocuments(texts, plain_tokenizer, lengths=(131_072,), text_share=0.0, **shares)  # pyright: ignore[reportArgumentType]
    example = source[0]
    assert 0.99 * 131_072 < len(example.input_ids) <= 131_072 and any(example.loss_mask)
