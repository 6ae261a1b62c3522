"""Evaluation in which every context is read once and compressed in every way from there.

A context is prefilled with nothing evicted while everything the policies need is recorded. Each cell then takes a fork
of that cache. A question-agnostic cell compresses it and only then sees the question; a question-aware one reads the
question first, and answers from what is left. So all cells judge the same keys and values, and the prompt, which costs
most, is paid for once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from ..eviction import RaggedCache, Session, evict
from ..retention import RetentionGates
from ..retention.seams import end_tokens
from .cases import Case, Record
from .cells import Cell
from .predictions import agreed, greedy_rows, kl_to_full, top1_agreement

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
        most = limit - question_tokens
        accepted = f"lengths up to {most} are" if most > 0 else f"a model with more than {question_tokens} is"
        raise ValueError(
            f"contexts of {longest} tokens and {question_tokens} for the question exceed the model's {limit} "
            f"positions; {accepted} accepted"
        )
    if gates is None and any("log_beta" in cell.policy.needs for cell in cells):
        raise ValueError("policy 'retention' needs gates: give the folder of a trained gates checkpoint")
    if any(cell.aware and cell.prefill_chunk for cell in cells):
        raise ValueError("a question-aware cell reads its prompt in one piece: leave out the @CHUNK or the awareness")


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, tokenizer: Any, cases: Iterable[Case], cells: Sequence[Cell],
    gates: RetentionGates | None = None, sinks: int | None = None, recent: int | None = None,
    progress: Progress | None = None, inspect: Inspect | None = None, together: int = 1,
) -> list[Record]:  # fmt: skip
    """Runs every cell on every case.

    Args:
        model: in eval mode, outside any `attach` or `evict` block.
        cases: contexts of any lengths; taken one by one, so a generator is fine.
        cells: what to compare; the full cache is measured as the reference whether or not it is among them.
        gates: for the retention policy.
        sinks, recent: first and last tokens that always stay; None for each policy's own, and for cells with a preset.
        together: cells that are asked in one batch: faster, and takes the memory of that many compressed caches.

    Returns:
        One record for each case and cell, in that order.
    Raises:
        ValueError: gates of another model, retention without gates, or `together` below 1.
    """
    if together < 1:
        raise ValueError(f"got together={together}; accepted: 1 or more cells in a batch")
    policies = {cell.policy for cell in cells if cell.evicts}
    records: list[Record] = []
    with evict(model, "full", 1.0, gates=gates, sinks=sinks, recent=recent, observe=tuple(policies)) as session:
        for case in cases:
            runner = CaseRunner(model, tokenizer, session, case)
            for group in _groups(cells, together):
                for record in runner.run(group, inspect):
                    records.append(record)
                    if progress is not None:
                        progress(record)
    return records


def _groups(cells: Sequence[Cell], together: int) -> Iterator[list[Cell]]:
    """Neighbours that can be asked in one batch: they evict, and all or none have read the question."""
    for (_, evicts), same in groupby(cells, lambda cell: (cell.aware, cell.evicts)):
        several = list(same)
        size = together if evicts else 1
        for start in range(0, len(several), size):
            yield several[start : start + size]


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
        self._read(self.cache, case.context_ids, 1, case.inputs)
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
            cache.plan = cell.plan(cache.plan, room)
            self._read(cache, case.context_ids, 1, case.inputs)
            return _Compressed(cell, cache, None, self._now() - start)
        cache = self.cache.fork()
        question = self._read(cache, case.question_ids)[0] if cell.aware and cell.evicts else None
        if cell.evicts:
            cache.plan = cell.plan(cache.plan, room)
            cache.compress()
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
        """Reads question (unless its logits are given) and gold answer after `cache`, the answer on a fork."""
        start = self._now()
        if question is None:
            question = self._read(cache, self.case.question_ids)
        gold = self._read(cache.fork(), self.case.answer_ids)
        return _Asked(cache, torch.cat([question, gold], 1), self._now() - start)

    def _generate(self, asked: _Asked) -> list[str]:
        case = self.case
        limit = len(case.answer_ids) + case.extra_tokens

        def ends(generated: list[int]) -> bool:
            """Full, ended by the model, or the answer is in the text and one more token shows that it is complete
            ("481" is not in "4812")."""
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

    def _read(
        self, cache: RaggedCache, ids: Sequence[int], logits_to_keep: int = 0, inputs: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        placed = {name: value.to(self.model.device) for name, value in (inputs or {}).items()}
        return self.session.extend(cache, ids, logits_to_keep=logits_to_keep, inputs=placed)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def find_device(name: str, flag: str = "--device") -> torch.device:
    """The device called `name`.

    Raises:
        ValueError: it is no device's name, or a device that this machine does not have.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{flag} has {name!r}; cpu, cuda, cuda:1 and so on are accepted") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{flag} has {name!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    usable = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    if device.type not in usable:  # such as meta, which computes nothing
        raise ValueError(f"{flag} has {name!r}; accepted on this machine: {', '.join(usable)}")
    return device
