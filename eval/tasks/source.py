"""What documents are made of: the sentences, passages and words of given texts."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cached_property

PASSAGE_WORDS = 45  # a passage is made of consecutive sentences until it has so many words
MIN_WORDS = 12  # a sentence that is worth quoting


class Source:
    """Given texts, cut in the ways that tasks need.

    Args:
        texts: any number of texts, e.g. held-out essays.
    Raises:
        ValueError: there is no text in them.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = [split_sentences(text) for text in texts]
        self.sentences = [sentence for text in self._texts for sentence in text]
        if not self.sentences:
            raise ValueError("the texts to hide facts in are empty")

    @cached_property
    def passages(self) -> list[str]:
        """Consecutive sentences of one text, about `PASSAGE_WORDS` words each, none twice."""
        found: dict[str, None] = {}
        for text in self._texts:
            passage: list[str] = []
            for sentence in text:
                passage.append(sentence)
                if sum(len(one.split()) for one in passage) >= PASSAGE_WORDS:
                    found.setdefault(" ".join(passage))
                    passage = []
        return list(found) or [" ".join(self.sentences)]

    @cached_property
    def words(self) -> list[str]:
        """Lower-case words of 4 to 9 letters that stand in the texts, sorted."""
        return sorted({word for sentence in self.sentences for word in re.findall(r"\b[a-z]{4,9}\b", sentence)})

    def run(self, rng: random.Random) -> SentenceRun:
        """Consecutive sentences from a random place, as many as are asked for."""
        return SentenceRun(self.sentences, rng.randrange(len(self.sentences)))

    def quotable(self, rng: random.Random) -> tuple[str, str]:
        """(passage, sentence of it): a sentence with at least `MIN_WORDS` words and no quotation mark, drawn at random.

        Raises:
            ValueError: the texts have none.
        """
        order = list(range(len(self.passages)))
        rng.shuffle(order)
        for number in order:
            sentences = split_sentences(self.passages[number])
            chosen = [one for one in sentences if len(one.split()) >= MIN_WORDS and not set('"“”') & set(one)]
            if chosen:
                return self.passages[number], rng.choice(chosen)
        raise ValueError(f"the texts have no sentence of {MIN_WORDS} words without a quotation to ask about")


class SentenceRun:
    """Consecutive sentences that start again at the first text after the last; callable with how many."""

    def __init__(self, sentences: Sequence[str], start: int) -> None:
        self._sentences, self._start = sentences, start

    def __call__(self, count: int) -> list[str]:
        return [self._sentences[(self._start + number) % len(self._sentences)] for number in range(count)]


def split_sentences(text: str) -> list[str]:
    """Sentences of `text` with line breaks and repeated spaces removed; joined by spaces they are the text."""
    flat = " ".join(text.split())
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+(?=[\"'“(\[]?[A-Z0-9])", flat) if sentence]
