"""Retrieval cases over given text: facts hidden in a document that is compressed before the question is known.

The protocol is RULER's needle family (Hsieh et al. 2024), made question-agnostic: a case is a context, which ends
with the document, and a question, which comes later. As in RULER the assistant's reply is started for the model, so
that a score measures whether the fact survived and not how a small model likes to phrase things.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from .cases import Case
from .prompts import Frame, ask, chat_frame, encode
from .tasks.kinds import KINDS, TaskBuilder
from .tasks.source import split_sentences
from .templates import TASKS, get_task

INTRO = "Read the following text and remember it. You will be asked a question about it afterwards."
DEPTHS = (0.08, 0.92)  # facts lie between these shares of the document, clear of the tokens protected by position
_GOLDEN = 0.6180339887498949  # steps of the golden ratio spread any number of depths evenly


class CaseBuilder:
    """Builds cases of any task, of `templates.TASKS` or `tasks.kinds.KINDS`, over the given texts for one tokenizer.

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
        self._generated = TaskBuilder(tokenizer, texts, length, seed)

    def case(self, task: str, index: int) -> Case:
        """Case number `index` of `task`.

        Raises:
            ValueError: an unknown task, or a length that cannot hold the facts.
        """
        if task in KINDS:
            return self._generated.case(task, index)
        check_task(task)
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
        question_ids, answer_ids = ask(self.tokenizer, self.frame, facts.question, facts.reply, facts.answer)
        return Case(
            task=task, index=index, seed=self.seed, context_ids=tuple(context), question_ids=question_ids,
            answer_ids=answer_ids, question=facts.question, answer=facts.answer, depth=spans[0][0] / self.length,
            facts=tuple(spans), key=facts.key,
        )  # fmt: skip

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


def check_task(name: str) -> None:
    """Raises ValueError unless cases of the task `name` can be built."""
    if name not in TASKS and name not in KINDS:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join((*TASKS, *KINDS))}")
