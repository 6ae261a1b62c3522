"""Memory tasks: dialogues whose early facts are asked for late, lists of pairs, and a passage that is repeated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .documents import Draft, SourceTexts, planted
from .words import CITIES, GEMS, PEOPLE, Keys

# (statement of the user, question, beginning of the reply, kind of value that is drawn)
TOLD = (
    ("My locker opens with {value}.", "What opens my locker?", "Your locker opens with", "number"),
    ("My badge shows the number {value}.", "Which number does my badge show?", "Your badge shows the number", "number"),
    ("We will meet in {value} next week.", "Where will we meet next week?", "You will meet in", "city"),
    ("My dentist is called {value}.", "What is my dentist called?", "Your dentist is called", "person"),
    ("The stone in my ring is a {value}.", "Which stone is in my ring?", "The stone in your ring is a", "gem"),
    ("My boat carries the name {value}.", "Which name does my boat carry?", "Your boat carries the name", "key"),
)


@dataclass(frozen=True)
class Dialogue:
    """A conversation about the text in many turns, in which the user states facts early.

    Attributes:
        early: facts lie in this first share of the turns.
        facts: facts that are stated; the first drawn is asked for.
    """

    early: float = 0.25
    facts: int = 4

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case, see `Draft`; `depths` are shares of the filler, that of the asked fact first."""
        keys = Keys(rng)
        draw = {
            "number": lambda: keys.number(5),
            "city": lambda: rng.choice(CITIES),
            "person": lambda: rng.choice(PEOPLE),
            "gem": lambda: rng.choice(GEMS),
            "key": keys.word,
        }
        told = [
            (statement, question, reply, draw[kind]())
            for statement, question, reply, kind in rng.sample(TOLD, self.facts)
        ]
        turns = [
            f"User: {statement.format(value=value)} Please remember that.\nAssistant: I will remember it."
            for statement, _, _, value in told
        ]
        statement, question, reply, answer = told[0]
        run = source.run(rng)

        def filler(count: int) -> list[str]:
            sentences = run(3 * count)
            return [
                f"User: Here is something I read: {first}\nAssistant: It reminds me of this: {second} {third}"
                for first, second, third in zip(sentences[::3], sentences[1::3], sentences[2::3], strict=True)
            ]

        head = "This is a conversation between a user and an assistant.\n\n"
        facts = [(self.early * depth, turn) for depth, turn in zip(depths, turns, strict=False)]
        return Draft(
            document=planted(head, filler, facts, "\n"), question=f"The user asks at last: {question}", reply=reply,
            answers=(answer,), key=question, evidence=(statement.format(value=answer),),
        )  # fmt: skip


@dataclass(frozen=True)
class AssociativeRecall:
    """Nothing but pairs of a key and a number, one of which is asked for.

    Attributes:
        digits: digits of a number.
    """

    digits: int = 4

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case, see `Draft`; `depths` are shares of the filler, that of the asked fact first."""
        keys = Keys(rng)
        key, value = keys.word(), keys.number(self.digits)
        made: list[str] = []

        def pairs(count: int) -> list[str]:
            while len(made) < count:
                made.append(f"{keys.word()}: {keys.number(self.digits)}")
            return made[:count]

        line = f"{key}: {value}"
        return Draft(
            document=planted("Remember the number of every key in this list.\n\n", pairs, [(depths[0], line)], "\n"),
            question=f"Which number does the list give for {key}?", reply=f"{key}:", answers=(value,), key=key,
            evidence=(line,),
        )  # fmt: skip


@dataclass(frozen=True)
class Repetition:
    """A passage of words repeated over and over; the reply starts it at a random place and must continue it.

    Attributes:
        cycle: words of the passage.
        shown: words of it that the reply begins with.
        expected: words that must follow.
    """

    cycle: int = 60
    shown: int = 6
    expected: int = 4

    def draft(self, rng: random.Random, source: SourceTexts, depths: Sequence[float], length: int) -> Draft:
        """One case, see `Draft`; `depths` are shares of the filler, that of the asked fact first."""
        keys = Keys(rng)
        cycle = [keys.word().partition("-")[2] for _ in range(4 * self.cycle)]
        cycle = list(dict.fromkeys(cycle))[: self.cycle]
        start = int(depths[0] * len(cycle))
        turned = (cycle * 2)[start : start + self.shown + self.expected]

        def document(units: int) -> str:
            repeated = (cycle * (2 + units // len(cycle)))[: len(cycle) + units]
            return "The same words are repeated here in the same order.\n\n" + " ".join(repeated)

        answer = " ".join(turned[self.shown :])
        return Draft(
            document=document, question="Write the words once more in the same order, from a place of your choice.",
            reply=" ".join(turned[: self.shown]), answers=(answer,), key=" ".join(turned[: self.shown]), evidence=(),
        )  # fmt: skip
