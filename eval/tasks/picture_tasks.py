"""Questions about drawn pictures and written notes in a text, so that budgets can be compared modality by modality.

A context is running text with pictures and notes in it, each from a city of its own:

    Picture from Warsaw: <16 image tokens>       Note from Ottawa: It shows the number 482.

One of them is asked about. Tasks that ask about a note have contexts of the same kind as those that ask about a
picture, so a difference between them is one between the modalities.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..cases import Case
from ..image_prompts import image_prompt
from ..prompts import encode, shared_start
from .documents import SourceTexts
from .drawings import KINDS, Drawing, Split, draw
from .words import CITIES

INTRO = "Read the following text and look at its pictures. You will be asked a question about it afterwards.\n\n"
ITEMS = {"picture": "Picture from {}:", "note": "Note from {}: {}"}
QUESTIONS = {
    "number": "What number does the {} from {} show?",
    "word": "What word does the {} from {} show?",
    "shape": "What colour and shape does the {} from {} show?",
}
REPLIES = {
    "number": "The {} from {} shows the number",
    "word": "The {} from {} shows the word",
    "shape": "The {} from {} shows a",
}


@dataclass(frozen=True)
class PictureTask:
    """A task over pictures and notes.

    Attributes:
        name: unique among all tasks.
        description: one line about it.
        items: what a context holds, "picture" or "note" each; the first one is asked about. They are shuffled.
    """

    name: str
    description: str
    items: tuple[str, ...]


PICTURE_TASKS = {
    task.name: task
    for task in (
        PictureTask("picture", "what the only picture of a text shows", ("picture",)),
        PictureTask("pictures", "what one of four pictures shows", ("picture",) * 4),
        PictureTask("mixed_picture", "one of two pictures, with two notes", ("picture",) * 2 + ("note",) * 2),
        PictureTask("mixed_note", "one of two notes, with two pictures", ("note",) * 2 + ("picture",) * 2),
    )
}  # fmt: skip


class PictureCases:
    """Builds cases of these tasks for one model's processor.

    Args:
        processor: with a chat template, image tokens expanded by it.
        texts: running text around the items.
        filler: sentences between two items.
        seed: cases are a function of `(seed, task, index)`, the texts, the processor and `filler`.
        split: of the drawings.
    """

    def __init__(
        self, processor: Any, texts: Sequence[str], filler: int = 3, seed: int = 0, split: Split = "test"
    ) -> None:  # fmt: skip
        if filler < 0:
            raise ValueError(f"got {filler} sentences of filler; accepted: 0 or more")
        self.processor, self.filler, self.seed = processor, filler, seed
        self.split: Split = split
        self._source = SourceTexts(texts)

    def cases(self, tasks: Sequence[str], count: int) -> Iterator[Case]:
        """`count` cases of each task."""
        for task in tasks:
            for index in range(count):
                yield self.case(task, index)

    def case(self, task: str, index: int) -> Case:
        """Case number `index` of `task`.

        Raises:
            ValueError: an unknown task, or a processor that takes no such prompts.
        """
        if task not in PICTURE_TASKS:
            raise ValueError(f"unknown task {task!r}; known tasks: {', '.join(PICTURE_TASKS)}")
        parts, kind, city, drawing = self.parts(task, index)
        question = QUESTIONS[drawing.kind].format(kind, city)
        reply = REPLIES[drawing.kind].format(kind, city)
        prompt = image_prompt(self.processor, [INTRO, *parts], f"\n{question}")
        tokenizer = self.processor.tokenizer
        start, whole = (encode(tokenizer, text, plain=True) for text in (reply, f"{reply} {drawing.answer}."))
        common = shared_start(start, whole)
        context = prompt.context_ids
        spans = []
        if kind == "picture":
            images = [part for part in parts if not isinstance(part, str)]
            number = next(place for place, image in enumerate(images) if image is drawing.image)
            spans = [self._image_spans(context)[number]]
        return Case(
            task=task, index=index, seed=self.seed, context_ids=tuple(context),
            question_ids=(*prompt.rest, *whole[:common]), answer_ids=tuple(whole[common:]), question=question,
            answer=drawing.answer, depth=spans[0][0] / len(context) if spans else 0.0, facts=tuple(spans),
            key=city, inputs=prompt.extra,
        )  # fmt: skip

    def parts(self, task: str, index: int) -> tuple[list[Any], str, str, Drawing]:
        """The context's texts and images; kind, city and drawing of the item that is asked about."""
        rng = random.Random(f"{self.seed}/{task}/{index}")
        items = PICTURE_TASKS[task].items
        cities = rng.sample(CITIES, len(items))
        # No two items of a context show the same, so that the answer is one item's alone.
        drawings: list[Drawing] = []
        while len(drawings) < len(items):
            # The kinds take turns by the case's number: each is asked about equally often.
            kind = KINDS[index % len(KINDS)] if not drawings else None
            made = draw(rng, kind, self.split)
            if all(made.answer != other.answer for other in drawings):
                drawings.append(made)
        order = list(range(len(items)))
        rng.shuffle(order)
        text = iter(self._source.run(rng))
        parts: list[Any] = [self._filler(text)]
        for place in order:
            item = items[place]
            if item == "picture":
                parts += [f"\n{ITEMS[item].format(cities[place])}", drawings[place].image, "\n"]
            else:
                parts.append(f"\n{ITEMS[item].format(cities[place], drawings[place].caption)}\n")
            parts.append(self._filler(text))
        return [part for part in parts if part != ""], items[0], cities[0], drawings[0]

    def _filler(self, sentences: Iterator[str]) -> str:
        return " ".join(next(sentences) for _ in range(self.filler))

    def _image_spans(self, context: Sequence[int]) -> list[tuple[int, int]]:
        """Token ranges of the images, in their order."""
        token, spans = self.processor.image_token_id, []
        for place, one in enumerate(context):
            if one != token:
                continue
            if spans and spans[-1][1] == place:
                spans[-1] = (spans[-1][0], place + 1)
            else:
                spans.append((place, place + 1))
        return spans
