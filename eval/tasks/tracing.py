"""RULER's tracing and aggregation kinds (Hsieh et al. 2024, section 3.2 on): variables, common and frequent words."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from itertools import pairwise

from .draft import NOISE, Draft, planted
from .source import Source
from .words import Keys

HOPS = 4
COMMON = 10
SHORT = 4096  # below it RULER repeats common words 6 times and others once, from it on 30 and 3 times
FREQUENT = 3
LEAST_CODED = 80  # words: so many make the three most frequent stand out from the fourth


def variable_tracking(rng: random.Random, source: Source, depths: Sequence[float], length: int) -> Draft:
    """A number, and four variables that get it from one another in order."""
    keys = Keys(rng)
    names = [keys.letters(5, string.ascii_uppercase) for _ in range(HOPS + 1)]
    value = keys.number(5)
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]
    noise = " ".join(NOISE)
    places = sorted(depths[: HOPS + 1])
    return Draft(
        document=planted(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
            lambda count: [noise] * count,
            list(zip(places, lines, strict=True)),
            "\n",
        ),
        question=f"Question: Find all variables that are assigned the value {value} in the text above.",
        reply=(
            f"Answer: According to the chain(s) of variable assignment in the text above, {HOPS + 1} variables are "
            f"assigned the value {value}, they are:"
        ),
        answers=tuple(names),
        key=value,
        evidence=tuple(lines),
    )


def common_words(rng: random.Random, source: Source, depths: Sequence[float], length: int) -> Draft:
    """A numbered list of the texts' own words, then made-up ones; ten of them appear more often than the others."""
    common_repeats, other_repeats = (6, 1) if length < SHORT else (30, 3)
    words = list(source.words)
    rng.shuffle(words)
    keys = Keys(rng)
    words += [keys.letters(6, string.ascii_lowercase) for _ in range(COMMON - len(words))]
    common, others = words[:COMMON], words[COMMON:]
    order = rng.random()

    def document(units: int) -> str:
        others.extend(keys.letters(6, string.ascii_lowercase) for _ in range(units - len(others)))
        listed = common * common_repeats + others[:units] * other_repeats
        random.Random(order).shuffle(listed)
        numbered = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{numbered}"
        )

    return Draft(
        document=document,
        question="Question: What are the 10 most common words in the above list?",
        reply="Answer: The top 10 words that appear most often in the list are:",
        answers=tuple(common),
        key="the 10 most common words",
        evidence=(),
    )


def frequent_words(rng: random.Random, source: Source, depths: Sequence[float], length: int) -> Draft:
    """Coded words whose numbers fall off as a zeta distribution with α = 2; the most frequent one is only dots."""
    keys = Keys(rng)
    vocabulary = ["...", *(keys.letters(6, string.ascii_lowercase) for _ in range(max(50, length // 50)))]
    order = rng.random()

    def document(units: int) -> str:
        total = (LEAST_CODED + units) / (math.pi**2 / 6)
        coded = [word for rank, word in enumerate(vocabulary, 1) for _ in range(int(total / rank**2))]
        random.Random(order).shuffle(coded)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(coded)}"
        )

    return Draft(
        document=document,
        question=(
            "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?"
        ),
        reply="Answer: According to the coded text above, the three most frequently appeared words are:",
        answers=tuple(vocabulary[1 : FREQUENT + 1]),
        key="the 3 most frequent words",
        evidence=(),
    )
