"""Facts for synthetic training documents: passages to insert into a text, and the questions about them."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from .templates import ALIASES, BRIEF, BRIEF_ANSWER, FAMILIES, RECORDS, REPEATS, SENTENCE, Family
from .vocabulary import VOCABULARY

SINGLE_KINDS = tuple(dict.fromkeys(family.kind for family in FAMILIES if family.kind != "multi_value"))
FACT_KINDS = (*SINGLE_KINDS, "multi_value", "group", "record", "alias", "repeat", "quotation")
"""Kinds of facts. `quotation` asks for a sentence of the text itself and is made where the text is known."""


@dataclass(frozen=True)
class FactQuestion:
    """A question, its answer, and the values (verbatim pieces of the document) that the answer consists of."""

    kind: str
    text: str
    answer: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """Passages to insert into a document, in this order, and the questions that they answer (one of them or all)."""

    kind: str
    passages: tuple[str, ...]
    questions: tuple[FactQuestion, ...]


def _pick(rng: random.Random, vocabulary: str) -> str:
    return rng.choice(VOCABULARY[vocabulary])


def _articles(text: str) -> str:
    """`a` before a vowel becomes `an`: templates say `a {value}` whatever the value."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _digits(rng: random.Random) -> str:
    length = rng.randint(4, 7)
    return str(rng.randrange(10 ** (length - 1), 10**length))


def _alphanumeric(rng: random.Random) -> str:
    letters = "".join(rng.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=rng.randint(2, 3)))
    return rng.choice(("{0}-{1}", "{0}{1}", "{1}-{0}", "{0}-{1}-{2}")).format(
        letters, rng.randrange(100, 10000), rng.choice("ABCDEFGHKMPRT")
    )


def _time(rng: random.Random) -> str:
    return f"{rng.randint(1, 12)}:{rng.randrange(0, 60):02d} {rng.choice(('am', 'pm'))}"


def _coinage(rng: random.Random) -> str:
    return "".join(rng.choices(VOCABULARY["syllable"], k=rng.randint(2, 3)))


def _saying(rng: random.Random) -> str:
    shape = rng.choice(
        ("Never {v} a {a} {n}", "Always {v} the {a} {n} first", "Do not {v} the {n} in {m}", "{v} every {a} {n}")
    )
    saying = shape.format(v=_pick(rng, "verb"), a=_pick(rng, "adjective"), n=_pick(rng, "noun"), m=_pick(rng, "month"))
    return _articles(saying[0].upper() + saying[1:])


def _definition(rng: random.Random) -> str:
    word = _pick(rng, "adjective")
    article = "an" if word[0] in "aeiou" else "a"
    return f"{article} {word} {_pick(rng, 'object')} for {_pick(rng, 'tool_use')}"


def _quantity(rng: random.Random) -> str:
    return rng.choice(
        (f"{rng.randrange(20, 900, 5)} grams", f"{rng.randint(2, 19)} spoons", f"{rng.randint(2, 12)} cups")
    )


_SLOTS: dict[str, Callable[[random.Random], str]] = {
    "person": lambda rng: f"{_pick(rng, 'first_name')} {_pick(rng, 'last_name')}",
    "site": lambda rng: f"{_pick(rng, rng.choice(('city', 'last_name')))} {_pick(rng, 'facility')}",
    "item": lambda rng: f"{_pick(rng, 'material')} {_pick(rng, 'object')}",
    "gathering": lambda rng: f"{_pick(rng, 'city')} {_pick(rng, 'event')}",
    "company": lambda rng: f"{_pick(rng, 'last_name')} {_pick(rng, 'company_kind')}",
    "setting": lambda rng: f"{_pick(rng, 'setting')}{rng.choice('_.-')}{_pick(rng, 'setting_field')}",
    "three_words": lambda rng: " ".join(rng.sample(VOCABULARY["noun"], 3)),
    "date": lambda rng: f"{_pick(rng, 'month')} {rng.randint(1, 28)}",
    "price": lambda rng: f"${rng.randint(2, 999)}.{rng.randrange(0, 100, 5):02d}",
    "phone": lambda rng: f"{rng.randrange(201, 990)}-555-{rng.randrange(0, 10000):04d}",
    "digits": _digits,
    "alphanumeric": _alphanumeric,
    "time": _time,
    "coinage": _coinage,
    "saying": _saying,
    "definition": _definition,
    "quantity": _quantity,
}


def draw(slot: str, rng: random.Random, used: set[str]) -> str:
    """A word for `slot` (a vocabulary's name, or something made up such as `digits`) that is not in `used` yet.

    `used` is extended. As long as a slot has unused words no key and no value occurs twice in a document, so that every
    question has one answer.
    """
    make = _SLOTS.get(slot, lambda rng: _pick(rng, slot))
    word = make(rng)
    for _ in range(100):
        if word not in used:
            break
        word = make(rng)
    used.add(word)
    return word


@dataclass(frozen=True)
class AnswerStyle:
    """The form of a document's answers, the value alone or a whole sentence, and the instruction for it.

    Even `brief` answers begin with a few fixed words: small models put some there whatever the instruction, and a
    first token that the model would never write teaches nothing about what to keep.
    """

    brief: bool
    instruction: str

    @classmethod
    def draw(cls, brief_share: float, rng: random.Random) -> "AnswerStyle":
        brief = rng.random() < brief_share
        return cls(brief, rng.choice(BRIEF if brief else SENTENCE))

    def question(self, kind: str, text: str, values: tuple[str, ...], sentence: str) -> FactQuestion:
        answer = BRIEF_ANSWER.format(value=_listing(values)) if self.brief else sentence
        return FactQuestion(kind, f"{text} {self.instruction}".rstrip(), answer, values)


def _listing(values: tuple[str, ...]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def _keyed(family: Family, kind: str, count: int, style: AnswerStyle, rng: random.Random, used: set[str]) -> Fact:
    """`count` statements of one template under different keys; two of them can be asked for."""
    statement, question, *sentence = rng.choice(family.templates)
    words = {"extra": _pick(rng, family.extra)} if family.extra else {}
    passages, questions = [], []
    for _ in range(count):
        words |= {"key": draw(family.key, rng, used), "value": draw(family.value, rng, used)}
        passages.append(_articles(statement.format(**words)))
        answer = _articles((sentence[0] if sentence else statement).format(**words))
        questions.append(style.question(kind, _articles(question.format(**words)), (words["value"],), answer))
    rng.shuffle(questions)
    return Fact(kind, tuple(passages), tuple(questions[:2]))


def _multi_value(family: Family, style: AnswerStyle, rng: random.Random, used: set[str]) -> Fact:
    statement, question, sentence = rng.choice(family.templates)
    key = draw(family.key, rng, used)
    values = tuple(draw(family.value, rng, used) for _ in range(rng.randint(2, 3)))
    passages = tuple(_articles(statement.format(key=key, value=value)) for value in values)
    text = f"{question.format(key=key)} {rng.choice(('Name all.', 'List all of them in order.', 'Give every one.'))}"
    answer = _articles(sentence.format(key=key, value=_listing(values)))
    return Fact(family.kind, passages, (style.question(family.kind, text, values, answer),))


def _record(rng: random.Random, used: set[str]) -> Fact:
    line, question = rng.choice(RECORDS)
    slot = rng.choice(("digits", "alphanumeric", "city", "noun", "color"))
    entries = [(draw("setting", rng, used), draw(slot, rng, used)) for _ in range(rng.randint(3, 5))]
    lines = [line.format(key=key, value=value) for key, value in entries]
    questions = tuple(
        FactQuestion("record", question.format(key=entries[i][0]), lines[i], (lines[i],))
        for i in rng.sample(range(len(entries)), 2)
    )
    return Fact("record", ("\n" + "\n".join(lines) + "\n",), questions)


def _alias(style: AnswerStyle, rng: random.Random, used: set[str]) -> Fact:
    link, statement, question, sentence = rng.choice(ALIASES)
    words = {"alias": draw("site", rng, used), "key": draw("site", rng, used), "value": draw("digits", rng, used)}
    passages = [link.format(**words), statement.format(**words)]
    rng.shuffle(passages)
    asked = style.question("alias", question.format(**words), (words["value"],), sentence.format(**words))
    return Fact("alias", tuple(passages), (asked,))


def _repeat(rng: random.Random, used: set[str]) -> Fact:
    sentence, question = rng.choice(REPEATS)
    words = {name: _pick(rng, name) for name in VOCABULARY}
    words["key"] = draw("noun", rng, used)
    sentence, text = _articles(sentence.format(**words)), _articles(question.format(**words))
    return Fact("repeat", (sentence,), (FactQuestion("repeat", text, sentence, (sentence,)),))


def make_fact(kind: str, style: AnswerStyle, rng: random.Random, used: set[str]) -> Fact:
    """One fact of `kind` (any of `FACT_KINDS` but `quotation`), drawn from `rng`; its words are added to `used`."""
    if kind == "record":
        return _record(rng, used)
    if kind == "alias":
        return _alias(style, rng, used)
    if kind == "repeat":
        return _repeat(rng, used)
    if kind == "multi_value":
        return _multi_value(rng.choice([family for family in FAMILIES if family.kind == kind]), style, rng, used)
    base, count = (rng.choice(SINGLE_KINDS), rng.randint(3, 6)) if kind == "group" else (kind, 1)
    return _keyed(rng.choice([family for family in FAMILIES if family.kind == base]), kind, count, style, rng, used)
