"""Evaluation in which every context is read once and compressed in every way from there.

A context is prefilled with nothing evicted while everything the policies need is recorded. Each cell then takes a fork
of that cache. A question-agnostic cell compresses it and only then sees the question; a question-aware one reads the
question first, and what is left answers. So all cells judge the same keys and values, and the prompt, which costs
most, is paid for once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel

from ..eviction import RaggedCache, evict
from ..retention import RetentionGates
from .case_runner import CaseRunner
from .cases import EXTRA_TOKENS, Case
from .cells import Cell
from .record import Record

__all__ = ["EXTRA_TOKENS", "Record", "check_inputs", "evaluate"]


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
    together: int = 1,
) -> list[Record]:
    """Runs every cell on every case.

    Args:
        model: in eval mode, outside any `attach` or `evict` block.
        cases: contexts of any lengths; taken one by one, so a generator is fine.
        cells: what to compare; the full cache is measured as the reference whether or not it is among them.
        gates: for the retention policy.
        sinks, recent: first and last tokens that always stay.
        together: cells that are asked in one batch: faster, and takes the memory of so many compressed caches.

    Returns:
        One record for each case and cell, in that order.
    Raises:
        ValueError: gates of another model, or retention without gates.
    """
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
