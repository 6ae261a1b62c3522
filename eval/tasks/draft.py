"""A case before its length is fixed, and the document of exactly so many tokens that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
_TAIL = 200  # characters before the end that can change how what is appended there is split into tokens


@dataclass(frozen=True)
class Draft:
    """What a task wants to say, in a document that can be made longer.

    Attributes:
        document: the text with so many units of filler; each unit adds tokens.
        question: what is asked of it.
        reply: how the assistant's answer begins; the gold answer follows it.
        answers: what must be found in the generated text.
        key: what the question asks about.
        evidence: verbatim pieces of the document that hold the answer, whatever the filler.
        match: see `Case`.
        gold: the gold continuation of `reply`; the answers joined by commas if empty.
    """

    document: Callable[[int], str]
    question: str
    reply: str
    answers: tuple[str, ...]
    key: str
    evidence: tuple[str, ...]
    match: str = ALL
    gold: str = ""

    @property
    def continuation(self) -> str:
        """The gold continuation of `reply`."""
        return self.gold or ", ".join(self.answers)


def fit(tokenizer: Any, document: Callable[[int], str], length: int, name: str) -> str:
    """The document of exactly `length` tokens: as much filler as there is room for, and a part of `NOISE` at its end.

    Args:
        tokenizer: tokens are counted in the whole text at once, without special tokens.
        document: see `Draft`.
        name: the task's, for messages.

    Raises:
        ValueError: the document is longer without any filler, or no end makes up the exact number.
    """
    counted: dict[int, int] = {}

    def count(units: int) -> int:
        if units not in counted:
            counted[units] = len(encode(tokenizer, document(units), plain=True))
        return counted[units]

    if count(0) > length:
        raise ValueError(f"a context of {length} tokens is too short for task {name!r}: give at least {count(0)}")
    units = _most_units(count, length)
    text = document(units)
    return _padded(tokenizer, text, length - count(units), length, name)


def _most_units(count: Callable[[int], int], length: int) -> int:
    """The most units whose count does not exceed `length`, by interpolation between what is known to fit and not."""
    low, high = 0, 1
    while count(high) <= length:
        grown = count(high) - count(0)
        if grown <= 0 and high > 64:
            raise AssertionError("filler adds tokens")
        guess = high * (length - count(0)) // max(1, grown) + 1
        low, high = high, min(max(high + 1, guess), 64 * high)
    while high - low > 1:
        share = (length - count(low)) / (count(high) - count(low))
        guess = low + round(share * (high - low))
        middle = min(max(guess, low + 1), high - 1)
        low, high = (middle, high) if count(middle) <= length else (low, middle)
    return low


def _padded(tokenizer: Any, text: str, missing: int, length: int, name: str) -> str:
    """`text` with `missing` tokens appended, so that it has exactly `length`."""
    if missing == 0:
        return text
    tail = text[-_TAIL:]
    base = len(encode(tokenizer, tail, plain=True))
    for first in range(len(NOISE)):
        turned = NOISE[first:] + NOISE[:first]
        noise = " " + " ".join(turned * (1 + missing // 4))
        # Only the end of the text is counted while a cut is looked for; the whole text has the last word.
        for cut in range(1, len(noise) + 1):
            added = len(encode(tokenizer, tail + noise[:cut], plain=True)) - base
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
        head: what stands before the first unit.
        filler: the first so many units.
        facts: `(depth, text)`, the depth as a share of the units in [0, 1].
        joint: stands between units.
    """
    ordered = sorted(facts, key=lambda fact: fact[0])

    def document(units: int) -> str:
        pieces = list(filler(units))
        count = len(pieces)
        for depth, fact in reversed(ordered):
            pieces.insert(int(depth * count), fact)
        return head + joint.join(pieces)

    return document
