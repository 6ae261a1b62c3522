"""Documents of an exact number of tokens, made of the sentences, passages and words of given texts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

from ..cases import ALL
from ..prompts import encode

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""Filler whose parts pad a document to its exact length, and the haystack of two of RULER's tasks."""


@dataclass(frozen=True)
class Draft:
    """A case as text whose document can still be made longer.

    Attributes:
        question: asked after the document.
        reply: the beginning of the assistant's answer; the gold answer follows it.
        answers: texts that must be found in the generation.
        key: the thing that the question asks about.
        evidence: verbatim pieces of the document that hold the answer, whatever the filler. With a `haystack`: the
            sentences to be inserted, the asked one first, then distractors.
        document: the text for a number of units of filler, each of which adds tokens; None with a `haystack`.
        haystack: sentences among which the builder inserts `evidence`, token by token; None with a `document`.
        match: see `Case`.
        gold: the gold continuation of `reply`; the answers joined by commas if empty.
    """

    question: str
    reply: str
    answers: tuple[str, ...]
    key: str
    evidence: tuple[str, ...]
    document: Callable[[int], str] | None = None
    haystack: SentenceRun | None = None
    match: str = ALL
    gold: str = ""

    @property
    def continuation(self) -> str:
        """The gold continuation of `reply`."""
        return self.gold or ", ".join(self.answers)


def fit(tokenizer: Any, document: Callable[[int], str], length: int, name: str, tail: int = 200) -> str:
    """The document of exactly `length` tokens: as much filler as there is room for, and a part of `NOISE` at its end.

    Args:
        tokenizer: tokens are counted in the whole text at once, without special tokens.
        document: see `Draft`.
        name: the task's, for messages.
        tail: characters at the document's end within which appended text can change the split into tokens; only they
            are tokenised while a cut is looked for.

    Raises:
        ValueError: the document is longer without any filler, or no end makes up the exact number.
    """
    counted: dict[int, int] = {}

    def tokens(units: int) -> int:
        if units not in counted:
            counted[units] = len(encode(tokenizer, document(units), plain=True))
        return counted[units]

    if tokens(0) > length:
        raise ValueError(f"a context of {length} tokens is too short for task {name!r}: give at least {tokens(0)}")
    units = _most_units(tokens, length)
    text = document(units)
    return _padded(tokenizer, text, length - tokens(units), length, name, tail)


def _most_units(tokens: Callable[[int], int], length: int) -> int:
    """The most units whose tokens do not exceed `length`, by interpolation between numbers that fit and do not."""
    low, high = 0, 1
    while tokens(high) <= length:
        grown = tokens(high) - tokens(0)
        if grown <= 0 and high > 64:
            raise AssertionError("filler adds tokens")
        guess = high * (length - tokens(0)) // max(1, grown) + 1
        low, high = high, min(max(high + 1, guess), 64 * high)
    while high - low > 1:
        share = (length - tokens(low)) / (tokens(high) - tokens(low))
        guess = low + round(share * (high - low))
        middle = min(max(guess, low + 1), high - 1)
        low, high = (middle, high) if tokens(middle) <= length else (low, middle)
    return low


def _padded(tokenizer: Any, text: str, missing: int, length: int, name: str, tail: int) -> str:
    """`text` with `missing` tokens appended, so that it has exactly `length`."""
    if missing == 0:
        return text
    end = text[-tail:]
    base = len(encode(tokenizer, end, plain=True))
    for first in range(len(NOISE)):
        turned = NOISE[first:] + NOISE[:first]
        noise = " " + " ".join(turned * (1 + missing // 4))
        # Only the end of the text is counted while a cut is looked for; the whole text has the last word.
        for cut in range(1, len(noise) + 1):
            added = len(encode(tokenizer, end + noise[:cut], plain=True)) - base
            if added == missing and len(encode(tokenizer, text + noise[:cut], plain=True)) == length:
                return text + noise[:cut]
            if added > missing + 2:
                break
    raise ValueError(f"this tokenizer gives no document of exactly {length} tokens for task {name!r}: change it")


def planted(
    head: str, filler: Callable[[int], Sequence[str]], facts: Sequence[tuple[float, str]], joint: str
) -> Callable[[int], str]:
    """A document of `head`, units of filler, and facts at given depths among them.

    Args:
        head: text before the first unit.
        filler: returns that many first units.
        facts: `(depth, text)`, the depth as a share of the units in [0, 1].
        joint: text between units.
    """
    ordered = sorted(facts, key=lambda fact: fact[0])

    def document(units: int) -> str:
        pieces = list(filler(units))
        filled = len(pieces)
        for depth, fact in reversed(ordered):
            pieces.insert(int(depth * filled), fact)
        return head + joint.join(pieces)

    return document


class SourceTexts:
    """Given texts, cut in the ways that tasks need.

    Args:
        texts: any number of texts, e.g. held-out essays.
        passage_words: a passage is made of consecutive sentences until it has this many words.
        quotable_words: the fewest words of a sentence that is worth quoting.
    Raises:
        ValueError: the texts are empty.
    """

    def __init__(self, texts: Sequence[str], passage_words: int = 45, quotable_words: int = 12) -> None:
        self.passage_words, self.quotable_words = passage_words, quotable_words
        self._texts = [split_sentences(text) for text in texts]
        self.sentences = [sentence for text in self._texts for sentence in text]
        if not self.sentences:
            raise ValueError("the texts to hide facts in are empty")

    @cached_property
    def passages(self) -> list[str]:
        """Consecutive sentences of one text, about `passage_words` words each, none twice."""
        found: dict[str, None] = {}
        for text in self._texts:
            passage: list[str] = []
            for sentence in text:
                passage.append(sentence)
                if sum(len(one.split()) for one in passage) >= self.passage_words:
                    found.setdefault(" ".join(passage))
                    passage = []
        return list(found) or [" ".join(self.sentences)]

    @cached_property
    def words(self) -> list[str]:
        """Lower-case words of 4 to 9 letters of the texts, sorted."""
        return sorted({word for sentence in self.sentences for word in re.findall(r"\b[a-z]{4,9}\b", sentence)})

    def run(self, rng: random.Random) -> SentenceRun:
        """Consecutive sentences from a random place, as many as are asked for."""
        return SentenceRun(self.sentences, rng.randrange(len(self.sentences)))

    def quotable(self, rng: random.Random) -> tuple[str, str]:
        """(passage, sentence of it), drawn at random: at least `quotable_words` words and no quotation mark.

        Raises:
            ValueError: no sentence of the texts is suited.
        """
        order = list(range(len(self.passages)))
        rng.shuffle(order)
        for number in order:
            sentences = split_sentences(self.passages[number])
            chosen = [one for one in sentences if len(one.split()) >= self.quotable_words and not set('"“”') & set(one)]
            if chosen:
                return self.passages[number], rng.choice(chosen)
        raise ValueError(f"the texts have no sentence of {self.quotable_words} words without a quotation to ask about")


class SentenceRun:
    """Consecutive sentences from number `start` on; after the last sentence of the texts the first one follows."""

    def __init__(self, sentences: Sequence[str], start: int) -> None:
        self._sentences, self._start = sentences, start

    def __iter__(self) -> Iterator[str]:
        """The sentences, without end."""
        for number in count(self._start):
            yield self._sentences[number % len(self._sentences)]

    def __call__(self, count: int) -> list[str]:
        """The first `count` sentences."""
        return [self._sentences[(self._start + number) % len(self._sentences)] for number in range(count)]


def split_sentences(text: str) -> list[str]:
    """Sentences of `text` with line breaks and repeated spaces removed; joined by spaces they are the text."""
    flat = " ".join(text.split())
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+(?=[\"'“(\[]?[A-Z0-9])", flat) if sentence]
