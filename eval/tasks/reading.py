"""Questions about passages of the given texts, in place of RULER's two downloaded question-answering sets."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .documents import Draft, SourceTexts
from .words import CITIES, PEOPLE

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class Cloze:
    """One hop: a sentence of one of the documents with a word left out, which is asked for."""

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case, see `Draft`; `depths` are shares of the filler, that of the asked fact first."""
        passage, sentence = source.quotable(rng)
        word = _blank(rng, sentence)
        gap = re.sub(rf"\b{re.escape(word)}\b", "____", sentence, count=1)
        return Draft(
            document=_documents(rng, source, [(depths[0], passage)]),
            question=(
                f'{INSTRUCTION}\n\nQuestion: One sentence of the documents reads, with a word left out: "{gap}" '
                "Which word was left out?"
            ),
            reply="Answer: The word that was left out is",
            answers=(word,),
            key=gap,
            evidence=(sentence,),
        )


@dataclass(frozen=True)
class TwoHops:
    """Two hops: the document that begins with given words was filed by a person, whose city is asked for.

    Attributes:
        opening_words: words of the document that the question quotes.
        registered: people whose city is stated.
    """

    opening_words: int = 7
    registered: int = 4

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case, see `Draft`; `depths` are shares of the filler, that of the asked fact first."""
        passage, _ = source.quotable(rng)
        people = rng.sample(PEOPLE, self.registered)
        cities = rng.sample(CITIES, self.registered)
        filed = f"This document was filed by {people[0]}. {passage}"
        rules = [f"{person} keeps all papers in {city}." for person, city in zip(people, cities, strict=True)]
        others = [person for person in PEOPLE if person != people[0]]
        opening = " ".join(passage.split()[: self.opening_words])
        facts = [(depths[0], filed), *zip(depths[1:], rules, strict=False)]
        return Draft(
            document=_documents(rng, source, facts, lambda: f"This document was filed by {rng.choice(others)}. "),
            question=(
                f"{INSTRUCTION}\n\nQuestion: One document goes on, after the name of the person who filed it, with the "
                f'words "{opening}". In which city does that person keep all papers?'
            ),
            reply="Answer: That person keeps all papers in",
            answers=(cities[0],),
            key=opening,
            evidence=(filed[: filed.index(passage)].strip(), rules[0]),
        )


@dataclass(frozen=True)
class Verbatim:
    """In-context recall of the text itself: the continuation of a sentence.

    Attributes:
        shown: words of the sentence that the question quotes.
        expected: words that must follow.
    """

    shown: int = 6
    expected: int = 6

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case, see `Draft`; `depths` are shares of the filler, that of the asked fact first."""
        passage, sentence = source.quotable(rng)
        words = sentence.split()
        start, rest = words[: self.shown], words[self.shown : self.shown + self.expected]
        run = source.run(rng)

        def document(units: int) -> str:
            pieces = list(run(units))
            pieces.insert(int(depths[0] * units), passage)
            return "Read the following text and remember every word of it.\n\n" + " ".join(pieces)

        answer = " ".join(rest).rstrip(".,;:!?")
        return Draft(
            document=document,
            question=f"How does the sentence go on that begins with \"{' '.join(start)}\"? Quote it word by word.",
            reply=" ".join(start), answers=(answer,), key=" ".join(start), evidence=(sentence,),
        )  # fmt: skip


def _documents(
    rng: random.Random, source: SourceTexts, facts: Sequence[tuple[float, str]], header: Callable[[], str] = lambda: ""
) -> Callable[[int], str]:
    """Numbered documents: other passages of the texts with those of `facts`, `(depth, text)`, among them."""
    taken = [text for _, text in facts]
    passages = [one for one in source.passages if not any(one in text for text in taken)] or [source.passages[0]]
    start = rng.randrange(len(passages))
    made: list[str] = []

    def document(units: int) -> str:
        while len(made) < units:
            made.append(header() + passages[(start + len(made)) % len(passages)])
        pieces = list(made[:units])
        for depth, text in sorted(facts, reverse=True):
            pieces.insert(int(depth * units), text)
        numbered = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(pieces, 1))
        return f"The following are given documents.\n\n{numbered}"

    return document


def _blank(rng: random.Random, sentence: str) -> str:
    """A word that occurs once in the sentence: a name if there is one, else a long word."""
    words = re.findall(r"\b[A-Za-z]{4,}\b", sentence)
    single = [word for word in words[1:] if len(re.findall(rf"\b{word}\b", sentence)) == 1]
    names = [word for word in single if word[0].isupper()]
    longest = sorted(single, key=len, reverse=True)[:3]
    return rng.choice(names or longest or words[:1] or sentence.split()[-1:])
