"""A context with its turns, the text between them in a model's chat format, and the score of an answer."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cases import ALL, ANY, answer_score
from ..prompts import DocumentFrame, chat_frame

F1, LETTER, NUMBER = "f1", "letter", "number"
MATCHES = (ALL, ANY, F1, LETTER, NUMBER)
_MARKS = tuple(f"\u2063TURN{number}\u2063" for number in range(3))  # no template and no text contains these


@dataclass(frozen=True)
class Turn:
    """A question about the context and the turns before it.

    Attributes:
        question: its text.
        answers: the right answers.
        gold: the answer that the history has in place of the model's own; the answers joined by commas if empty.
        match: see `turn_score`.
        max_new_tokens: of the answer.
        kind: of question, for tables.
    """

    question: str
    answers: tuple[str, ...]
    gold: str = ""
    match: str = ALL
    max_new_tokens: int = 32
    kind: str = ""

    @property
    def written(self) -> str:
        """The gold answer."""
        return self.gold or ", ".join(self.answers)


@dataclass(frozen=True)
class Conversation:
    """A context and the turns that follow it.

    Attributes:
        name: unique in its set (LongMemEval: `question_id`).
        source: the set, with the part of it if there are several.
        context: text that the first user turn begins with; empty where all of it comes in turns.
        turns: at least one.
        images: paths of the pictures, in the order of their first mention.
    """

    name: str
    source: str
    context: str = field(repr=False)
    turns: tuple[Turn, ...] = field(repr=False)
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatSeams:
    """The text around contexts, questions and answers in a model's chat format.

    Attributes:
        frame: before the context, and from the end of a question to the start of the answer.
        between: from the end of an answer to the start of the next question.
    """

    frame: DocumentFrame
    between: str


def chat_seams(tokenizer: Any) -> ChatSeams:
    """The seams of the tokenizer's chat template; of plain paragraphs if it has none."""
    frame = chat_frame(tokenizer, "")
    if not getattr(tokenizer, "chat_template", None):
        return ChatSeams(frame, "\n\n")
    messages = [{"role": ("user", "assistant")[place % 2], "content": mark} for place, mark in enumerate(_MARKS)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return ChatSeams(frame, text.partition(_MARKS[1])[2].partition(_MARKS[2])[0])


def turn_score(text: str, answers: Sequence[str], match: str = ALL) -> float:
    """The score of a generated answer, in [0, 1].

    * "all", "any": the share of answers that the text contains, or whether it contains one, see `answer_score`;
    * "f1": of the words, without case, punctuation and articles, to the nearest answer (SQuAD's measure);
    * "letter": whether the first of the letters A to D that stands alone is the answer's;
    * "number": whether the first whole number is the answer.

    Raises:
        ValueError: no answers, or another match.
    """
    if not answers or match not in MATCHES:
        raise ValueError(f"got {len(answers)} answers and a match of {match!r}; accepted: {', '.join(MATCHES)}")
    if match == F1:
        return max(_f1(_words(text), _words(answer)) for answer in answers)
    if match == LETTER:
        found = re.search(r"(?<![A-Za-z])([A-D])(?![A-Za-z])", text)
        return float(found is not None and found[1] in answers)
    if match == NUMBER:
        found = re.search(r"\d+", text)
        return float(found is not None and found[0] in answers)
    return answer_score(text, answers, match)


def _words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _f1(said: list[str], answer: list[str]) -> float:
    common = sum((Counter(said) & Counter(answer)).values())
    return 2 * common / (len(said) + len(answer)) if common else 0.0
