"""All tasks by name, and their cases for a tokenizer, texts, a length and a seed.

A case is a context, which ends with a document, and a question, which comes later. There are two layouts: the retrieval
tasks of the demo, calibration and the training probe insert tokenised sentences into running text and tell the model
beforehand that a question will follow; the other tasks write their document as text and fit it to the exact length.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..cases import Case
from ..prompts import DocumentFrame, ask, chat_frame, encode, token_spans
from .documents import Draft, SourceTexts, fit
from .memory import AssociativeRecall, Dialogue, Repetition
from .needles import HIDDEN_SENTENCES, RULER_NEEDLES
from .reading import Cloze, TwoHops, Verbatim
from .tracing import CommonWords, FrequentWords, VariableTracking

_GOLDEN = 0.6180339887498949  # steps of the golden ratio spread any number of depths evenly


class TaskGenerator(Protocol):
    """Draws the cases of a task."""

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case.

        Args:
            rng: the only source of randomness.
            source: the texts to take filler from.
            depths: places of the facts as shares of the filler, that of the asked one first; empty where the builder
                inserts the facts itself.
            length: tokens that the document will have.
        """
        ...


@dataclass(frozen=True)
class TaskLayout:
    """The placement of a task's facts.

    Attributes:
        inserted: the builder inserts the draft's evidence into its haystack, token by token; else the draft's document
            holds it and is fitted to the length as text.
        intro: text before the document in the user's turn; empty for none.
        low, high: facts lie between these shares of the document, clear of the tokens that are protected by position.
        most: facts that a fitted document may place, each at a depth of its own.
        spare: an inserted document has at least this many times the tokens of the longest inserted sentence.
    """

    inserted: bool
    intro: str
    low: float
    high: float
    most: int = 8
    spare: int = 4

    def depths(self, shares: Iterable[float]) -> list[float]:
        """Shares of the allowed range as shares of the document."""
        return [self.low + (self.high - self.low) * share for share in shares]


INSERTED = TaskLayout(
    inserted=True, intro="Read the following text and remember it. You will be asked a question about it afterwards.",
    low=0.08, high=0.92,
)  # fmt: skip
FITTED = TaskLayout(inserted=False, intro="", low=0.05, high=0.95)


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: unique among all tasks.
        description: one line about it.
        generator: draws its cases.
        max_gen_toks: tokens that generation may take in lm-eval.
        layout: the placement of its facts.
    """

    name: str
    description: str
    generator: TaskGenerator
    max_gen_toks: int
    layout: TaskLayout = FITTED


TASKS = {
    task.name: task
    for task in (
        Task("needle", "one number stated once", HIDDEN_SENTENCES["needle"], 32, INSERTED),
        Task("phrase", "three words stated once", HIDDEN_SENTENCES["phrase"], 32, INSERTED),
        Task("date", "a day, month and year stated once", HIDDEN_SENTENCES["date"], 32, INSERTED),
        Task("multikey", "one of four sentences that differ in one word", HIDDEN_SENTENCES["multikey"], 32, INSERTED),
        Task("niah_single_1", "a number in repeated noise", RULER_NEEDLES["niah_single_1"], 32),
        Task("niah_single_2", "a number in text", RULER_NEEDLES["niah_single_2"], 32),
        Task("niah_single_3", "a UUID in text", RULER_NEEDLES["niah_single_3"], 64),
        Task("niah_multikey_1", "one of four numbers in text", RULER_NEEDLES["niah_multikey_1"], 32),
        Task("niah_multikey_2", "one number among nothing but others", RULER_NEEDLES["niah_multikey_2"], 32),
        Task("niah_multikey_3", "one UUID among nothing but others", RULER_NEEDLES["niah_multikey_3"], 64),
        Task("niah_multivalue", "four numbers of one key", RULER_NEEDLES["niah_multivalue"], 96),
        Task("niah_multiquery", "the numbers of four keys", RULER_NEEDLES["niah_multiquery"], 96),
        Task("vt", "five variables that get one value from one another", VariableTracking(), 48),
        Task("cwe", "the ten most common words of a list", CommonWords(), 96),
        Task("fwe", "the three most frequent coded words", FrequentWords(), 48),
        Task("qa_1", "the word left out of a sentence of the texts", Cloze(), 24),
        Task("qa_2", "the city in which the person who filed a document keeps papers", TwoHops(), 24),
        Task("dialogue", "a fact stated early in a long conversation", Dialogue(), 24),
        Task("recall", "one of many pairs of key and number", AssociativeRecall(), 24),
        Task("repetition", "the continuation of a passage that was repeated over and over", Repetition(), 32),
        Task("verbatim", "the continuation of a sentence of the text", Verbatim(), 32),
    )
}
RETRIEVAL = tuple(HIDDEN_SENTENCES)
GENERATED = tuple(name for name in TASKS if name not in RETRIEVAL)
RULER = tuple(name for name in GENERATED if name not in ("dialogue", "recall", "repetition", "verbatim"))


def get_task(name: str, among: Sequence[str] = tuple(TASKS)) -> Task:
    """The task called `name`.

    Args:
        among: the names that are accepted.

    Raises:
        ValueError: it is none of them.
    """
    if name not in among:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(among)}")
    return TASKS[name]


@dataclass(frozen=True)
class TextCase:
    """A case as text: lm-eval's input, and the text that the runner's token ids spell.

    Attributes:
        document: the text, of exactly the requested number of tokens.
        draft: the question, the reply and the answers.
    """

    document: str = field(repr=False)
    draft: Draft


class CaseBuilder:
    """Builds cases of any task over the given texts for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer; its chat template is used when it has one.
        texts: the haystack, e.g. held-out essays. Running text is taken from a random place on, and continues with the
            next text where one ends.
        length: tokens of every context, exactly.
        seed: cases are a function of `(seed, task, index)`, the texts, the tokenizer and the length.
        tokens_per_answer: tokens that generation may take beyond the gold answer for each answer after the first.
    Raises:
        ValueError: the texts are empty.
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], length: int, seed: int = 0, tokens_per_answer: int = 8
    ) -> None:
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.tokens_per_answer = tokens_per_answer
        self._source = SourceTexts(texts)
        self._frames: dict[TaskLayout, DocumentFrame] = {}
        self._encoded: dict[str, list[int]] = {}

    def case(self, task: str, index: int) -> Case:
        """Case number `index` of `task`: `length` token ids in the context, the chat frame's included.

        Raises:
            ValueError: an unknown task, or a length that cannot hold its facts or cannot be met exactly.
        """
        chosen = get_task(task)
        frame = self.frame(chosen.layout)
        if chosen.layout.inserted:
            draft, context, spans = self._inserted(chosen, index, frame)
        else:
            made = self.text(task, index, self.length - len(frame.before))
            draft, first = made.draft, len(frame.before)
            context = [*frame.before, *self._encode(made.document)]
            found = token_spans(self.tokenizer, made.document, draft.evidence)
            spans = [(first + start, first + stop) for start, stop in found]
        question_ids, answer_ids = ask(self.tokenizer, frame, draft.question, draft.reply, draft.continuation)
        return Case(
            task=task, index=index, seed=self.seed, context_ids=tuple(context), question_ids=question_ids,
            answer_ids=answer_ids, question=draft.question, answer=draft.continuation,
            depth=spans[0][0] / self.length if spans else 0.0, facts=tuple(spans), key=draft.key,
            answers=() if chosen.layout.inserted else draft.answers, match=draft.match,
            extra_tokens=Case.extra_tokens + self.tokens_per_answer * (len(draft.answers) - 1),
        )  # fmt: skip

    def cases(self, tasks: Sequence[str], count: int) -> Iterator[Case]:
        """`count` cases of each task."""
        for task in tasks:
            for index in range(count):
                yield self.case(task, index)

    def text(self, task: str, index: int, tokens: int | None = None) -> TextCase:
        """Case number `index` of `task` as text, with a document of `tokens` tokens, by default `length`.

        Raises:
            ValueError: an unknown task, one whose sentences are inserted token by token, or a length that cannot hold
                the question's facts or cannot be met exactly.
        """
        chosen = get_task(task)
        if chosen.layout.inserted:
            raise ValueError(f"task {task!r} has cases of token ids only; tasks with texts: {', '.join(GENERATED)}")
        rng = self._rng(task, index)
        others = [rng.random() for _ in range(chosen.layout.most - 1)]
        wanted = self.length if tokens is None else tokens
        depths = chosen.layout.depths([self._share(index), *others])
        draft = chosen.generator.draft(rng, self._source, depths, wanted)
        assert draft.document is not None
        return TextCase(fit(self.tokenizer, draft.document, wanted, task), draft)

    def frame(self, layout: TaskLayout) -> DocumentFrame:
        """The chat frame around the documents of tasks with this layout."""
        if layout not in self._frames:
            self._frames[layout] = chat_frame(self.tokenizer, layout.intro)
        return self._frames[layout]

    def _rng(self, task: str, index: int) -> random.Random:
        return random.Random(f"{self.seed}/{task}/{index}")

    def _share(self, index: int) -> float:
        """Of the asked fact's range: walks evenly over the document with the index, while other facts lie anywhere."""
        return (random.Random(f"{self.seed}/depth").random() + index * _GOLDEN) % 1.0

    def _inserted(self, task: Task, index: int, frame: DocumentFrame) -> tuple[Draft, list[int], list[tuple[int, int]]]:
        """(draft, context, token range of each evidence sentence), the sentences inserted into the haystack."""
        rng = self._rng(task.name, index)
        draft = task.generator.draft(rng, self._source, (), self.length)
        assert draft.haystack is not None
        planted = [self._encode(f" {sentence}") for sentence in draft.evidence]
        room = self.length - len(frame.before) - sum(map(len, planted))
        least = task.layout.spare * max(map(len, planted))
        if room < least:
            raise ValueError(
                f"a context of {self.length} tokens is too short for task {task.name!r}: give at least "
                f"{self.length - room + least}"
            )
        sentences = self._cut(draft.haystack, room)
        depths = task.layout.depths([self._share(index), *(rng.random() for _ in planted[1:])])
        # Each planted sentence stands before the first sentence that starts at or after its depth.
        spans = [(0, 0)] * len(planted)
        waiting = sorted(range(len(planted)), key=lambda number: depths[number])
        context, read = list(frame.before), 0
        for sentence in [*sentences, []]:
            while waiting and (read >= depths[waiting[0]] * room or not sentence):
                number = waiting.pop(0)
                spans[number] = (len(context), len(context) + len(planted[number]))
                context += planted[number]
            context += sentence
            read += len(sentence)
        return draft, context, spans

    def _cut(self, haystack: Iterable[str], tokens: int) -> list[list[int]]:
        """Tokenised sentences of the haystack, the last one cut so that they have exactly `tokens` tokens."""
        sentences: list[list[int]] = []
        for sentence in haystack:
            # The document begins without a space; every other sentence brings its own.
            ids = (self._spaced(sentence) if sentences else self._encode(sentence))[:tokens]
            sentences.append(ids)
            tokens -= len(ids)
            if tokens <= 0:
                break
        return sentences

    def _spaced(self, sentence: str) -> list[int]:
        if sentence not in self._encoded:
            self._encoded[sentence] = self._encode(f" {sentence}")
        return self._encoded[sentence]

    def _encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text, plain=True)


class MixedCaseBuilder:
    """Cases over several kinds of text in turn: case number i is over kind number i mod n.

    Args:
        builders: one for each kind.
    """

    def __init__(self, builders: Sequence[CaseBuilder]) -> None:
        self.builders = builders

    def case(self, task: str, index: int) -> Case:
        """Case number `index` of `task`; ValueError as `CaseBuilder.case`."""
        return self.builders[index % len(self.builders)].case(task, index)
