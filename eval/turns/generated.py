"""Generated conversations with the structure of SCBench, LongMemEval and MMDU, for use without a network."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from ..prompts import encode
from ..tasks.documents import SourceTexts, fit
from ..tasks.words import CITIES, GEMS, PEOPLE, Keys
from .conversation import Conversation, Turn
from .readers import LONGMEMEVAL_TASK, SCBENCH, session_text

# (statement, how it is asked, kind of value)
FACTS = (
    ("My locker opens with {value}.", "What opens my locker?", "number"),
    ("My badge shows the number {value}.", "Which number does my badge show?", "number"),
    ("My dentist is called {value}.", "What is my dentist called?", "person"),
    ("I moved my office to {value}.", "Where is my office now?", "city"),
    ("The stone in my ring is a {value}.", "Which stone is in my ring?", "gem"),
    ("I keep my boat in {value}.", "Where do I keep my boat now?", "city"),
)
QUESTION_TYPES = ("single-session-user", "single-session-assistant", "knowledge-update", "multi-session")
NO_IMAGES = "Picture {number} shows a {gem} on a table in {city}; {person} holds a card with the number {value}."


class ConversationBuilder:
    """Builds conversations of a family over the given texts for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        texts: filler, e.g. held-out essays.
        length: tokens of every context, exactly; of `album`, of all turns' questions together, about.
        turns: questions of a conversation; `sessions` has one, as LongMemEval.
        seed: conversations are a function of `(seed, family, index)`, the texts, the tokenizer, length and turns.

    Raises:
        ValueError: the texts are empty, or fewer than one turn.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], length: int, turns: int = 5, seed: int = 0) -> None:
        if turns < 1:
            raise ValueError(f"got {turns} turns; accepted: 1 or more")
        self.tokenizer, self.length, self.turns, self.seed = tokenizer, length, turns, seed
        self._source = SourceTexts(texts)

    def conversation(self, family: str, index: int) -> Conversation:
        """Conversation number `index` of a family.

        Raises:
            ValueError: an unknown family, or a length that cannot hold it.
        """
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
        return FAMILIES[family](self, random.Random(f"{self.seed}/{family}/{index}"), f"{family}/{self.seed}/{index}")

    def _kv(self, rng: random.Random, name: str) -> Conversation:
        """SCBench's retrieval of values: a JSON object of pairs, of which each turn asks one, each at its own depth."""
        keys = Keys(rng)
        pairs = [(keys.word(), keys.number(5)) for _ in range(self.turns)]
        depths = [(place + rng.random()) / self.turns for place in range(self.turns)]
        made: list[tuple[str, str]] = []

        def document(units: int) -> str:
            while len(made) < units:
                made.append((keys.word(), keys.number(5)))
            listed = made[:units]
            for depth, pair in sorted(zip(depths, pairs, strict=True)):
                listed.insert(int(depth * len(listed)), pair)
            return SCBENCH["scbench_kv"][0] + "{" + ", ".join(f'"{key}": "{value}"' for key, value in listed) + "} "

        context = fit(self.tokenizer, document, self.length, "kv")
        asked = rng.sample(pairs, len(pairs))
        turns = tuple(
            Turn(
                f'Key: "{key}"\nThe value associated with the specified key is:', (value,), kind="kv", max_new_tokens=16
            )
            for key, value in asked
        )
        return Conversation(name, "kv", context, turns)

    def _sessions(self, rng: random.Random, name: str) -> Conversation:
        """LongMemEval's history: dated chats, evidence in one or two of them, and a question at the end."""
        kind = QUESTION_TYPES[int(name.rpartition("/")[2]) % len(QUESTION_TYPES)]
        keys, run = Keys(rng), self._source.run(rng)
        draw = _values(rng, keys)
        (said, asked, drawn), (other, also, second) = rng.sample(FACTS, 2)
        value, later = draw[drawn](), draw[second]()
        told = [_told(said.format(value=value))]
        question, answers = asked, (value,)
        if kind == "single-session-assistant":
            told = [_suggested(value)]
            question = "Which word did you suggest to me for my notebook?"
        elif kind == "knowledge-update":
            answers = (draw[drawn](),)
            told.append(_told(said.format(value=answers[0])))
        elif kind == "multi-session":
            told.append(_told(other.format(value=later)))
            question, answers = f"{asked} And: {also[0].lower()}{also[1:]}", (value, later)
        depths = sorted(rng.random() for _ in told)

        def document(units: int) -> str:
            sentences = run(2 * units)
            chats = [_chat(first, second) for first, second in zip(sentences[::2], sentences[1::2], strict=True)]
            for depth, session in zip(reversed(depths), reversed(told), strict=True):
                chats.insert(int(depth * units), session)
            dated = zip(_dates(), chats, strict=False)
            history = "".join(session_text(place + 1, date, chat) for place, (date, chat) in enumerate(dated))
            return LONGMEMEVAL_TASK + history

        context = fit(self.tokenizer, document, self.length, "sessions")
        text = f"Current Date: 2030/01/01 (Tue) 10:00\nQuestion: {question}\nAnswer:"
        return Conversation(name, "sessions", context, (Turn(text, answers, kind=kind, max_new_tokens=32),))

    def _album(self, rng: random.Random, name: str) -> Conversation:
        """MMDU's dialogue: pictures come with the turns (described in words), and turns ask about earlier ones."""
        keys = Keys(rng)
        draw = _values(rng, keys)
        shown: list[str] = []
        turns = []
        for _ in range(self.turns):
            new: list[str] = []
            while not new or self._tokens(" ".join(new)) < self.length // self.turns:
                shown.append(keys.number(4))
                new.append(NO_IMAGES.format(number=len(shown), value=shown[-1], **{k: draw[k]() for k in _PICTURED}))
            place = rng.randrange(len(shown))
            question = f"{' '.join(new)}\n\nWhich number is on the card of picture {place + 1}?"
            turns.append(Turn(question, (shown[place],), kind="album", max_new_tokens=24))
        return Conversation(name, "album", "", tuple(turns))

    def _tokens(self, text: str) -> int:
        return len(encode(self.tokenizer, text, plain=True))


_PICTURED = ("gem", "city", "person")
FAMILIES: Mapping[str, Callable[[ConversationBuilder, random.Random, str], Conversation]] = {
    "kv": ConversationBuilder._kv,
    "sessions": ConversationBuilder._sessions,
    "album": ConversationBuilder._album,
}


def _values(rng: random.Random, keys: Keys) -> dict[str, Callable[[], str]]:
    unused = {name: rng.sample(words, len(words)) for name, words in (("city", CITIES), ("person", PEOPLE))}

    def take(name: str) -> str:
        taken = unused[name].pop()
        unused[name].insert(0, taken)  # the same word comes again after all others
        return taken

    return {
        "number": lambda: keys.number(5),
        "city": lambda: take("city"),
        "person": lambda: take("person"),
        "gem": lambda: rng.choice(GEMS),
        "key": keys.word,
    }


def _told(statement: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"{statement} Please remember that."},
        {"role": "assistant", "content": "I will remember it."},
    ]


def _suggested(word: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "Suggest a word that I can write on my notebook."},
        {"role": "assistant", "content": f"I suggest that you write {word} on your notebook."},
    ]


def _chat(first: str, second: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"Here is something I read: {first}"},
        {"role": "assistant", "content": f"It reminds me of this: {second}"},
    ]


def _dates() -> Iterator[str]:
    """Dates in ascending order, in LongMemEval's format."""
    import datetime

    start = datetime.datetime(2023, 1, 1, 9, 30)
    for day in count():
        yield (start + datetime.timedelta(days=day)).strftime("%Y/%m/%d (%a) %H:%M")
