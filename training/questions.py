"""The questions about a document: which of them go in, and the conversation that asks and answers them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .chat import ChatFrame
from .corpus import SEPARATOR
from .facts import Fact, Question


@dataclass(frozen=True)
class Conversation:
    """Questions and answers as token ids, which of them are targets, and the span of every answer."""

    ids: list[int]
    loss_mask: list[bool]
    answers: list[tuple[int, int]]


@dataclass(frozen=True)
class Questioner:
    """Asks in the turns of `frame`."""

    frame: ChatFrame

    def draw(self, facts: Sequence[Fact], number: tuple[int, int], room: float, rng: random.Random) -> list[Question]:
        """Questions within `room` tokens: one of each fact as far as they go, then second ones; in random order.

        Args:
            number: range (inclusive) of how many.
        """
        ranked = [q for rank in range(2) for fact in facts for q in fact.questions[rank : rank + 1]]
        chosen = self.within(ranked, rng.randint(*number), room)
        rng.shuffle(chosen)
        return chosen

    def within(self, questions: Sequence[Question], number: int, room: float) -> list[Question]:
        """The first `number` of those that go into `room` tokens together with their answers."""
        chosen: list[Question] = []
        for question in questions:
            cost = len(self._encode(question.text)) + len(self._encode(question.answer)) + self.frame.turn_tokens()
            if len(chosen) < number and cost <= room:
                chosen.append(question)
                room -= cost
        return chosen

    def conversation(self, questions: Sequence[Question]) -> Conversation:
        """Everything after the document."""
        pieces = self.frame.pieces(len(questions))
        ids, mask, spans = self._encode(SEPARATOR + self.frame.first_question_prefix), [], []
        for turn, question in enumerate(questions):
            ids += self._encode(question.text) + pieces[2 * turn + 1]
            mask += [False] * (len(ids) - len(mask))
            answer = self._encode(self.frame.answer_prefix + question.answer)
            spans.append((len(ids), len(ids) + len(answer)))
            closing = pieces[2 * turn + 2]
            ids += answer + closing
            mask += [True] * (len(answer) + self.frame.end_tokens(closing))
        return Conversation(ids, mask + [False] * (len(ids) - len(mask)), spans)

    def _encode(self, text: str) -> list[int]:
        return self.frame.tokenizer(text, add_special_tokens=False)["input_ids"]
