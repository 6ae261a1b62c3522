"""Small pictures drawn with PIL: a number, a word or a coloured shape, each with the fact that it shows.

They need no download, and what they show is known exactly. `split` keeps numbers apart that a model may be trained on
from those that it is asked about: a tower that reads the second kind has learned digits, not a list of numbers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["number", "word", "shape"]
Split = Literal["train", "test"]

KINDS: tuple[Kind, ...] = ("number", "word", "shape")
SIZE = 64  # pixels, width and height
WORDS = (
    "tiger", "apple", "river", "piano", "lemon", "horse", "cloud", "bread", "knife", "chair", "snake", "train",
    "glass", "tower", "shoes", "grass", "candle", "mouse", "whale", "sugar", "bridge", "wheel", "spoon", "money",
)  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (214, 40, 40), "green": (30, 140, 60), "blue": (35, 80, 200), "orange": (240, 140, 20),
    "purple": (130, 50, 170), "black": (20, 20, 20), "brown": (120, 75, 35),
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A picture and what it shows.

    Attributes:
        kind: of the fact.
        answer: the number's digits, the word, or colour and shape ("red circle").
        image: RGB, `SIZE` pixels square.
    """

    kind: Kind
    answer: str
    image: Any

    @property
    def question(self) -> str:
        """The question whose answer it is."""
        return QUESTIONS[self.kind]

    @property
    def caption(self) -> str:
        """A sentence that says what it shows."""
        return CAPTIONS[self.kind].format(self.answer)


QUESTIONS: dict[str, str] = {
    "number": "What number does the picture show?",
    "word": "What word does the picture show?",
    "shape": "What colour and shape does the picture show?",
}
CAPTIONS: dict[str, str] = {
    "number": "It shows the number {}.",
    "word": "It shows the word {}.",
    "shape": "It shows a {}.",
}


def held_out(number: int) -> bool:
    """Whether three digits are only asked about, never trained on: one number in ten."""
    return random.Random(f"held out {number}").random() < 0.1


def draw(rng: random.Random, kind: Kind | None = None, split: Split = "test") -> Drawing:
    """A picture.

    Args:
        rng: the only source of randomness.
        kind: what it shows; None draws one.
        split: numbers of `train` and `test` are different ones. Words and shapes are closed lists, the same in both;
            where and how large they are drawn is new each time.

    Raises:
        ValueError: an unknown kind or split.
    """
    if kind is None:
        kind = rng.choice(KINDS)
    if kind not in KINDS or split not in ("train", "test"):
        raise ValueError(
            f"got a drawing of kind {kind!r} and split {split!r}; accepted: {', '.join(KINDS)}, and train or test"
        )
    if kind == "number":
        number = rng.randrange(100, 1000)
        while held_out(number) != (split == "test"):
            number = rng.randrange(100, 1000)
        return Drawing(kind, str(number), _text(rng, str(number), 28))
    if kind == "word":
        word = rng.choice(WORDS)
        return Drawing(kind, word, _text(rng, word, 17))
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    return Drawing(kind, f"{colour} {shape}", _shape(rng, colour, shape))


def _canvas(rng: random.Random) -> Image:
    from PIL import Image

    shade = tuple(rng.randrange(225, 256) for _ in range(3))
    return Image.new("RGB", (SIZE, SIZE), shade)


@lru_cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)  # the font in PIL itself: the same pixels on every machine


def _text(rng: random.Random, text: str, size: int) -> Image:
    from PIL import ImageDraw

    image = _canvas(rng)
    place = SIZE / 2 + rng.uniform(-3, 3), SIZE / 2 + rng.uniform(-5, 5)
    colour = COLOURS[rng.choice(list(COLOURS))]
    ImageDraw.Draw(image).text(place, text, fill=colour, font=_font(size), anchor="mm")
    return image


def _shape(rng: random.Random, colour: str, shape: str) -> Image:
    from PIL import ImageDraw

    image, fill = _canvas(rng), COLOURS[colour]
    pen = ImageDraw.Draw(image)
    x, y, r = SIZE / 2 + rng.uniform(-8, 8), SIZE / 2 + rng.uniform(-8, 8), rng.uniform(13, 22)
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=max(3, int(r / 3)))
    else:
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
        pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
    return image
