"""A case: a context, a question that may come after its compression, and what counts as an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

EXTRA_TOKENS = 4  # generation may go this far beyond the gold answer's length
ALL, ANY = "all", "any"


@dataclass(frozen=True)
class Case:
    """One document with a question that is asked before or after the document's cache is compressed.

    Attributes:
        task, index, seed: what generated it; together with the texts and the tokenizer they determine it.
        context_ids: exactly `length` token ids: chat template and document, the user's turn still open.
        question_ids: the question, the end of the user's turn and the start of the assistant's reply.
        answer_ids: the gold continuation.
        question, answer: their texts.
        depth: where the asked fact begins, as a share of the context.
        facts: token ranges `(start, end)` of the planted sentences in the context, the asked one first.
        key: what is asked about.
        answers: what must be found in the generated text; empty stands for `answer` alone.
        match: "all": the score is the share of `answers` that are found; "any": 1 if one of them is.
        extra_tokens: generation may go this far beyond the gold answer's length.
    """

    task: str
    index: int
    seed: int
    context_ids: tuple[int, ...] = field(repr=False)
    question_ids: tuple[int, ...] = field(repr=False)
    answer_ids: tuple[int, ...]
    question: str
    answer: str
    depth: float
    facts: tuple[tuple[int, int], ...]
    key: str
    answers: tuple[str, ...] = ()
    match: str = ALL
    extra_tokens: int = EXTRA_TOKENS

    @property
    def length(self) -> int:
        """Tokens of the context."""
        return len(self.context_ids)

    def score(self, text: str) -> float:
        """How right the generated `text` is, in [0, 1], see `match`."""
        return answer_score(text, self.answers or (self.answer,), self.match)

    def accepts(self, text: str) -> bool:
        """Whether `text` is entirely right: with one answer, whether it contains it."""
        return self.score(text) == 1.0


def answer_score(text: str, answers: Sequence[str], match: str = ALL) -> float:
    """The share of `answers` that stand in `text` (RULER's string match), or with "any" 1 if one does.

    Compared without case, quotes and thousands separators; an answer must not be a part of a longer word or number.

    Raises:
        ValueError: no answers, or another match.
    """
    if match not in (ALL, ANY) or not answers:
        raise ValueError(f"expected answers and a match of 'all' or 'any', got {len(answers)} answers and {match!r}")
    said = normalise(text)
    found = [re.search(rf"(?<!\w){re.escape(normalise(answer))}(?!\w)", said) is not None for answer in answers]
    return float(any(found)) if match == ANY else sum(found) / len(found)


def normalise(text: str) -> str:
    """Lower case, without quotes and thousands separators, runs of white space as one space."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.lower())
    return " ".join(re.sub(r"[\"'“”‘’*`]", "", text).split())
