"""Needles: values under keys, hidden in noise, in text, or among others.

`RulerNeedles` are RULER's tasks (Hsieh et al. 2024, section 3.1). `HiddenSentences` are the retrieval tasks of the
demo, calibration and the training probe: sentences inserted into running text, as in RULER's needle family.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .documents import NOISE, Draft, SourceTexts, planted
from .words import ADJECTIVES, CITIES, GEMS, MONTHS, NOUNS, PEOPLE, Keys


@dataclass(frozen=True)
class RulerNeedles:
    """One of RULER's needle tasks.

    Attributes:
        haystack: "noise": five sentences again and again; "text": the given texts; "needles": sentences of the same
            form with other keys.
        keys: "words" or "uuids".
        values: "numbers" or "uuids".
        num_keys: planted keys.
        num_values: values of each key, all of them asked for.
        num_queries: number of keys that are asked for.
    """

    haystack: str = "text"
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case; the asked needles lie at the first of `depths`."""
        keys = Keys(rng)
        new_key = keys.word if self.keys == "words" else keys.uuid
        new_value = keys.number if self.values == "numbers" else keys.uuid
        kind = "number" if self.values == "numbers" else "uuid"

        def needle(key: str) -> tuple[str, str]:
            value = new_value()
            return f"One of the special magic {kind}s for {key} is: {value}.", value

        names = [new_key() for _ in range(self.num_keys)]
        sentences: list[str] = []
        answers: list[str] = []
        for number, name in enumerate(names):
            for _ in range(self.num_values):
                sentence, value = needle(name)
                sentences.append(sentence)
                if number < self.num_queries:
                    answers.append(value)
        asked = names[: self.num_queries]
        query = ", ".join(asked[:-1]) + f", and {asked[-1]}" if len(asked) > 1 else asked[0]
        one = len(answers) == 1
        head, question, reply = _wording(kind, query, one)
        joint = " " if self.haystack == "text" else "\n"
        facts = list(zip(depths, sentences, strict=False))
        return Draft(
            document=planted(head, self._filler(rng, source, new_key, needle), facts, joint), question=question,
            reply=reply, answers=tuple(answers), key=query, evidence=tuple(sentences[: len(answers)]),
        )  # fmt: skip

    def _filler(
        self, rng: random.Random, source: SourceTexts, new_key: Callable[[], str],
        needle: Callable[[str], tuple[str, str]],
    ) -> Callable[[int], Sequence[str]]:  # fmt: skip
        if self.haystack == "text":
            return source.run(rng)
        if self.haystack == "noise":
            line = " ".join(NOISE)
            return lambda count: [line] * count
        made: list[str] = []

        def others(count: int) -> list[str]:
            while len(made) < count:
                made.append(needle(new_key())[0])
            return made[:count]

        return others


def _wording(kind: str, query: str, one: bool) -> tuple[str, str, str]:
    """(head, question, reply), in the singular if one value is asked for."""
    if one:
        return (
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {kind} afterwards.\n",
            f"What is the special magic {kind} for {query} mentioned in the provided text?",
            f"The special magic {kind} for {query} mentioned in the provided text is",
        )
    return (
        f"Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the {kind}s afterwards.\n",
        f"What are all the special magic {kind}s for {query} mentioned in the provided text?",
        f"The special magic {kind}s for {query} mentioned in the provided text are",
    )


RULER_NEEDLES = {
    "niah_single_1": RulerNeedles("noise"),
    "niah_single_2": RulerNeedles(),
    "niah_single_3": RulerNeedles(values="uuids"),
    "niah_multikey_1": RulerNeedles(num_keys=4),
    "niah_multikey_2": RulerNeedles("needles"),
    "niah_multikey_3": RulerNeedles("needles", "uuids", "uuids"),
    "niah_multivalue": RulerNeedles(num_values=4),
    "niah_multiquery": RulerNeedles(num_keys=4, num_queries=4),
}


@dataclass(frozen=True)
class HiddenSentences:
    """Sentences that state a value, inserted into running text; the first one is asked for, the others distract.

    As in RULER the assistant's reply is started for the model, so that a score measures whether the fact survived and
    not how a small model likes to phrase things.

    Attributes:
        facts: draws the sentences, the key, the question, the beginning of the reply, and the answer.
    """

    facts: Callable[[random.Random], tuple[tuple[str, ...], str, str, str, str]]

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case; the builder places the sentences, so `depths` are not used."""
        sentences, key, question, reply, answer = self.facts(rng)
        return Draft(
            haystack=source.run(rng), question=question, reply=reply, answers=(answer,), key=key, evidence=sentences
        )


def _digits(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _number(rng: random.Random) -> tuple[tuple[str, ...], str, str, str, str]:
    city, number = rng.choice(CITIES), _digits(rng)
    stem = f"The special magic number for {city} is"
    return (f"{stem} {number}.",), city, f"What is the special magic number for {city}?", stem, number


def _phrase(rng: random.Random) -> tuple[tuple[str, ...], str, str, str, str]:
    person = rng.choice(PEOPLE)
    first, second = rng.sample(ADJECTIVES, 2)
    words = f"{first} {second} {rng.choice(NOUNS)}"
    stem = f"The secret passphrase of {person} is"
    # A reply that opens the quotation keeps a small model from paraphrasing.
    return (f"{stem} '{words}'.",), person, f"What is the secret passphrase of {person}?", f"{stem} '", words


def _codes(rng: random.Random) -> tuple[tuple[str, ...], str, str, str, str]:
    gems = rng.sample(GEMS, 4)
    codes = [_digits(rng) for _ in gems]
    stems = [f"The access code for the {gem} vault is" for gem in gems]
    sentences = tuple(f"{stem} {code}." for stem, code in zip(stems, codes, strict=True))
    return sentences, gems[0], f"What is the access code for the {gems[0]} vault?", stems[0], codes[0]


def _date(rng: random.Random) -> tuple[tuple[str, ...], str, str, str, str]:
    city = rng.choice(CITIES)
    date = f"{rng.choice(MONTHS)} {rng.randint(1, 28)}, {rng.randint(1610, 1890)}"
    stem = f"The treaty of {city} was signed on"
    return (f"{stem} {date}.",), city, f"When was the treaty of {city} signed?", stem, date


HIDDEN_SENTENCES = {
    "needle": HiddenSentences(_number),
    "phrase": HiddenSentences(_phrase),
    "date": HiddenSentences(_date),
    "multikey": HiddenSentences(_codes),
}
