"""Retrieval cases over given text: facts hidden in a document that is compressed before the question is known.

The protocol is RULER's needle family (Hsieh et al. 2024), made question-agnostic: a case is a context, which ends
with the document, and a question, which comes later. As in RULER the assistant's reply is started for the model, so
that a score measures whether the fact survived and not how a small model likes to phrase things.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .prompts import Frame, chat_frame, encode
from .templates import Facts, get_task

INTRO = "Read the following text and remember it. You will be asked a question about it afterwards."
DEPTHS = (0.08, 0.92)  # facts lie between these shares of the document, clear of the tokens protected by position
_GOLDEN = 0.6180339887498949  # steps of the golden ratio spread any number of depths evenly


@dataclass(frozen=True)
class Case:
    """One document with a question that is asked only after the document's cache has been compressed.

    Attributes:
        task, index, seed: what generated it; together with the texts and the tokenizer they determine it.
        context_ids: exactly `length` token ids: chat template and document, the user's turn still open.
        question_ids: the question, the end of the user's turn and the start of the assistant's reply.
        answer_ids: the gold continuation.
        question, answer: their texts.
        depth: where the asked fact begins, as a share of the context.
        facts: token ranges `(start, end)` of the planted sentences in the context, the asked one first.
        key: what is asked about.
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

    @property
    def length(self) -> int:
        """Tokens of the context."""
        return len(self.context_ids)

    def accepts(self, text: str) -> bool:
        """Whether the generated `text` contains the answer (without case, quotes and thousands separators)."""
        return re.search(rf"(?<!\w){re.escape(_normalise(self.answer))}(?!\w)", _normalise(text)) is not None


def _normalise(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.lower())
    return " ".join(re.sub(r"[\"'“”‘’*`]", "", text).split())


class CaseBuilder:
    """Builds cases of any task over the given texts for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer; its chat template is used when it has one.
        texts: the haystack, e.g. held-out essays. A case takes consecutive sentences from a random place and goes
            on with the next text where one ends.
        length: tokens of every context, exactly.
        seed: cases are a function of `(seed, task, index)`.
    Raises:
        ValueError: no text, or a length that cannot hold the frame and the facts.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], length: int, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.length = length
        self.seed = seed
        self.frame: Frame = chat_frame(tokenizer, INTRO)
        self._sentences = [sentence for text in texts for sentence in split_sentences(text)]
        if not self._sentences:
            raise ValueError("the texts to hide facts in are empty")
        self._encoded: dict[int, list[int]] = {}

    def case(self, task: str, index: int) -> Case:
        """Case number `index` of `task`."""
        rng = random.Random(f"{self.seed}/{task}/{index}")
        facts = get_task(task).facts(rng)
        planted = [self._encode(f" {sentence}") for sentence in facts.sentences]
        room = self.length - len(self.frame.before) - sum(map(len, planted))
        if room < 4 * max(map(len, planted)):
            raise ValueError(
                f"a context of {self.length} tokens is too short for task {task!r}: give at least "
                f"{self.length - room + 4 * max(map(len, planted))}"
            )
        haystack = self._haystack(rng, room)
        context, spans = self._insert(haystack, planted, self._depths(rng, index, len(planted)))
        question_ids, answer_ids = self._ask(facts)
        return Case(
            task=task, index=index, seed=self.seed, context_ids=tuple(context), question_ids=question_ids,
            answer_ids=answer_ids, question=facts.question, answer=facts.answer, depth=spans[0][0] / self.length,
            facts=tuple(spans), key=facts.key,
        )

    def cases(self, tasks: Sequence[str], count: int) -> Iterator[Case]:
        """`count` cases of each task."""
        for task in tasks:
            for index in range(count):
                yield self.case(task, index)

    def _haystack(self, rng: random.Random, tokens: int) -> list[list[int]]:
        """Consecutive sentences, the last one cut so that they have exactly `tokens` tokens."""
        position = rng.randrange(len(self._sentences))
        sentences: list[list[int]] = []
        while tokens > 0:
            number = position % len(self._sentences)
            # The document begins without a space; every other sentence brings its own.
            ids = (self._sentence(number) if sentences else self._encode(self._sentences[number]))[:tokens]
            sentences.append(ids)
            tokens -= len(ids)
            position += 1
        return sentences

    def _sentence(self, position: int) -> list[int]:
        if position not in self._encoded:
            self._encoded[position] = self._encode(f" {self._sentences[position]}")
        return self._encoded[position]

    def _encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text, plain=True)

    def _depths(self, rng: random.Random, index: int, count: int) -> list[float]:
        """The asked fact's depth walks evenly over the document with `index`; distractors lie anywhere."""
        low, high = DEPTHS
        start = random.Random(f"{self.seed}/depth").random()
        depths = [(start + index * _GOLDEN) % 1.0] + [rng.random() for _ in range(count - 1)]
        return [low + (high - low) * depth for depth in depths]

    def _insert(
        self, haystack: list[list[int]], planted: list[list[int]], depths: list[float]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Puts each planted sentence before the first sentence that starts at or after its depth."""
        total = sum(map(len, haystack))
        spans = [(0, 0)] * len(planted)
        waiting = sorted(range(len(planted)), key=lambda number: depths[number])
        context, read = list(self.frame.before), 0
        for sentence in [*haystack, []]:
            while waiting and (read >= depths[waiting[0]] * total or not sentence):
                number = waiting.pop(0)
                spans[number] = (len(context), len(context) + len(planted[number]))
                context += planted[number]
            context += sentence
            read += len(sentence)
        return context, spans

    def _ask(self, facts: Facts) -> tuple[tuple[int, ...], tuple[int, ...]]:
        question = self._encode(f"\n\n{facts.question}")
        question += encode(self.tokenizer, self.frame.after)
        # The reply's start and the answer are encoded together, so that they split as the model would write them.
        space = "" if self.frame.after.endswith(("\n", " ")) else " "
        start = self._encode(space + facts.reply)
        whole = self._encode(f"{space}{facts.reply} {facts.answer}.")
        common = 0
        while common < min(len(start), len(whole)) and start[common] == whole[common]:
            common += 1
        return tuple(question + whole[:common]), tuple(whole[common:])


def split_sentences(text: str) -> list[str]:
    """Sentences of `text` with line breaks and repeated spaces removed; joined by spaces they are the text."""
    flat = " ".join(text.split())
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+(?=[\"'“(\[]?[A-Z0-9])", flat) if sentence]
