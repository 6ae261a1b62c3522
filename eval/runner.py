"""Evaluation in which every context is read once and compressed in every way from there.

A context is prefilled with nothing evicted while everything the policies need is recorded. Each cell then takes a fork
of that cache. A question-agnostic cell compresses it and only then sees the question; a question-aware one reads the
question first, and what is left answers. So all cells judge the same keys and values, and the prompt, which costs
most, is paid for once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..eviction import RaggedCache, Session, evict
from ..retention import RetentionGates
from .cases import EXTRA_TOKENS, Case
from .cells import Cell
from .decode import greedy_from_teacher, read
from .fidelity import kl_to_full, top1_agreement

__all__ = ["EXTRA_TOKENS", "Record", "check_inputs", "evaluate"]


@dataclass(frozen=True)
class Record:
    """What one cell did on one case.

    Attributes:
        task, length, index, seed, depth: the case.
        policy, scope, budget: the cell, its options and chunks with the policy (`Cell.name`).
        correct: the greedy generation contains the answer, or all of them.
        answer, prediction: what was hidden and what was generated.
        kl: KL to the full cache in nats, the mean over all positions of question and gold answer; of a question-aware
            cell over those of the answer, since the question is read before anything is evicted.
        top1: share of these positions where both have the same most likely token.
        entries: cache entries after compression, all layers and heads.
        bytes: bytes allocated for them. With a retention cell among the compared, every cell's entries carry the
            gates' 4 bytes, since they come from one prompt.
        kept_share: entries as a share of the full cache's.
        seconds: `compress_seconds + read_seconds`, the same work for every cell without chunks.
        compress_seconds: scoring, choosing and moving what stays; of a context read in chunks, reading it too.
        read_seconds: forwards over the question and the gold answer.
        score: how right the generation is, in [0, 1]: the share of the answers it contains.
        aware: whether the question was read before the compression.
    """

    task: str
    length: int
    index: int
    seed: int
    depth: float
    policy: str
    scope: str
    budget: float | int
    correct: bool
    answer: str
    prediction: str
    kl: float
    top1: float
    entries: int
    bytes: int
    kept_share: float
    seconds: float
    compress_seconds: float
    read_seconds: float
    score: float = 0.0
    aware: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Called with the case, the cell and its compressed cache before the question is read.
Inspect = Callable[[Case, Cell, RaggedCache], None]
# Called after every cell of every case.
Progress = Callable[[Record], None]


def check_inputs(
    model_config: Any, cells: Sequence[Cell], longest: int, gates: RetentionGates | None, question_tokens: int = 128
) -> None:
    """Refuses what cannot be evaluated, before any work and before the model is loaded.

    Args:
        model_config: the model's configuration.
        longest: tokens of the longest context.
        question_tokens: room for the question and the answer.

    Raises:
        ValueError: no cells, a context beyond the model's, or retention without gates.
    """
    if not cells:
        raise ValueError("nothing to evaluate: name at least one policy")
    limit = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and longest + question_tokens > limit:
        raise ValueError(
            f"contexts of {longest} tokens and {question_tokens} for the question exceed the model's {limit} "
            f"positions; lengths up to {limit - question_tokens} are accepted"
        )
    if gates is None and any("log_beta" in cell.policy.needs for cell in cells):
        raise ValueError("policy 'retention' needs gates: give the folder of a trained gates checkpoint")
    if any(cell.aware and cell.prefill_chunk for cell in cells):
        raise ValueError("a question-aware cell reads its prompt in one piece: leave out the @CHUNK or the awareness")


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    cases: Iterable[Case],
    cells: Sequence[Cell],
    gates: RetentionGates | None = None,
    sinks: int = 4,
    recent: int = 32,
    progress: Progress | None = None,
    inspect: Inspect | None = None,
) -> list[Record]:
    """Runs every cell on every case.

    Args:
        model: in eval mode, outside any `attach` or `evict` block.
        cases: contexts of any lengths; taken one by one, so a generator is fine.
        cells: what to compare; the full cache is measured as the reference whether or not it is among them.
        gates: for the retention policy.
        sinks, recent: first and last tokens that always stay.

    Returns:
        One record for each case and cell, in that order.
    Raises:
        ValueError: gates of another model, or retention without gates.
    """
    policies = {cell.policy for cell in cells if cell.evicts}
    records: list[Record] = []
    with evict(model, "full", 1.0, gates=gates, sinks=sinks, recent=recent, observe=tuple(policies)) as session:
        for case in cases:
            runner = _CaseRunner(model, tokenizer, session, case)
            for cell in cells:
                record = runner.run(cell, inspect)
                records.append(record)
                if progress is not None:
                    progress(record)
    return records


@dataclass(frozen=True)
class _Asked:
    """A cache up to the end of the question, and the logits `(question + gold answer, vocab)` after it."""

    cache: RaggedCache
    logits: torch.Tensor
    seconds: float


class _CaseRunner:
    """A case whose context has been read; `run` compresses a fork of it and asks."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, session: Session, case: Case) -> None:
        self.model, self.tokenizer, self.session, self.case = model, tokenizer, session, case
        self.cache = session.new_cache()
        read(model, self.cache, case.context_ids, logits_to_keep=1)
        self.reference = self._ask(self.cache.fork())

    def run(self, cell: Cell, inspect: Inspect | None) -> Record:
        case = self.case
        start = self._now()
        cache, question = self._compressed(cell)
        compressed = self._now()
        report = self.session.report(cache)
        if inspect is not None:
            inspect(case, cell, cache)
        # The full cache has just been asked, as the reference; all others are asked now.
        asked = self._ask(cache, question) if cell.evicts else self.reference
        prediction = self._generate(asked)
        first = len(case.question_ids) if cell.aware else 0
        score = case.score(prediction)
        return Record(
            task=case.task, length=case.length, index=case.index, seed=case.seed, depth=case.depth,
            policy=cell.name, scope=cell.scope, budget=cell.budget,
            correct=score == 1.0, answer=case.answer, prediction=prediction,
            kl=float(kl_to_full(self.reference.logits[first:], asked.logits[first:]).mean()),
            top1=float(top1_agreement(self.reference.logits[first:], asked.logits[first:]).double().mean()),
            entries=report.entries, bytes=report.bytes, kept_share=report.kept_share,
            seconds=compressed - start + asked.seconds,
            compress_seconds=compressed - start, read_seconds=asked.seconds,
            score=score, aware=cell.aware,
        )  # fmt: skip

    def _compressed(self, cell: Cell) -> tuple[RaggedCache, torch.Tensor | None]:
        """A cache as `cell` leaves it, and the logits `(question, vocab)` if it has read the question already."""
        case = self.case
        # Room for question and answer above the budget: nothing more is evicted while they are read.
        room = len(case.question_ids) + len(case.answer_ids) + case.extra_tokens
        if cell.prefill_chunk is not None:
            cache = self.session.new_cache()
            cache.plan = cache.plan.changed(
                cell.policy, cell.budget, scope=cell.scope, buffer=room, prefill_chunk=cell.prefill_chunk
            )
            read(self.model, cache, case.context_ids, logits_to_keep=1)
            return cache, None
        cache = self.cache.fork()
        question = read(self.model, cache, case.question_ids) if cell.aware and cell.evicts else None
        if cell.evicts:
            cache.compress(cell.policy, cell.budget, cell.scope, buffer=room)
        return cache, question

    def _ask(self, cache: RaggedCache, question: torch.Tensor | None = None) -> _Asked:
        """Reads question and gold answer after what `cache` holds; the answer on a fork, so that it can be undone.

        Args:
            question: the question's logits, if `cache` holds it already.
        """
        start = self._now()
        if question is None:
            question = read(self.model, cache, self.case.question_ids)
        gold = read(self.model, cache.fork(), self.case.answer_ids)
        return _Asked(cache, torch.cat([question, gold]), self._now() - start)

    def _generate(self, asked: _Asked) -> str:
        case = self.case

        def complete(generated: list[int]) -> bool:
            """The answer stands in the text and one more token shows that it does not go on ("481" in "4812")."""
            return case.accepts(self._text(generated)) and case.accepts(self._text(generated[:-1]))

        limit = len(case.answer_ids) + case.extra_tokens
        logits = asked.logits[len(case.question_ids) - 1 :]
        cache = asked.cache.fork()
        return self._text(greedy_from_teacher(self.model, cache, case.answer_ids, logits, limit, complete))

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
