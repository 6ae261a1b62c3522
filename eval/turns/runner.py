"""Runs conversations: a context is read once and compressed in every way; questions are asked on what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch

from tenure.checked import verify

from ...eviction import RaggedCache, Session, evict
from ...retention import RetentionGates
from ...retention.seams import end_tokens
from ..cases import ALL, ANY
from ..cells import Cell
from ..intervals import bootstrap_mean
from ..predictions import greedy_rows
from ..prompts import encode
from .conversation import ChatSeams, Conversation, Turn, chat_seams, turn_score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Protocol:
    """The way in which turns follow each other.

    Attributes:
        questions: "turns": each turn sees those before it; "shared": each question is asked on its own copy of the
            compressed context (SCBench's two modes).
        history: in "turns": the "gold" answers, as SCBench has it by default, or the model's "own", as MMDU.
        compress: the cache is compressed "once", when the context has been read, or at "each" end of a turn, to the
            budget of all tokens seen. Nothing is evicted in between.

    Raises:
        ValueError: something else, or a compression at each turn where there is no turn after another.
    """

    questions: Literal["turns", "shared"] = "turns"
    history: Literal["gold", "own"] = "gold"
    compress: Literal["once", "each"] = "once"

    def __post_init__(self) -> None:
        verify(self)
        if self.questions == "shared" and (self.compress == "each" or self.history == "own"):
            raise ValueError("questions='shared' have no history: leave out history and compress, or ask in turns")


@dataclass(frozen=True)
class TurnRecord:
    """The answer of a cell to a turn.

    Attributes:
        conversation, source, turn, kind: the conversation's name and set, the turn's number from 0, its kind.
        policy, scope, budget: the cell.
        score: see `turn_score`. answer, prediction: the gold answer and the generation.
        entries, kept_share: what the cache held when the question was asked, as `Report` has it.
        tokens: that the model had seen then.
    """

    conversation: str
    source: str
    turn: int
    kind: str
    policy: str
    scope: str
    budget: float | int
    score: float
    answer: str
    prediction: str
    entries: int
    kept_share: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def run_turns(
    model: PreTrainedModel, tokenizer: Any, conversations: Iterable[Conversation], cells: Sequence[Cell],
    gates: RetentionGates | None = None, protocol: Protocol = Protocol(), sinks: int | None = None,
    recent: int | None = None, progress: Callable[[TurnRecord], None] | None = None,
) -> list[TurnRecord]:  # fmt: skip
    """Runs every cell on every conversation.

    Args:
        model: in eval mode, outside any `attach` or `evict` block.
        cells: what to compare.
        gates: for the retention policy.
        sinks, recent: as in `evaluate`.
        progress: called with each record.

    Returns:
        One record for each conversation, cell and turn, in that order.
    Raises:
        ValueError: a question-aware cell, a conversation with images, or gates that are missing or another model's.
    """
    if any(cell.aware for cell in cells):
        raise ValueError("several questions share a context that is compressed before them: no question-aware cells")
    seams, records = chat_seams(tokenizer), []
    observed = tuple({cell.policy for cell in cells if cell.evicts})
    with evict(model, "full", 1.0, gates=gates, sinks=sinks, recent=recent, observe=observed) as session:
        for conversation in conversations:
            if conversation.images:
                raise ValueError(
                    f"conversation {conversation.name} of {conversation.source} has {len(conversation.images)} images; "
                    "accepted: conversations of text"
                )
            runner = _Conversation(model, tokenizer, session, seams, conversation, protocol)
            for cell in cells:
                for record in runner.run(cell):
                    records.append(record)
                    if progress is not None:
                        progress(record)
    return records


class _Conversation:
    """A conversation whose context has been read; `run` compresses a fork and asks the turns."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, session: Session, seams: ChatSeams, conversation: Conversation,
        protocol: Protocol,
    ) -> None:  # fmt: skip
        self.tokenizer, self.session, self.seams, self.given = tokenizer, session, seams, conversation
        self.protocol = protocol
        self._ending = end_tokens(model)
        self._context = [*seams.frame.before, *encode(tokenizer, conversation.context, plain=True)]
        self._cache = session.new_cache()
        if self._context:
            session.extend(self._cache, self._context, logits_to_keep=1)

    def run(self, cell: Cell) -> list[TurnRecord]:
        cache = self._compressed(cell)
        if self.protocol.questions == "shared":
            return [self._turn(cell, cache.fork(), number)[0] for number in range(len(self.given.turns))]
        records = []
        for number in range(len(self.given.turns)):
            record, answer = self._turn(cell, cache, number)
            records.append(record)
            if number + 1 < len(self.given.turns):
                self.session.extend(cache, [*answer, *encode(self.tokenizer, self.seams.between)], logits_to_keep=1)
                if cell.evicts and self.protocol.compress == "each":
                    cache.compress()
        return records

    def _compressed(self, cell: Cell) -> RaggedCache:
        cache = self._cache.fork() if self._context else self.session.new_cache()
        if not cell.evicts:
            return cache
        if cell.prefill_chunk is not None:
            cache = self.session.new_cache()
        cache.plan = cell.plan(cache.plan, buffer=2**31)  # nothing is evicted while turns are asked and answered
        if cell.prefill_chunk is not None and self._context:
            self.session.extend(cache, self._context, logits_to_keep=1)
        elif self._context and self.given.context:
            cache.compress()
        return cache

    def _turn(self, cell: Cell, cache: RaggedCache, number: int) -> tuple[TurnRecord, list[int]]:
        """The record, and the token ids that the history has as the answer; `cache` has read the question then."""
        turn, report = self.given.turns[number], cache.report() if cache.rows.tokens else None
        tokens = max(cache.rows.tokens, default=0)
        opening = "\n\n" if (self.given.context and number == 0) or self.protocol.questions == "shared" else ""
        ids = encode(self.tokenizer, opening + turn.question, plain=True) + encode(
            self.tokenizer, self.seams.frame.after
        )
        logits = self.session.extend(cache, ids, logits_to_keep=1)
        generated = self._answer(turn, cache.fork(), int(logits[0, -1].argmax()))
        text = self._text(generated)
        record = TurnRecord(
            self.given.name, self.given.source, number, turn.kind, cell.name, cell.scope, cell.budget,
            turn_score(text, turn.answers, turn.match), turn.written, text, 0 if report is None else report.entries,
            1.0 if report is None else report.kept_share, tokens,
        )  # fmt: skip
        if self.protocol.history == "own":
            return record, [token for token in generated if token not in self._ending]
        space = "" if self.seams.frame.after.endswith(("\n", " ")) else " "
        return record, encode(self.tokenizer, space + turn.written, plain=True)

    def _answer(self, turn: Turn, cache: RaggedCache, first: int) -> list[int]:
        early = self.protocol.history == "gold" and turn.match in (ALL, ANY)

        def right(tokens: list[int]) -> bool:
            return turn_score(self._text(tokens), turn.answers, turn.match) == 1.0

        def ends(tokens: list[int]) -> bool:
            """Ended by the model, full, or right also without the last token, as in `evaluate`."""
            if tokens[-1] in self._ending or len(tokens) >= turn.max_new_tokens:
                return True
            return early and right(tokens) and right(tokens[:-1])

        return [first] if ends([first]) else greedy_rows(self.session, cache, [[first]], ends)[0]

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def turn_rows(records: Sequence[TurnRecord], by_turn: bool = False) -> list[dict[str, Any]]:
    """Means of the scores by source, policy, scope and budget, and by turn if asked for, in order of appearance.

    A row has `source, policy, scope, budget, turn, score, low, high, n, kept_share`; turn is None for all turns. The
    interval is the bootstrap's over conversations, since turns of one are not independent; `n` counts conversations.
    """

    def key(record: TurnRecord) -> tuple[Any, ...]:
        turn = record.turn if by_turn else None
        return record.source, record.policy, record.scope, record.budget, turn

    groups: dict[tuple[Any, ...], list[TurnRecord]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    rows = []
    for (source, policy, scope, budget, turn), group in groups.items():
        ordered = sorted(group, key=lambda one: one.conversation)
        means = []
        for _, same in groupby(ordered, key=lambda one: one.conversation):
            scores = [one.score for one in same]
            means.append(sum(scores) / len(scores))
        found = bootstrap_mean(means)
        kept = sum(one.kept_share for one in group) / len(group)
        rows.append(
            {"source": source, "policy": policy, "scope": scope, "budget": budget, "turn": turn, "score": found.value}
            | {"low": found.low, "high": found.high, "n": len(means), "kept_share": kept}
        )
    return rows
