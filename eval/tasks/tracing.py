"""RULER's tracing and aggregation tasks (Hsieh et al. 2024, section 3.2 on): variables, common and frequent words."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .documents import NOISE, Draft, SourceTexts, planted
from .words import Keys


@dataclass(frozen=True)
class VariableTracking:
    """A number, and variables that get it from one another in order.

    Attributes:
        hops: variables after the first.
    """

    hops: int = 4

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case, see `Draft`; `depths` are shares of the filler, that of the asked fact first."""
        keys = Keys(rng)
        names = [keys.letters(5, string.ascii_uppercase) for _ in range(self.hops + 1)]
        value = keys.number(5)
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]
        noise = " ".join(NOISE)
        places = sorted(depths[: self.hops + 1])
        return Draft(
            document=planted(
                "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
                lambda count: [noise] * count,
                list(zip(places, lines, strict=True)),
                "\n",
            ),
            question=f"Question: Find all variables that are assigned the value {value} in the text above.",
            reply=(
                f"Answer: According to the chain(s) of variable assignment in the text above, {self.hops + 1} "
                f"variables are assigned the value {value}, they are:"
            ),
            answers=tuple(names),
            key=value,
            evidence=tuple(lines),
        )


@dataclass(frozen=True)
class CommonWords:
    """A numbered list of the texts' own words, then made-up ones, a few of which appear more often than the others.

    Attributes:
        common: words that appear often; the question names 10.
        short: contexts of fewer tokens use `short_repeats`, longer ones `long_repeats`.
        short_repeats, long_repeats: times that a common and another word appear, as in RULER.
    """

    common: int = 10
    short: int = 4096
    short_repeats: tuple[int, int] = (6, 1)
    long_repeats: tuple[int, int] = (30, 3)

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case, see `Draft`; `depths` are shares of the filler, that of the asked fact first."""
        common_repeats, other_repeats = self.short_repeats if length < self.short else self.long_repeats
        words = list(source.words)
        rng.shuffle(words)
        keys = Keys(rng)
        words += [keys.letters(6, string.ascii_lowercase) for _ in range(self.common - len(words))]
        common, others = words[: self.common], words[self.common :]
        order = rng.random()

        def document(units: int) -> str:
            others.extend(keys.letters(6, string.ascii_lowercase) for _ in range(units - len(others)))
            listed = common * common_repeats + others[:units] * other_repeats
            random.Random(order).shuffle(listed)
            numbered = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
            return (
                "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
                f"ones that appear most often.\n{numbered}"
            )

        return Draft(
            document=document, question="Question: What are the 10 most common words in the above list?",
            reply="Answer: The top 10 words that appear most often in the list are:", answers=tuple(common),
            key="the 10 most common words", evidence=(),
        )  # fmt: skip


@dataclass(frozen=True)
class FrequentWords:
    """Coded words whose counts fall off as a zeta distribution with α = 2; the most frequent one is only dots.

    Attributes:
        frequent: words that are asked for, after the dots; the question says three.
        least: words at least, so that the most frequent stand out from the next one.
    """

    frequent: int = 3
    least: int = 80

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case, see `Draft`; `depths` are shares of the filler, that of the asked fact first."""
        keys = Keys(rng)
        vocabulary = ["...", *(keys.letters(6, string.ascii_lowercase) for _ in range(max(50, length // 50)))]
        order = rng.random()

        def document(units: int) -> str:
            total = (self.least + units) / (math.pi**2 / 6)
            coded = [word for rank, word in enumerate(vocabulary, 1) for _ in range(int(total / rank**2))]
            random.Random(order).shuffle(coded)
            return (
                "Read the following coded text and track the frequency of each coded word. Find the three most "
                f"frequently appeared coded words. {' '.join(coded)}"
            )

        return Draft(
            document=document,
            question=(
                "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
                "frequently appeared words in the above coded text?"
            ),
            reply="Answer: According to the coded text above, the three most frequently appeared words are:",
            answers=tuple(vocabulary[1 : self.frequent + 1]),
            key="the 3 most frequent words",
            evidence=(),
        )
