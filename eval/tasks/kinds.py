"""The generated tasks by name, and cases of them for a tokenizer, a length and a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cases import EXTRA_TOKENS, Case
from ..prompts import Frame, ask, chat_frame, encode, token_spans
from .draft import Draft, fit
from .memory import dialogue, recall, repetition
from .needles import NIAH
from .reading import cloze, two_hops, verbatim
from .source import Source
from .tracing import common_words, frequent_words, variable_tracking

DEPTHS = (0.05, 0.95)  # facts lie between these shares of the filler
MOST_PLANTED = 8
_GOLDEN = 0.6180339887498949  # steps of the golden ratio spread any number of depths evenly
_EACH_MORE = 8  # tokens that generation may take beyond the gold answer for each answer after the first

Drafting = Callable[[random.Random, Source, Sequence[float], int], Draft]


@dataclass(frozen=True)
class Kind:
    """A generated task: its name, one line about it, its generator, and how long generation may go on in lm-eval."""

    name: str
    description: str
    draft: Drafting
    max_gen_toks: int


KINDS = {
    kind.name: kind
    for kind in (
        Kind("niah_single_1", "a number in repeated noise", NIAH["niah_single_1"].draft, 32),
        Kind("niah_single_2", "a number in text", NIAH["niah_single_2"].draft, 32),
        Kind("niah_single_3", "a UUID in text", NIAH["niah_single_3"].draft, 64),
        Kind("niah_multikey_1", "one of four numbers in text", NIAH["niah_multikey_1"].draft, 32),
        Kind("niah_multikey_2", "one number among nothing but others", NIAH["niah_multikey_2"].draft, 32),
        Kind("niah_multikey_3", "one UUID among nothing but others", NIAH["niah_multikey_3"].draft, 64),
        Kind("niah_multivalue", "four numbers of one key", NIAH["niah_multivalue"].draft, 96),
        Kind("niah_multiquery", "the numbers of four keys", NIAH["niah_multiquery"].draft, 96),
        Kind("vt", "five variables that get one value from one another", variable_tracking, 48),
        Kind("cwe", "the ten most common words of a list", common_words, 96),
        Kind("fwe", "the three most frequent coded words", frequent_words, 48),
        Kind("qa_1", "the word left out of a sentence of the texts", cloze, 24),
        Kind("qa_2", "who filed a document, and where that person keeps papers", two_hops, 24),
        Kind("dialogue", "a fact told early in a long conversation", dialogue, 24),
        Kind("recall", "one of many pairs of key and number", recall, 24),
        Kind("repetition", "how a passage goes on that was repeated over and over", repetition, 32),
        Kind("verbatim", "how a sentence of the text goes on", verbatim, 32),
    )
}
RULER = tuple(name for name in KINDS if name not in ("dialogue", "recall", "repetition", "verbatim"))


def get_kind(name: str) -> Kind:
    """The generated task called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in KINDS:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(KINDS)}")
    return KINDS[name]


@dataclass(frozen=True)
class TextCase:
    """A case as text: what lm-eval gets, and what the runner's token ids spell.

    Attributes:
        document: exactly so many tokens as were asked for.
        draft: the question, the reply and the answers.
    """

    document: str = field(repr=False)
    draft: Draft


@dataclass
class TaskBuilder:
    """Cases of the generated tasks.

    Attributes:
        tokenizer: a transformers tokenizer.
        texts: what documents are made of, e.g. held-out essays.
        length: tokens of a context, exactly.
        seed: cases are a function of `(seed, task, index)`, the texts, the tokenizer and the length.
    """

    tokenizer: Any
    texts: Sequence[str]
    length: int
    seed: int = 0
    _source: Source = field(init=False, repr=False)
    _frame: Frame = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._source = Source(self.texts)
        self._frame = chat_frame(self.tokenizer, "")

    def text(self, task: str, index: int, tokens: int | None = None) -> TextCase:
        """Case number `index` of `task` as text, with a document of `tokens` tokens, by default `length`.

        Raises:
            ValueError: an unknown task, or a length that cannot hold the question's facts or cannot be met exactly.
        """
        kind = get_kind(task)
        rng = random.Random(f"{self.seed}/{task}/{index}")
        low, high = DEPTHS
        # The asked fact's depth walks evenly over the document with the index; the others lie anywhere.
        start = random.Random(f"{self.seed}/depth").random()
        shares = [(start + index * _GOLDEN) % 1.0] + [rng.random() for _ in range(MOST_PLANTED - 1)]
        depths = [low + (high - low) * share for share in shares]
        wanted = self.length if tokens is None else tokens
        draft = kind.draft(rng, self._source, depths, wanted)
        return TextCase(fit(self.tokenizer, draft.document, wanted, task), draft)

    def case(self, task: str, index: int) -> Case:
        """Case number `index` of `task` as token ids: `length` of them in the context, the chat frame's included.

        Raises:
            ValueError: see `text`.
        """
        made = self.text(task, index, self.length - len(self._frame.before))
        draft = made.draft
        before = len(self._frame.before)
        question_ids, answer_ids = ask(self.tokenizer, self._frame, draft.question, draft.reply, draft.continuation)
        document_ids = encode(self.tokenizer, made.document, plain=True)
        spans = [(before + a, before + b) for a, b in token_spans(self.tokenizer, made.document, draft.evidence)]
        depth = spans[0][0] / self.length if spans else 0.0
        return Case(
            task=task, index=index, seed=self.seed, context_ids=self._frame.before + tuple(document_ids),
            question_ids=question_ids, answer_ids=answer_ids, question=draft.question, answer=draft.continuation,
            depth=depth, facts=tuple(spans), key=draft.key, answers=draft.answers, match=draft.match,
            extra_tokens=EXTRA_TOKENS + _EACH_MORE * (len(draft.answers) - 1),
        )  # fmt: skip
