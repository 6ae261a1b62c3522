"""Conversations in lm-eval: one document a turn, whose question holds the turns before it with their gold answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..turns.conversation import MATCHES, Conversation, turn_score
from ..turns.generated import FAMILIES, ConversationBuilder
from ..turns.readers import read_conversations
from .generated_tasks import GeneratedCases, source_texts, source_tokenizer

TURNS = "turns_"
FILES = ("scbench", "longmemeval")  # kinds that read a released file; MMDU's has images


def build_turns(kind: str, **given: Any) -> dict[str, Any]:
    """`{"test": Dataset}`, a task's `custom_dataset`, as `generated_tasks.build`.

    Args:
        kind: a family of generated conversations, `scbench` or `longmemeval`.
        given: `pretrained` and the fields of `GeneratedCases`; `cases` counts conversations.

    Raises:
        ValueError: an unknown kind, no file where one is needed, or what `GeneratedCases` and the readers refuse.
    """
    from datasets import Dataset

    return {"test": Dataset.from_list([one for talk in conversations(kind, **given) for one in documents(talk)])}


def conversations(kind: str, **given: Any) -> list[Conversation]:
    """The conversations of a task; ValueError as `build_turns`."""
    settings = GeneratedCases.of(given)
    if kind in FILES:
        if settings.file is None:
            raise ValueError(f"the task tenure_{TURNS}{kind} reads a released file: give file=PATH in --metadata")
        return read_conversations(settings.file, kind)[: settings.cases]
    if kind not in FAMILIES:
        raise ValueError(f"unknown kind of turns {kind!r}; known: {', '.join((*FAMILIES, *FILES))}")
    tokenizer, texts = source_tokenizer(settings.tokenizer), source_texts(settings.texts)
    builder = ConversationBuilder(tokenizer, texts, settings.length, settings.turns, settings.seed)
    return [builder.conversation(kind, index) for index in range(settings.cases)]


def documents(talk: Conversation) -> list[dict[str, Any]]:
    """One document a turn. Without a context, what comes before the last turn is the context."""
    made, before = [], ""
    for number, turn in enumerate(talk.turns):
        asked = f"\n\n{turn.question}"
        context = talk.context or before or "This is a conversation."
        made.append({
            "context": context, "question": before + asked if talk.context else asked, "reply": "", "aware": False,
            "outputs": list(turn.answers), "match": turn.match, "name": talk.name, "turn": number, "kind": turn.kind,
        })  # fmt: skip
        before += f"{asked}\n{turn.written}"
    return made


def process_turn(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`{"accuracy": score}` of the first answer, see `turn_score`.

    Raises:
        ValueError: a document without answers, or with another match.
    """
    if doc.get("match") not in MATCHES or not doc.get("outputs"):
        raise ValueError(f"got a document with match={doc.get('match')!r}; accepted: outputs and {', '.join(MATCHES)}")
    return {"accuracy": turn_score(results[0], doc["outputs"], doc["match"])}
