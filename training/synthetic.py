"""Retrieval-style long documents over given text: facts inserted at random depths, questions about them afterwards.

Every example is a function of (seed, index) alone, so a run can be sharded and resumed without any state. The document
comes before, and is tokenised apart from, its questions: what the gates keep of it cannot depend on what is asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .chat import ChatFrame, starts_with_bos
from .corpus import SEPARATOR, Corpus, Sentence, both_layouts, fill, opening
from .data import Example
from .digests import digest
from .facts import FACT_KINDS, AnswerStyle, Fact, FactQuestion, draw, make_fact
from .templates import (
    ACKNOWLEDGEMENTS,
    ASIDES,
    FIRST_PERSON,
    INTRODUCTIONS,
    JOINTS,
    QUOTATION_QUESTIONS,
    REPETITION_INTRODUCTIONS,
    REPETITION_QUESTIONS,
    SPEAKERS,
)
from .vocabulary import VOCABULARY


@dataclass(frozen=True)
class DocumentForms:
    """Sizes of the parts of synthetic documents; ranges are inclusive.

    Attributes:
        introduction_share: share of the retrieval documents that begin with an introduction.
        opening_share: share of a document's tokens whose sentences are certain to be in it; quotations come from them.
        attempts: drawings of facts until one of them fits together with its question.
        turn_sentences: sentences of the text in one turn of a conversation.
        list_share: of the repeated passages, the share that are lists of words; the others are sentences of the text.
        cycle_words: words of a repeated list; no repeated passage has more than the greatest number.
        cycle_sentences: sentences of a repeated passage of the text.
        shown, expected: words of a repeated passage that a question shows, and that must follow.
        least_repeated: tokens that a document of a repeated passage has at least, with its questions.
    """

    introduction_share: float = 0.3
    opening_share: float = 0.3
    attempts: int = 50
    turn_sentences: tuple[int, int] = (1, 4)
    list_share: float = 0.7
    cycle_words: tuple[int, int] = (24, 90)
    cycle_sentences: tuple[int, int] = (2, 5)
    shown: tuple[int, int] = (4, 8)
    expected: tuple[int, int] = (6, 16)
    least_repeated: int = 512


_WORDS = tuple(
    word for name in ("noun", "adjective", "animal", "color", "material", "verb") for word in VOCABULARY[name]
)

Encode = Callable[[str], list[int]]


def turns(
    stream: Iterator[Sentence], speakers: tuple[str, str], encode: Encode, rng: random.Random,
    sentences_of_turn: tuple[int, int],
) -> Iterator[Sentence]:  # fmt: skip
    """The text as turns of two speakers, each a piece that begins on a line of its own."""
    number = 0
    while True:
        sentences = [next(stream) for _ in range(rng.randint(*sentences_of_turn))]
        said = " ".join(sentence.text.strip() for sentence in sentences)
        text = f"\n{speakers[number % 2]}: {' '.join(said.split())}"
        number += 1
        yield Sentence(text, encode(text))


def told_fact(speakers: tuple[str, str], style: AnswerStyle, rng: random.Random, used: set[str]) -> Fact | None:
    """A fact that the first speaker states and the second acknowledges; None when its statement was used."""
    statement, question, answer, slot = rng.choice(FIRST_PERSON)
    if statement in used:
        return None
    used.add(statement)
    value = draw(slot, rng, used)
    aside, reply = rng.choice(ASIDES), rng.choice(ACKNOWLEDGEMENTS)
    said = statement.format(value=value)
    told = aside.format(said=said) if aside else said
    passage = f"\n{speakers[0]}: {told}\n{speakers[1]}: {reply}"
    asked = style.question(
        "told", question.format(speaker=speakers[0]), (value,), answer.format(speaker=speakers[0], value=value)
    )
    return Fact("told", (passage,), (asked,))


@dataclass(frozen=True)
class Repeated:
    """A passage that is repeated over and over, the same words in the same order.

    Attributes:
        words: one round of it.
        joint: text between two words, also between the rounds.
        introduction: text before the passage; may be empty.
        forms: numbers of words that questions show and expect.
    """

    words: tuple[str, ...]
    joint: str
    introduction: str
    forms: DocumentForms

    @classmethod
    def draw(
        cls, stream: Iterator[Sentence], room: int, encode: Encode, rng: random.Random, forms: DocumentForms
    ) -> Repeated:
        """A list of words, or sentences of the text, of which three rounds fit into `room` tokens."""
        words = rng.sample(_WORDS, rng.randint(*forms.cycle_words))
        if rng.random() >= forms.list_share:
            sentences = rng.randint(*forms.cycle_sentences)
            words = [word for _ in range(sentences) for word in next(stream).text.split()][: forms.cycle_words[1]]
        joint = rng.choice(JOINTS)
        while len(encode(joint.join(words))) > room // 3 and len(words) > 1:
            words = words[: len(words) // 2]
        return cls(tuple(words), joint, rng.choice(REPETITION_INTRODUCTIONS), forms)

    def tokens(self, room: int, encode: Encode) -> list[int]:
        """`room` token ids of it; the last round may be cut off anywhere."""
        rounds = 2 + room // len(encode(self.joint + self.joint.join(self.words)))
        text = self.joint.join(self.words * rounds)
        return encode(f"{self.introduction}\n\n{text}" if self.introduction else text)[:room]

    def question(self, rng: random.Random) -> FactQuestion:
        """Some words of it are shown; the answer is those and the ones that follow, maybe in the next round."""
        shown, expected = rng.randint(*self.forms.shown), rng.randint(*self.forms.expected)
        start = rng.randrange(len(self.words))
        turned = [self.words[(start + place) % len(self.words)] for place in range(shown + expected)]
        question = rng.choice(REPETITION_QUESTIONS).format(start=self.joint.join(turned[:shown]))
        return FactQuestion("repetition", question, self.joint.join(turned), (self.joint.join(turned),))


@dataclass(frozen=True)
class Conversation:
    """Questions and answers as token ids, the targets among them, and the token range of every answer."""

    ids: list[int]
    loss_mask: list[bool]
    answers: list[tuple[int, int]]


@dataclass(frozen=True)
class Questioner:
    """Asks in the turns of `frame`."""

    frame: ChatFrame

    def draw(
        self, facts: Sequence[Fact], number: tuple[int, int], room: float, rng: random.Random
    ) -> list[FactQuestion]:
        """Questions within `room` tokens: one of each fact while there is room, then second ones; in random order.

        Args:
            number: range (inclusive) of their number.
        """
        ranked = [q for rank in range(2) for fact in facts for q in fact.questions[rank : rank + 1]]
        chosen = self.within(ranked, rng.randint(*number), room)
        rng.shuffle(chosen)
        return chosen

    def within(self, questions: Sequence[FactQuestion], number: int, room: float) -> list[FactQuestion]:
        """The first `number` of those that fit into `room` tokens together with their answers."""
        chosen: list[FactQuestion] = []
        for question in questions:
            cost = len(self._encode(question.text)) + len(self._encode(question.answer)) + self.frame.turn_tokens()
            if len(chosen) < number and cost <= room:
                chosen.append(question)
                room -= cost
        return chosen

    def conversation(self, questions: Sequence[FactQuestion]) -> Conversation:
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


@dataclass(frozen=True)
class Answer:
    """The place of a question's answer in an example: tokens `start` to `stop` (the end-of-turn token excluded)."""

    question: FactQuestion
    start: int
    stop: int


@dataclass(frozen=True)
class RetrievalDocument:
    """An example with its answers; `document_stop` is the number of tokens before the first question."""

    example: Example
    answers: tuple[Answer, ...]
    document_stop: int


@dataclass
class RetrievalDocuments:
    """Endless training examples made from `texts`; `documents[i]` depends on the fields and `i` only.

    Layout, in the tokenizer's chat template (plain `Question: … Answer: …` lines without one): the user's turn holds
    the document and the first question, the assistant's turn a short answer, further turns the other questions. Targets
    are the answers and the token that ends their turn.

    Args:
        texts: source texts; the more the better, they are repeated as needed.
        tokenizer: a transformers tokenizer.
        lengths: target lengths in tokens; each example draws one and is at most that long, and nearly that long.
        seed: another seed gives other documents.
        facts, questions: range (inclusive) of the number of facts and of questions per document.
        kinds: kinds of facts, see `facts.FACT_KINDS`.
        group_share: share of the facts that are groups of 3 to 6 sentences differing in key and value only.
        text_share: share of the examples that are plain text, with loss on their second half.
        prompt_share: share of the examples whose document (or first half of the text) is read without gates: they act
            only where its compressed cache would be used, as when a prompt is evicted once at its end.
        dialogue_share: share of the documents that are a conversation in which a speaker states facts about herself.
        repetition_share: share of the documents that are one passage repeated, asked for from any place in it.
        brief_share: share of the documents whose questions are answered without the question's words.
        fact_share, question_share: most of a document's tokens that facts, and questions with answers, may take; they
            lower the number of facts and questions in short documents.
        forms: sizes of the documents' parts.

    Raises:
        ValueError: no text, an unknown kind, an empty range, a length too short to hold a fact and its question.
    """

    texts: Sequence[str]
    tokenizer: Any
    lengths: Sequence[int] = (1024,)
    seed: int = 0
    facts: tuple[int, int] = (4, 8)
    questions: tuple[int, int] = (3, 6)
    kinds: Sequence[str] = FACT_KINDS
    group_share: float = 0.3
    text_share: float = 0.1
    prompt_share: float = 0.0
    dialogue_share: float = 0.0
    repetition_share: float = 0.0
    brief_share: float = 0.1
    fact_share: float = 0.25
    question_share: float = 0.35
    forms: DocumentForms = field(default_factory=DocumentForms)
    _corpora: tuple[Corpus, ...] = field(init=False, repr=False)
    _frame: ChatFrame = field(init=False, repr=False)
    _questioner: Questioner = field(init=False, repr=False)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(FACT_KINDS))
        if unknown or not self.kinds:
            raise ValueError(
                f"unknown kinds of facts {unknown or list(self.kinds)}; choose from {', '.join(FACT_KINDS)}"
            )
        for name, (low, high) in (("facts", self.facts), ("questions", self.questions)):
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be a range (low, high) with 1 <= low <= high, got {(low, high)}")
        if not self.lengths or min(self.lengths) < 128:
            raise ValueError(f"lengths must be token counts of at least 128, got {list(self.lengths)}")
        if self.fact_share + self.question_share > 0.65:
            raise ValueError(
                f"fact_share and question_share leave no room for the text: {self.fact_share} + {self.question_share},"
                " at most 0.65 together"
            )
        if min(self.dialogue_share, self.repetition_share) < 0 or self.dialogue_share + self.repetition_share > 1:
            raise ValueError(
                "dialogue_share and repetition_share are shares of the documents, at most 1 together, got "
                f"{self.dialogue_share} and {self.repetition_share}"
            )
        if self.repetition_share and min(self.lengths) < self.forms.least_repeated:
            raise ValueError(
                f"repetition_share accepts lengths of {self.forms.least_repeated} tokens or more, got "
                f"{list(self.lengths)}: three rounds of a passage and a question have to fit"
            )
        # Documents are laid out in both ways so that a line break is no sign of what belongs to the text.
        self._corpora = both_layouts(self.texts, self.tokenizer)
        self._frame = ChatFrame(self.tokenizer)
        self._questioner = Questioner(self._frame)

    def __getitem__(self, index: int) -> Example:
        return self.example(index)

    def digest(self) -> str:
        """Digest of the texts and of one document, which depends on tokenizer and generator."""
        return digest([*(text.encode() for text in self.texts), repr(self.example(0).input_ids).encode()])

    def example(self, index: int) -> Example:
        return self.document(index).example

    def document(self, index: int) -> RetrievalDocument:
        """The example at `index` (any non-negative number) with the places of its answers."""
        rng = random.Random(f"{self.seed}:{index}")
        length = rng.choice(list(self.lengths))
        corpus = rng.choice(self._corpora)
        if rng.random() < self.text_share:
            return self._plain(corpus, length, rng)
        form = rng.random() if self.dialogue_share + self.repetition_share else 1.0
        if form < self.repetition_share:
            return self._repetition(corpus, length, rng)
        return self._retrieval(corpus, length, rng, form < self.repetition_share + self.dialogue_share)

    def _plain(self, corpus: Corpus, length: int, rng: random.Random) -> RetrievalDocument:
        ids = [self.tokenizer.bos_token_id] if starts_with_bos(self.tokenizer) else []
        stream = corpus.stream(rng)
        ids += self._encode(next(stream).text.lstrip())
        while len(ids) < length:
            ids += next(stream).ids
        half = length // 2
        prompt_tokens = half - 1 if rng.random() < self.prompt_share else 0
        mask = [i >= half for i in range(length)]
        return RetrievalDocument(Example(ids[:length], mask, "text", prompt_tokens=prompt_tokens), (), length)

    def _repetition(self, corpus: Corpus, length: int, rng: random.Random) -> RetrievalDocument:
        head = self._frame.pieces(1)[0]
        room = length - len(head)
        most = int((1 - self.question_share) * room)
        passage = Repeated.draw(corpus.stream(rng), most, self._encode, rng, self.forms)
        asked = [passage.question(rng) for _ in range(rng.randint(*self.questions))]
        questions = self._questioner.within(asked, len(asked), self.question_share * room) or asked[:1]
        tail = self._questioner.conversation(questions)
        return self._asked(head + passage.tokens(room - len(tail.ids), self._encode), questions, tail, rng)

    def _retrieval(self, corpus: Corpus, length: int, rng: random.Random, dialogue: bool) -> RetrievalDocument:
        stream = corpus.stream(rng)
        speakers = rng.choice(SPEAKERS) if dialogue else None
        if speakers:
            stream = turns(stream, speakers, self._encode, rng, self.forms.turn_sentences)
        introduction = f"{rng.choice(INTRODUCTIONS)}{SEPARATOR}" if rng.random() < self.forms.introduction_share else ""
        head = self._frame.pieces(1)[0] + self._encode(introduction)
        first, stream = opening(stream, self.forms.opening_share * (length - len(head)), self._encode)
        for _ in range(self.forms.attempts):
            facts, passages = self._draw_facts(first, self.fact_share * (length - len(head)), rng, speakers)
            questions = self._questioner.draw(facts, self.questions, self.question_share * (length - len(head)), rng)
            if questions:
                break
        else:
            raise ValueError(f"a length of {length} tokens is too short for a fact and its question")
        tail = self._questioner.conversation(questions)
        room = length - len(head) - len(tail.ids) - sum(len(part.ids) for fact in passages for part in fact)
        sentences = fill(first, stream, corpus, room, rng)
        document = head + [token for sentence in _insert(sentences, passages, rng) for token in sentence.ids]
        return self._asked(document, questions, tail, rng)

    def _asked(
        self, document: list[int], questions: Sequence[FactQuestion], tail: Conversation, rng: random.Random
    ) -> RetrievalDocument:
        """The document and the conversation about it, as an example."""
        answers = tuple(
            Answer(question, len(document) + start, len(document) + stop)
            for question, (start, stop) in zip(questions, tail.answers, strict=True)
        )
        prompt_tokens = len(document) if rng.random() < self.prompt_share else 0
        mask = [False] * len(document) + tail.loss_mask
        example = Example(document + tail.ids, mask, "retrieval", prompt_tokens=prompt_tokens)
        return RetrievalDocument(example, answers, len(document))

    def _draw_facts(
        self, first: list[Sentence], room: float, rng: random.Random, speakers: tuple[str, str] | None
    ) -> tuple[list[Fact], list[list[Sentence]]]:
        """Facts (a speaker's, if any) whose passages take up to `room` tokens, and those; `first` may be quoted."""
        facts: list[Fact] = []
        passages: list[list[Sentence]] = []
        used: set[str] = set()
        number, style = rng.randint(*self.facts), AnswerStyle.draw(self.brief_share, rng)
        for _ in range(4 * number):
            if speakers:
                fact = told_fact(speakers, style, rng, used)
            else:
                kind = self._draw_kind(rng)
                fact = _quotation(first, used, rng) if kind == "quotation" else make_fact(kind, style, rng, used)
            if fact is None:
                continue
            parts = [Sentence(text, self._encode(text)) for text in map(_spaced, fact.passages)]
            cost = sum(len(part.ids) for part in parts)
            if cost <= room:
                facts.append(fact)
                passages.append(parts)
                room -= cost
            if len(facts) == number:
                break
        return facts, passages

    def _draw_kind(self, rng: random.Random) -> str:
        others = [kind for kind in self.kinds if kind != "group"]
        if "group" in self.kinds and (not others or rng.random() < self.group_share):
            return "group"
        return rng.choice(others)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _spaced(passage: str) -> str:
    return passage if passage[0].isspace() else f" {passage}"


def _quotation(first: list[Sentence], used: set[str], rng: random.Random) -> Fact | None:
    """A fact that the text itself states: a sentence, asked for by how it begins; None when none is suited."""
    beginnings = [" ".join(sentence.text.split()[:5]) for sentence in first]
    candidates = [
        (start, sentence.text.strip())
        for start, sentence in zip(beginnings, first, strict=True)
        if 9 <= len(sentence.text.split()) <= 25
        and beginnings.count(start) == 1
        and '"' not in sentence.text
        and start not in used
    ]
    if not candidates:
        return None
    start, text = rng.choice(candidates)
    used.add(start)
    question = rng.choice(QUOTATION_QUESTIONS).format(start=start)
    return Fact("quotation", (), (FactQuestion("quotation", question, text, (text,)),))


def _insert(sentences: list[Sentence], passages: list[list[Sentence]], rng: random.Random) -> list[Sentence]:
    """Passages after sentences at random depths; the passages of one fact stay in order."""
    slots: list[list[Sentence]] = [[] for _ in sentences]
    for fact in passages:
        places = sorted(rng.randrange(len(slots)) for _ in fact)
        for place, passage in zip(places, fact, strict=True):
            slots[place].append(passage)
    return [part for sentence, slot in zip(sentences, slots, strict=True) for part in (sentence, *slot)]
