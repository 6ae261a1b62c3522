"""Source texts as tokenised sentences: consecutive ones from a random place, and single ones that fill a gap."""

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

SEPARATOR = "\n\n"
_SENTENCE = re.compile(r"\s*\S(?:.{0,600}?(?:[.!?][\"'”’)\]]*(?=\s|\Z)|(?=\n\s*\n)|\Z)|.{600}\S*)", re.DOTALL)

MOST_TRIED = 1000  # sentences that are tried as the first of a document


@dataclass(frozen=True)
class Sentence:
    text: str
    ids: list[int]


def split_sentences(text: str) -> list[str]:
    """`text` cut after sentences; a piece keeps the white space before it: joined they are `text` again."""
    return _SENTENCE.findall(text.rstrip())


def _unwrap(sentence: str) -> str:
    """One sentence of hard-wrapped text on one line; a paragraph break before it stays."""
    body = " ".join(sentence.split())
    if not sentence[0].isspace():
        return body
    before = sentence[: len(sentence) - len(sentence.lstrip())]
    return (SEPARATOR if before.count("\n") > 1 else " ") + body


class Corpus:
    """Source texts as tokenised sentences, in order, and sorted by length for filling a gap exactly."""

    def __init__(self, sources: Sequence[Sequence[str]], tokenizer: Any):
        self.sources: list[list[Sentence]] = []
        for source in sources:
            ids = tokenizer(list(source), add_special_tokens=False)["input_ids"]
            self.sources.append([Sentence(text, tokens) for text, tokens in zip(source, ids, strict=True) if tokens])
        self.weights = [len(source) for source in self.sources]
        self.by_length = sorted((s for source in self.sources for s in source), key=lambda s: len(s.ids))
        self.lengths = [len(sentence.ids) for sentence in self.by_length]

    def stream(self, rng: random.Random) -> Iterator[Sentence]:
        """Consecutive sentences from a random place on, going over to another random source at the end of one."""
        source = rng.choices(self.sources, self.weights)[0]
        yield from source[rng.randrange(len(source)) :]
        while True:
            yield from rng.choices(self.sources, self.weights)[0]

    def filler(self, room: int, rng: random.Random) -> Sentence | None:
        """A sentence of at most `room` tokens, among the longest there are; None when every one is longer."""
        stop = bisect_right(self.lengths, room)
        if stop == 0:
            return None
        start = bisect_left(self.lengths, self.lengths[stop - 1] - 2)
        return self.by_length[rng.randrange(start, stop)]


def both_layouts(texts: Sequence[str], tokenizer: Any) -> tuple[Corpus, Corpus]:
    """The texts as they are, and with every sentence on one line; texts follow each other after an empty line.

    Raises:
        ValueError: no text, or empty ones only.
    """
    wrapped = [split_sentences(SEPARATOR + text.lstrip()) for text in texts if text.strip()]
    if not wrapped:
        raise ValueError(f"no text to make documents from: {len(texts)} texts given, all of them empty")
    unwrapped = [[_unwrap(sentence) for sentence in source] for source in wrapped]
    return Corpus(wrapped, tokenizer), Corpus(unwrapped, tokenizer)


def opening(
    stream: Iterator[Sentence], room: float, encode: Callable[[str], list[int]]
) -> tuple[list[Sentence], Iterator[Sentence]]:
    """The first sentences, `room` tokens at most, and the stream of those after them.

    Raises:
        ValueError: no sentence is that short.
    """
    sentences: list[Sentence] = []
    tried = 0
    for sentence in stream:
        if not sentences:
            text = sentence.text.lstrip()
            sentence = Sentence(text, encode(text))
        if len(sentence.ids) <= room:
            sentences.append(sentence)
            room -= len(sentence.ids)
        elif sentences:
            return sentences, chain([sentence], stream)
        else:
            tried += 1
            if tried == MOST_TRIED:
                break
    raise ValueError(f"no sentence of the given texts fits into {room:.0f} tokens; use a greater length")


def fill(
    first: list[Sentence], stream: Iterator[Sentence], corpus: Corpus, room: int, rng: random.Random
) -> list[Sentence]:
    """The first sentences, those that follow while they fit, and fillers for the rest of `room` tokens."""
    sentences = list(first)
    room -= sum(len(sentence.ids) for sentence in sentences)
    for sentence in stream:
        if len(sentence.ids) > room:
            break
        sentences.append(sentence)
        room -= len(sentence.ids)
    while (filler := corpus.filler(room, rng)) is not None:
        sentences.append(filler)
        room -= len(filler.ids)
    return sentences
