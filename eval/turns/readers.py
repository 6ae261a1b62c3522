"""Readers of the released files of SCBench, LongMemEval and MMDU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenure.documents import DocumentLimits, json_lines, load_json, plain_line, shown

from ..cases import ALL, ANY
from .conversation import F1, LETTER, NUMBER, Conversation, Turn

LETTERS = "ABCD"
# The released files are up to a gigabyte; a context is one text.
FILE_LIMITS = DocumentLimits(
    json_characters=1 << 31, items=1 << 22, text=1 << 26, values=1 << 26, lines_bytes=1 << 32, line_bytes=1 << 28
)
# SCBench: by the file's name, (text before the context, text around a question, match, tokens of an answer), as in the
# released templates for one context and several queries. Sets without a match here are scored by ROUGE or as code.
SCBENCH: Mapping[str, tuple[str, str, str, int]] = {
    "scbench_kv": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n", "{question}", ALL, 150,
    ),
    "scbench_prefix_suffix": ("", "{question}", ALL, 150),
    "scbench_hashhop": ("", "{question}", ALL, 150),
    "scbench_passkey": (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\n", "{question}", NUMBER, 15,
    ),
    "scbench_vt": ("", "{question}", ALL, 30),
    "scbench_many_shot": ("", "{question}", ANY, 10),
    "scbench_mf": ("", "{question}", NUMBER, 5),
    "scbench_choice_eng": ("Read the book and answer the question.\n\n", "Question: {question}", LETTER, 40),
    "scbench_qa_eng": (
        "Read the book and answer the question. Be very concise in your answer.\n\n", "Question: {question}\nAnswer:",
        ANY, 40,
    ),
}  # fmt: skip
LONGMEMEVAL_TASK = (
    "I will give you several history chats between you and a user. Please answer the question based on the relevant "
    "chat history.\n\n\nHistory Chats:\n\n"
)
LONGMEMEVAL_TOKENS = 500
MMDU_TOKENS = 2048


def read_conversations(path: str | Path, format: str | None = None) -> list[Conversation]:
    """The conversations of a released file.

    Args:
        path: SCBench: `scbench_kv.jsonl` and so on, whose name tells the set; LongMemEval: `longmemeval_s.json`; MMDU:
            `benchmark.json`.
        format: one of `FORMATS`; None: by the file's name.

    Raises:
        ValueError: no such format, a line that is not of it, or a set of SCBench that is scored by ROUGE or as code.
        OSError: the file cannot be read.
    """
    path = Path(path)
    name = format or next((one for one in FORMATS if path.name.startswith(one)), "mmdu" if "mmdu" in str(path) else "")
    if name not in FORMATS:
        raise ValueError(
            f"got {path.name}, whose name tells no format: give one; accepted: {', '.join(FORMATS)} (SCBench's files "
            "keep their names)"
        )
    try:
        return list(FORMATS[name](path))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__} {plain_line(error)}"
        raise ValueError(f"{path.name} is not in the format of {name}: {reason}") from None


def _scbench(path: Path) -> Iterator[Conversation]:
    kind = path.stem
    if kind not in SCBENCH:
        raise ValueError(
            f"got SCBench's {kind!r}, whose answers are scored by ROUGE, as code, or by several measures; accepted: "
            f"{', '.join(SCBENCH)}"
        )
    before, around, match, tokens = SCBENCH[kind]
    for number, (_, given) in enumerate(json_lines(path, FILE_LIMITS)):
        context = given["context"] if "context" in given else given["input"]
        turns = []
        for turn in given["multi_turns"]:
            question = around.format(question=_text(turn["input"]))
            answers = _texts(turn["answer"])
            if match == LETTER:
                options = turn["options"]
                options = list(map(_text, options))
                listed = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, options, strict=True))
                question += f"{listed}\n\nThe correct answer is"
                answers = tuple(answer if answer in LETTERS else LETTERS[options.index(answer)] for answer in answers)
            turns.append(Turn(question, answers, answers[0] if match != ALL else "", match, tokens, kind))
        yield Conversation(f"{kind}/{given.get('id', number)}", kind, before + _text(context), tuple(turns))


def _longmemeval(path: Path) -> Iterator[Conversation]:
    for given in load_json(path, FILE_LIMITS):
        dated = zip(map(_text, given["haystack_dates"]), given["haystack_sessions"], strict=True)
        sessions = sorted(dated, key=lambda one: one[0])
        history = "".join(session_text(place + 1, date, turns) for place, (date, turns) in enumerate(sessions))
        question = f"Current Date: {given['question_date']}\nQuestion: {given['question']}\nAnswer:"
        abstains = str(given["question_id"]).endswith("_abs")
        kind = "abstention" if abstains else _text(given["question_type"])
        turn = Turn(question, _texts(given["answer"]), match=F1 if abstains else ALL, kind=kind,
                    max_new_tokens=LONGMEMEVAL_TOKENS)  # fmt: skip
        yield Conversation(str(given["question_id"]), "longmemeval", LONGMEMEVAL_TASK + history, (turn,))


def session_text(number: int, date: str, turns: Sequence[Mapping[str, Any]]) -> str:
    """A session of LongMemEval's history, in JSON as its authors recommend; the labels of evidence are left out."""
    plain = [{"role": turn["role"], "content": _text(turn["content"])} for turn in turns]
    return f"\n### Session {number}:\nSession Date: {date}\nSession Content:\n\n{json.dumps(plain)}\n"


def _mmdu(path: Path) -> Iterator[Conversation]:
    given = load_json(path, FILE_LIMITS)
    for item in given.values() if isinstance(given, dict) else given:
        said = item["conversations"]
        turns = tuple(
            Turn(question["value"].strip(), (answer["value"],), match=F1, max_new_tokens=MMDU_TOKENS)
            for question, answer in zip(said[::2], said[1::2], strict=True)
        )
        yield Conversation(str(item["id"]), "mmdu", "", turns, tuple(map(_text, item["image"])))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"got {shown(value)}, which is no text")
    return value


def _texts(answer: Any) -> tuple[str, ...]:
    return tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)


FORMATS: Mapping[str, Callable[[Path], Iterator[Conversation]]] = {
    "scbench": _scbench,
    "longmemeval": _longmemeval,
    "mmdu": _mmdu,
}
