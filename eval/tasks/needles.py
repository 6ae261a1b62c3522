"""RULER's needle kinds (Hsieh et al. 2024, section 3.1): values under keys, hidden in noise, text, or among others."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .draft import NOISE, Draft, planted
from .source import Source
from .words import Keys


@dataclass(frozen=True)
class Needles:
    """One kind.

    Attributes:
        haystack: "noise": five sentences again and again; "text": the given texts; "needles": sentences of the same
            form with other keys.
        keys: "words" or "uuids".
        values: "numbers" or "uuids".
        num_keys: planted keys.
        num_values: values of each key.
        num_queries: how many of the keys are asked for.
    """

    haystack: str = "text"
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def draft(self, rng: random.Random, source: Source, depths: Sequence[float], length: int) -> Draft:
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
            document=planted(head, self._filler(rng, source, new_key, needle), facts, joint),
            question=question,
            reply=reply,
            answers=tuple(answers),
            key=query,
            evidence=tuple(sentences[: len(answers)]),
        )

    @property
    def planted(self) -> int:
        """How many sentences are planted."""
        return self.num_keys * self.num_values

    def _filler(
        self,
        rng: random.Random,
        source: Source,
        new_key: Callable[[], str],
        needle: Callable[[str], tuple[str, str]],
    ) -> Callable[[int], Sequence[str]]:
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


NIAH = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(values="uuids"),
    "niah_multikey_1": Needles(num_keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", "uuids", "uuids"),
    "niah_multivalue": Needles(num_values=4),
    "niah_multiquery": Needles(num_keys=4, num_queries=4),
}
