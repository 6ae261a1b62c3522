"""Sentences and vocabulary of the retrieval tasks.

These phrases and words belong to the evaluation: training generates its facts from other templates and other words
(a test compares the two), so that a score measures what the gates learned about text, not a phrase they saw.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

CITIES = (
    "Bratislava", "Reykjavik", "Ottawa", "Caracas", "Warsaw", "Budapest", "Copenhagen", "Stockholm", "Brussels",
    "Amsterdam", "Barcelona", "Calcutta", "Shanghai", "Singapore", "Bangkok", "Melbourne", "Seattle", "Memphis",
    "Atlanta", "Milan", "Venice", "Kampala", "Damascus", "Edinburgh",
)
PEOPLE = (
    "Tobias", "Marisol", "Desmond", "Yolanda", "Cedric", "Fatima", "Gustavo", "Henrietta", "Ignacio", "Jocelyn",
    "Kasimir", "Lucinda", "Malcolm", "Nadine", "Octavia", "Percival", "Rosalind", "Sheldon", "Thelma", "Ursula",
    "Vincent", "Winifred", "Zachary", "Theodore",
)
GEMS = (
    "ruby", "emerald", "sapphire", "topaz", "opal", "amethyst", "garnet", "onyx", "pearl", "jade", "agate", "beryl",
    "citrine", "moonstone", "peridot", "quartz",
)
ADJECTIVES = (
    "silent", "brave", "lonely", "nimble", "stormy", "tender", "wild", "broken", "distant", "hidden", "electric",
    "proud", "cosmic", "royal", "amber", "sunny", "foggy", "mighty", "fuzzy", "spicy",
)
NOUNS = (
    "walrus", "penguin", "lobster", "biscuit", "blossom", "canary", "dragon", "fountain", "iceberg", "lantern",
    "mammoth", "oyster", "panther", "pirate", "planet", "pretzel", "spider", "unicorn", "volcano", "wizard",
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)

# What no training template may contain (compared without case).
RESERVED_PHRASES = ("magic number", "passphrase", "access code", "vault", "treaty")


@dataclass(frozen=True)
class Facts:
    """What one case hides in its document.

    Attributes:
        sentences: the planted sentences; the first one holds the answer, the others are distractors.
        key: what the question asks about, e.g. the city.
        question: the question, which nobody has seen when the document is compressed.
        reply: how the assistant's answer begins; `answer` follows it.
        answer: the text to be found.
    """

    sentences: tuple[str, ...]
    key: str
    question: str
    reply: str
    answer: str


def _digits(rng: random.Random, count: int = 5) -> str:
    return str(rng.randrange(10 ** (count - 1), 10**count))


def _needle(rng: random.Random) -> Facts:
    city, number = rng.choice(CITIES), _digits(rng)
    stem = f"The special magic number for {city} is"
    return Facts((f"{stem} {number}.",), city, f"What is the special magic number for {city}?", stem, number)


def _phrase(rng: random.Random) -> Facts:
    person = rng.choice(PEOPLE)
    first, second = rng.sample(ADJECTIVES, 2)
    words = f"{first} {second} {rng.choice(NOUNS)}"
    stem = f"The secret passphrase of {person} is"
    # A reply that opens the quotation keeps a small model from paraphrasing.
    question = f"What is the secret passphrase of {person}?"
    return Facts((f"{stem} '{words}'.",), person, question, f"{stem} '", words)


def _multikey(rng: random.Random) -> Facts:
    gems = rng.sample(GEMS, 4)
    codes = [_digits(rng) for _ in gems]
    stems = [f"The access code for the {gem} vault is" for gem in gems]
    sentences = tuple(f"{stem} {code}." for stem, code in zip(stems, codes, strict=True))
    question = f"What is the access code for the {gems[0]} vault?"
    return Facts(sentences, gems[0], question, stems[0], codes[0])


def _date(rng: random.Random) -> Facts:
    city = rng.choice(CITIES)
    date = f"{rng.choice(MONTHS)} {rng.randint(1, 28)}, {rng.randint(1610, 1890)}"
    stem = f"The treaty of {city} was signed on"
    return Facts((f"{stem} {date}.",), city, f"When was the treaty of {city} signed?", stem, date)


@dataclass(frozen=True)
class Task:
    """A kind of retrieval question: its name, one line about it and the generator of its facts."""

    name: str
    description: str
    facts: Callable[[random.Random], Facts]


TASKS = {
    task.name: task
    for task in (
        Task("needle", "one number told once", _needle),
        Task("phrase", "three words told once", _phrase),
        Task("date", "a day, month and year told once", _date),
        Task("multikey", "one of four sentences that differ in one word", _multikey),
    )
}


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}")
    return TASKS[name]
