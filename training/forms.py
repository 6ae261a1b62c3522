"""Documents that are no running text: conversations in which facts are told, and passages said again and again."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import templates
from .corpus import Sentence
from .facts import Fact, Question, Style, draw
from .vocabulary import VOCABULARY

_TURN_SENTENCES = (1, 4)  # sentences of the text in one turn
_CYCLE_WORDS = (24, 90)  # words of a list that is repeated
_SHOWN, _EXPECTED = (4, 8), (6, 16)  # words of a repeated passage that a question shows, and that must follow
_LIST_SHARE = 0.7  # of the repeated passages: lists of words; the others are sentences of the text
_WORDS = tuple(
    word for name in ("noun", "adjective", "animal", "color", "material", "verb") for word in VOCABULARY[name]
)

Encode = Callable[[str], list[int]]


def turns(
    stream: Iterator[Sentence], speakers: tuple[str, str], encode: Encode, rng: random.Random
) -> Iterator[Sentence]:
    """The text as turns of two speakers, each a piece that begins on a line of its own."""
    number = 0
    while True:
        sentences = [next(stream) for _ in range(rng.randint(*_TURN_SENTENCES))]
        said = " ".join(sentence.text.strip() for sentence in sentences)
        text = f"\n{speakers[number % 2]}: {' '.join(said.split())}"
        number += 1
        yield Sentence(text, encode(text))


def told_fact(speakers: tuple[str, str], style: Style, rng: random.Random, used: set[str]) -> Fact | None:
    """A fact that the first speaker tells of herself and the second acknowledges; None when its statement was used."""
    statement, question, answer, slot = rng.choice(templates.FIRST_PERSON)
    if statement in used:
        return None
    used.add(statement)
    value = draw(slot, rng, used)
    aside, reply = rng.choice(templates.ASIDES), rng.choice(templates.ACKNOWLEDGEMENTS)
    said = statement.format(value=value)
    told = aside.format(said=said) if aside else said
    passage = f"\n{speakers[0]}: {told}\n{speakers[1]}: {reply}"
    asked = style.question(
        "told", question.format(speaker=speakers[0]), (value,), answer.format(speaker=speakers[0], value=value)
    )
    return Fact("told", (passage,), (asked,))


@dataclass(frozen=True)
class Repeated:
    """A passage that is said again and again, the same words in the same order.

    Attributes:
        words: one round of it.
        joint: stands between two words, also between the rounds.
        introduction: stands before it, or is empty.
    """

    words: tuple[str, ...]
    joint: str
    introduction: str

    @classmethod
    def draw(cls, stream: Iterator[Sentence], room: int, encode: Encode, rng: random.Random) -> "Repeated":
        """A list of words, or sentences of the text, of which three rounds go into `room` tokens."""
        words = rng.sample(_WORDS, rng.randint(*_CYCLE_WORDS))
        if rng.random() >= _LIST_SHARE:
            words = [word for _ in range(rng.randint(2, 5)) for word in next(stream).text.split()][: _CYCLE_WORDS[1]]
        joint = rng.choice(templates.JOINTS)
        while len(encode(joint.join(words))) > room // 3 and len(words) > 1:
            words = words[: len(words) // 2]
        return cls(tuple(words), joint, rng.choice(templates.REPETITION_INTRODUCTIONS))

    def tokens(self, room: int, encode: Encode) -> list[int]:
        """`room` token ids of it; the last round may be cut off anywhere."""
        rounds = 2 + room // len(encode(self.joint + self.joint.join(self.words)))
        text = self.joint.join(self.words * rounds)
        return encode(f"{self.introduction}\n\n{text}" if self.introduction else text)[:room]

    def question(self, rng: random.Random) -> Question:
        """Some words of it are shown; the answer is those and the ones that follow, maybe in the next round."""
        shown, expected = rng.randint(*_SHOWN), rng.randint(*_EXPECTED)
        start = rng.randrange(len(self.words))
        turned = [self.words[(start + place) % len(self.words)] for place in range(shown + expected)]
        question = rng.choice(templates.REPETITION_QUESTIONS).format(start=self.joint.join(turned[:shown]))
        return Question("repetition", question, self.joint.join(turned), (self.joint.join(turned),))
