"""Conversations on one kept context: readers of small files in the released formats, generators, runner, lm-eval."""

from __future__ import annotations

import json

import pytest
import torch

from tenure.eval import parse_cells
from tenure.eval.harness.turn_tasks import conversations, documents, process_turn
from tenure.eval.prompts import encode
from tenure.eval.turns import (
    FAMILIES,
    Conversation,
    ConversationBuilder,
    Protocol,
    Turn,
    read_conversations,
    run_turns,
    turn_rows,
    turn_score,
)
from tenure.eval.turns.conversation import chat_seams
from tenure.eviction import evict

KV = {
    "id": 7, "context": '{"a1": "b2", "c3": "d4"}',
    "multi_turns": [{"input": 'Key: "c3"\nThe value is:', "answer": "d4"}, {"input": 'Key: "a1"', "answer": "b2"}],
}  # fmt: skip
CHOICE = {"context": "A book.", "multi_turns": [
    {"input": "Who?", "answer": ["Bob", "B"], "options": ["Ann", "Bob", "Cid", "Dan"]},
    {"input": "Where?", "answer": "Dan", "options": ["Ann", "Bob", "Cid", "Dan"]},
]}  # fmt: skip
SAID = [{"role": "user", "content": "I keep bees.", "has_answer": True}, {"role": "assistant", "content": "Fine."}]
MEMORY = {
    "question_id": "q1", "question_type": "single-session-user", "question": "What do I keep?", "answer": "bees",
    "question_date": "2023/05/30 (Tue) 23:40", "haystack_dates": ["2023/05/21 (Sun) 01:00", "2023/05/20 (Sat) 02:21"],
    "haystack_session_ids": ["s2", "s1"], "haystack_sessions": [[{"role": "user", "content": "Hello."}], SAID],
    "answer_session_ids": ["s1"],
}  # fmt: skip
MMDU = {"0": {"id": "0", "image": ["a.jpg", "b.jpg"], "conversations": [
    {"from": "user", "value": "Image1: <ImageHere>. What is it?"}, {"from": "assistant", "value": "A red lamp."},
    {"from": "user", "value": "And here? <ImageHere>"}, {"from": "assistant", "value": "A boat."},
]}}  # fmt: skip


@pytest.fixture
def short(tokenizer, texts):
    return ConversationBuilder(tokenizer, texts, 700, turns=3, seed=2)


def write(folder, name, *lines):
    (folder / name).write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return folder / name


def test_scbench_is_read_by_its_file_names(tmp_path):
    (found,) = read_conversations(write(tmp_path, "scbench_kv.jsonl", KV))
    assert found.name == "scbench_kv/7" and found.context.endswith(KV["context"])
    assert found.context.startswith("Extract the value corresponding")
    assert [(turn.question, turn.answers, turn.match) for turn in found.turns] == [
        ('Key: "c3"\nThe value is:', ("d4",), "all"), ('Key: "a1"', ("b2",), "all"),
    ]  # fmt: skip
    (choice,) = read_conversations(write(tmp_path, "scbench_choice_eng.jsonl", CHOICE))
    assert choice.turns[0].question == (
        "Question: Who?\nA. Ann\nB. Bob\nC. Cid\nD. Dan\n\nThe correct answer is"
    )  # fmt: skip
    assert choice.turns[0].answers == ("B", "B") and choice.turns[1].answers == ("D",)
    assert [turn_score(text, ("B",), "letter") for text in (" B. Bob", "Answer: B", "A or B", "Bob")] == [1, 1, 0, 0]


def test_longmemeval_is_read_in_order_of_time_without_its_labels(tmp_path):
    path = tmp_path / "longmemeval_s.json"
    path.write_text(json.dumps([MEMORY, MEMORY | {"question_id": "q2_abs", "answer": "You did not say."}]))
    found, other = read_conversations(path)
    assert "has_answer" not in found.context
    first, second = found.context.index("I keep bees."), found.context.index("Hello.")
    assert first < second and "### Session 1:\nSession Date: 2023/05/20" in found.context
    (turn,) = found.turns
    assert turn.question == "Current Date: 2023/05/30 (Tue) 23:40\nQuestion: What do I keep?\nAnswer:"
    assert turn.kind == "single-session-user" and other.turns[0].kind == "abstention"


def test_mmdu_is_read_with_its_images(tmp_path):
    (tmp_path / "mmdu.json").write_text(json.dumps(MMDU))
    (found,) = read_conversations(tmp_path / "mmdu.json")
    assert found.images == ("a.jpg", "b.jpg") and found.context == "" and len(found.turns) == 2
    assert found.turns[1].answers == ("A boat.",) and found.turns[1].match == "f1"


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("scbench_summary.jsonl", [KV], "got SCBench's 'scbench_summary', whose answers are scored by ROUGE"),
        ("scbench_kv.jsonl", [{"context": "x"}], "scbench_kv.jsonl is not in the format of scbench: KeyError 'multi"),
        ("scbench_kv.jsonl", ["x"], "is not in the format of scbench: TypeError"),
        ("data.json", [KV], "got data.json, whose name tells no format: give one; accepted: scbench, longmemeval, m"),
        ("longmemeval_s.json", [{}, {}], "longmemeval_s.json is not JSON: Extra data"),
    ],
)
def test_other_files_are_refused(tmp_path, name, lines, message):
    with pytest.raises(ValueError, match=message):
        read_conversations(write(tmp_path, name, *lines))


def test_answers_are_scored_by_their_kind():
    assert turn_score("a red lamp, and a boat", ("The red lamp",), "f1") == pytest.approx(2 * 2 / (4 + 2))
    assert turn_score("", ("x",), "f1") == 0.0
    assert [turn_score(text, ("42",), "number") for text in ("it is 42.", "41 or 42", "none")] == [1, 0, 0]
    assert turn_score("Milan and 42", ("Milan", "7"), "all") == 0.5 == turn_score("7", ("Milan", "7"), "all")
    with pytest.raises(ValueError, match="got 1 answers and a match of 'rouge'; accepted: all, any, f1, letter, num"):
        turn_score("", ("x",), "rouge")


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_conversations_hold_their_answers(family, short, tokenizer):
    for index in range(4):
        made = short.conversation(family, index)
        assert made == short.conversation(family, index) and made != short.conversation(family, index + 1)
        before = made.context
        if family != "album":
            assert len(encode(tokenizer, made.context, plain=True)) == 700
        for turn in made.turns:
            before += turn.question
            assert all(answer in before for answer in turn.answers)
            assert turn_score(turn.written, turn.answers, turn.match) == 1.0
    assert len(made.turns) == (1 if family == "sessions" else 3)  # pyright: ignore[reportPossiblyUnboundVariable]


def test_a_later_session_has_the_newer_value(short):
    made = short.conversation("sessions", 2)
    assert made.turns[0].kind == "knowledge-update"
    (answer,) = made.turns[0].answers
    assert made.context.count("Please remember that") == 2
    assert made.context.rindex("Please remember that") - made.context.index(answer) < 60, "the last statement has it"
    with pytest.raises(ValueError, match="unknown family 'books'; known: kv, sessions, album"):
        short.conversation("books", 0)


def talk(count=3):
    turns = tuple(
        Turn(f"What did crew {number} write?", ("nothing", "else"), max_new_tokens=4) for number in range(count)
    )
    return Conversation("t", "made", "On day 1 the crew of ship 2 wrote down the weather. " * 9, turns)


@pytest.mark.parametrize("questions", ["turns", "shared"])
@torch.no_grad()
def test_the_full_cache_answers_as_the_model_that_reads_everything(questions, model, tokenizer):
    """Greedy decoding by `generate` of the whole text, with the gold answers of the turns before it or without."""
    given, seams = talk(), chat_seams(tokenizer)
    records = run_turns(model, tokenizer, [given], parse_cells(["full"], [1.0]), protocol=Protocol(questions))
    ids = [*seams.frame.before, *encode(tokenizer, given.context, plain=True)]
    for number, (turn, record) in enumerate(zip(given.turns, records, strict=True)):
        opening = "\n\n" if questions == "shared" or number == 0 else ""
        asked = ids + encode(tokenizer, opening + turn.question, plain=True) + encode(tokenizer, seams.frame.after)
        whole = model.generate(torch.tensor([asked]), max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert record.prediction == tokenizer.decode(whole[0, len(asked) :], skip_special_tokens=True)
        assert record.tokens == len(ids) and record.kept_share == 1.0
        if questions == "turns":
            answer = encode(tokenizer, "nothing, else", plain=True)
            ids = [*asked, *answer, *encode(tokenizer, seams.between)]


@torch.no_grad()
def test_a_context_is_compressed_once_or_at_each_turn(model, tokenizer):
    cells = parse_cells(["full", "keydiff", "keydiff+kvpress", "streaming_llm@64"], [0.5])
    once = run_turns(model, tokenizer, [talk()], cells)
    each = run_turns(model, tokenizer, [talk()], cells, protocol=Protocol(compress="each", history="own"))
    assert [record.turn for record in once] == [0, 1, 2] * 4 and once[3].policy == "keydiff"
    heads = 3 * 2  # layers and heads of the tiny model
    for cell in range(1, 4):
        first, *later = once[3 * cell : 3 * cell + 3]
        kept = int(0.5 * first.tokens) * heads
        assert first.entries == kept and [one.entries - kept for one in later] == [
            (one.tokens - first.tokens) * heads for one in later
        ], "what was written is kept"
        assert [one.entries for one in each[3 * cell : 3 * cell + 3]] == [
            int(0.5 * one.tokens) * heads for one in each[3 * cell : 3 * cell + 3]
        ]
    with evict(model, "keydiff", 0.5) as session:
        cache = session.new_cache()
        context = talk().context
        session.extend(cache, [*chat_seams(tokenizer).frame.before, *encode(tokenizer, context, plain=True)])
        assert cache.report().entries == once[3].entries


def test_rows_are_means_over_conversations(model, tokenizer):
    records = run_turns(model, tokenizer, [talk(2), talk(1)], parse_cells(["full", "snapkv(window=8)"], [0.5]))
    rows = turn_rows(records)
    assert [(row["policy"], row["n"]) for row in rows] == [("full", 1), ("snapkv(window=8)", 1)], "one name, one talk"
    by_turn = turn_rows(records, by_turn=True)
    assert [row["turn"] for row in by_turn] == [0, 1, 0, 1]
    assert rows[1]["low"] <= rows[1]["score"] <= rows[1]["high"] and 0.4 < rows[1]["kept_share"] < 0.8


def test_what_has_no_turns_is_refused(model, tokenizer, short):
    with pytest.raises(ValueError, match=r"several questions share a context .* no question-aware cells"):
        run_turns(model, tokenizer, [talk()], parse_cells(["snapkv"], [0.5], [True]))
    pictures = Conversation("0", "mmdu", "", talk().turns, ("a.jpg",))
    with pytest.raises(ValueError, match="conversation 0 of mmdu has 1 images; accepted: conversations of text"):
        run_turns(model, tokenizer, [pictures], parse_cells(["full"], [1.0]))
    with pytest.raises(ValueError, match="questions='shared' have no history"):
        Protocol("shared", compress="each")
    with pytest.raises(ValueError, match="got 0 turns; accepted: 1 or more"):
        ConversationBuilder(tokenizer, ["x."], 100, 0)


def test_lm_eval_has_a_document_a_turn(tokenizer, texts, tmp_path):
    given = {"tokenizer": tokenizer, "texts": texts, "length": 500, "cases": 2, "turns": 3}
    found = conversations("kv", **given)
    made = [one for each in found for one in documents(each)]
    assert len(made) == 6 and made[2]["context"] == found[0].context and made[2]["aware"] is False
    first, second, third = found[0].turns
    assert made[2]["question"] == (
        f"\n\n{first.question}\n{first.written}\n\n{second.question}\n{second.written}\n\n{third.question}"
    )
    album = documents(conversations("album", **given)[0])
    assert album[1]["question"] == f"\n\n{conversations('album', **given)[0].turns[1].question}"
    assert process_turn(made[0], [f"It is {first.answers[0]}."]) == {"accuracy": 1.0}
    path = write(tmp_path, "scbench_kv.jsonl", KV, KV)
    assert len(conversations("scbench", file=str(path), cases=1)) == 1
    with pytest.raises(ValueError, match="tenure_turns_longmemeval reads a released file: give file=PATH"):
        conversations("longmemeval")
    with pytest.raises(ValueError, match="unknown kind of turns 'books'; known: kv, sessions, album, scbench, longm"):
        conversations("books")
