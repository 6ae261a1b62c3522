"""One case: its context is read once, compressed in many ways, and asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..eviction import RaggedCache, Session
from ..retention.seams import end_tokens
from .cases import Case
from .cells import Cell
from .decode import agreed, greedy_rows
from .fidelity import kl_to_full, top1_agreement
from .record import Record


class _Compressed:
    """A cell's cache, the logits `(question, vocab)` if it has read the question already, and what that took."""

    def __init__(self, cell: Cell, cache: RaggedCache, question: torch.Tensor | None, seconds: float) -> None:
        self.cell, self.cache, self.question, self.seconds = cell, cache, question, seconds
        self.report = cache.report()


class _Asked:
    """A cache whose rows have read the question, and the logits `(rows, question + gold answer, vocab)` after it."""

    def __init__(self, cache: RaggedCache, logits: torch.Tensor, seconds: float) -> None:
        self.cache, self.logits, self.seconds = cache, logits, seconds


class CaseRunner:
    """A case whose context has been read; `run` compresses forks of it and asks them.

    Args:
        session: of the block in which everything happens; it records what the cells' policies need.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, session: Session, case: Case) -> None:
        self.model, self.tokenizer, self.session, self.case = model, tokenizer, session, case
        self._ending = end_tokens(model)
        self.cache = session.new_cache()
        self._read(self.cache, case.context_ids, 1)
        self.reference = self._ask(self.cache.fork())

    def run(self, cells: Sequence[Cell], inspect: Callable[[Case, Cell, RaggedCache], None] | None) -> list[Record]:
        """The records of `cells`, asked in one batch: all evict, or it is one; all have the same awareness."""
        compressed = [self._compressed(cell) for cell in cells]
        if inspect is not None:
            for each in compressed:
                inspect(self.case, each.cell, each.cache)
        # The full cache has just been asked, as the reference; all others are asked now.
        asked = self._ask_all(compressed) if cells[0].evicts else self.reference
        predictions = self._generate(asked)
        return [
            self._record(each, asked.logits[row], predictions[row], asked.seconds / len(cells))
            for row, each in enumerate(compressed)
        ]

    def _record(self, done: _Compressed, logits: torch.Tensor, prediction: str, read_seconds: float) -> Record:
        case, cell, report = self.case, done.cell, done.report
        first = len(case.question_ids) if cell.aware else 0
        full, logits = self.reference.logits[0, first:], logits[first:]
        score = case.score(prediction)
        return Record(
            task=case.task, length=case.length, index=case.index, seed=case.seed, depth=case.depth,
            policy=cell.name, scope=cell.scope, budget=cell.budget,
            correct=score == 1.0, answer=case.answer, prediction=prediction,
            kl=float(kl_to_full(full, logits).mean()),
            top1=float(top1_agreement(full, logits).double().mean()),
            entries=report.entries, bytes=report.bytes, kept_share=report.kept_share,
            seconds=done.seconds + read_seconds,
            compress_seconds=done.seconds, read_seconds=read_seconds,
            score=score, aware=cell.aware,
        )  # fmt: skip

    def _compressed(self, cell: Cell) -> _Compressed:
        """A cache as `cell` leaves it."""
        case, start = self.case, self._now()
        # Room for question and answer above the budget: nothing more is evicted while they are read.
        room = len(case.question_ids) + len(case.answer_ids) + case.extra_tokens
        if cell.prefill_chunk is not None:
            cache = self.session.new_cache()
            cache.plan = cache.plan.changed(
                cell.policy, cell.budget, scope=cell.scope, buffer=room, prefill_chunk=cell.prefill_chunk
            )
            self._read(cache, case.context_ids, 1)
            return _Compressed(cell, cache, None, self._now() - start)
        cache = self.cache.fork()
        question = self._read(cache, case.question_ids)[0] if cell.aware and cell.evicts else None
        if cell.evicts:
            cache.compress(cell.policy, cell.budget, cell.scope, buffer=room)
        return _Compressed(cell, cache, question, self._now() - start)

    def _ask_all(self, compressed: Sequence[_Compressed]) -> _Asked:
        questions = [each.question for each in compressed if each.question is not None]
        start = self._now()
        caches = [each.cache for each in compressed]
        cache = caches[0] if len(caches) == 1 else self.session.stack(caches)
        asked = self._ask(cache, torch.stack(questions) if questions else None)
        asked.seconds = self._now() - start
        return asked

    def _ask(self, cache: RaggedCache, question: torch.Tensor | None = None) -> _Asked:
        """Reads question and gold answer after what `cache` holds; the answer on a fork, so that it can be undone.

        Args:
            question: the question's logits, if `cache` holds it already.
        """
        start = self._now()
        if question is None:
            question = self._read(cache, self.case.question_ids)
        gold = self._read(cache.fork(), self.case.answer_ids)
        return _Asked(cache, torch.cat([question, gold], 1), self._now() - start)

    def _generate(self, asked: _Asked) -> list[str]:
        case = self.case
        limit = len(case.answer_ids) + case.extra_tokens

        def ends(generated: list[int]) -> bool:
            """Full, ended by the model, or the answer stands in the text and one more token shows that it does not
            go on ("481" in "4812")."""
            if generated[-1] in self._ending or len(generated) >= limit:
                return True
            return case.accepts(self._text(generated)) and case.accepts(self._text(generated[:-1]))

        logits = asked.logits[:, len(case.question_ids) - 1 :]
        begun = [agreed(case.answer_ids, one, ends) for one in logits]
        answers = [tokens for tokens, _ in begun]
        left = [row for row, (_, ended) in enumerate(begun) if not ended]
        if left:
            cache = asked.cache.fork()
            if len(left) < len(begun):
                cache.select_rows(torch.tensor(left))
            begun_rows = [answers[row] for row in left]
            for row, tokens in zip(left, greedy_rows(self.session, cache, begun_rows, ends), strict=True):
                answers[row] = tokens
        return [self._text(tokens) for tokens in answers]

    def _read(self, cache: RaggedCache, ids: Sequence[int], logits_to_keep: int = 0) -> torch.Tensor:
        return self.session.extend(cache, ids, logits_to_keep=logits_to_keep)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
