"""A case (a context, a question that may follow its compression, accepted answers) and the record of a cell on it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from tenure.checked import Count, NotNegative, Range, Size

from ..retention.calibration import KeptBudget

Label = Annotated[str, Size(1, 200)]  # of a task, policy or scope
Share = Annotated[float, Range(0, 1)]
ALL, ANY = "all", "any"


@dataclass(frozen=True)
class Case:
    """One document with a question that is asked before or after the document's cache is compressed.

    Attributes:
        task, index, seed: its origin; together with the texts and the tokenizer they determine it.
        context_ids: exactly `length` token ids: chat template and document, the user's turn still open.
        question_ids: the question, the end of the user's turn and the start of the assistant's reply.
        answer_ids: the gold continuation.
        question, answer: their texts.
        depth: where the asked fact begins, as a share of the context.
        facts: token ranges `(start, end)` of the planted sentences in the context, the asked one first.
        key: the thing that is asked about.
        answers: texts that must be found in the generation; empty stands for `answer` alone.
        match: "all": the score is the share of `answers` that are found; "any": 1 if one of them is.
        extra_tokens: tokens that generation may take beyond the gold answer's length.
        inputs: further inputs of the model for the context: `pixel_values` and the like of the images in it.
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
    extra_tokens: int = 4
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def length(self) -> int:
        """Tokens of the context."""
        return len(self.context_ids)

    def score(self, text: str) -> float:
        """The share of right answers in the generated `text`, in [0, 1], see `match`."""
        return answer_score(text, self.answers or (self.answer,), self.match)

    def accepts(self, text: str) -> bool:
        """Whether `text` is entirely right: with one answer, whether it contains it."""
        return self.score(text) == 1.0


def answer_score(text: str, answers: Sequence[str], match: str = ALL) -> float:
    """The share of `answers` that `text` contains (RULER's string match), or with "any" 1 if it contains one.

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


@dataclass(frozen=True)
class Record:
    """The measurements of one cell on one case. Annotations are checked where records are read from files.

    Attributes:
        task, length, index, seed, depth: the case.
        policy, scope, budget: the cell, its options and chunks with the policy (`Cell.name`).
        correct: the greedy generation contains the answer, or all of them.
        answer, prediction: the hidden text and the generation.
        kl: KL to the full cache in nats, the mean over all positions of question and gold answer; of a question-aware
            cell over those of the answer, since the question is read before anything is evicted.
        top1: share of these positions where both have the same most likely token.
        entries: cache entries after compression, all layers and heads.
        bytes: bytes allocated for them. If a retention cell is compared too, the entries of every cell carry
            the gates' 4 bytes, since all come from one prompt.
        kept_share: entries as a share of the full cache's.
        seconds: `compress_seconds + read_seconds`, the same work for every cell without chunks.
        compress_seconds: scoring, choosing and moving what stays; of a context read in chunks, reading it too.
        read_seconds: forwards over the question and the gold answer; of cells that were asked together, a cell's part.
        score: the share of the answers that the generation contains, in [0, 1].
        aware: whether the question was read before the compression.
    """

    task: Label
    length: Count
    index: Annotated[int, Range(0)]
    seed: int
    depth: Share
    policy: Label
    scope: Label
    budget: KeptBudget
    correct: bool
    answer: str
    prediction: str
    kl: float
    top1: Share
    entries: Annotated[int, Range(0)]
    bytes: Annotated[int, Range(0)]
    kept_share: NotNegative
    seconds: NotNegative
    compress_seconds: NotNegative
    read_seconds: NotNegative
    score: Share = 0.0
    aware: bool = False

    @property
    def finite(self) -> bool:
        """Whether the record's numbers can be written and averaged."""
        return all(math.isfinite(value) for value in (self.kl, self.top1, self.score))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
