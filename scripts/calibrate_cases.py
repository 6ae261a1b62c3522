"""The documents that `tenure calibrate` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..eval import Record, draw_cases, evaluate, long_enough, losses_of

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from ..training.assets import Document
    from .calibrate import Config, Plan


@dataclass(frozen=True)
class Measured:
    """Cases that were evaluated.

    Attributes:
        documents: the name of each case's text.
        records: of every cell on every case.
        losses: float64 `(cases, budgets)`.
    """

    documents: list[str]
    records: list[Record]
    losses: np.ndarray


def long_texts(config: Config, tokenizer: Any, texts: Sequence[Document]) -> list[Document]:
    """Those that hold a document.

    Raises:
        ValueError: none does.
    """
    found = long_enough(tokenizer, [text.text for text in texts], max(config.length))
    if not found:
        raise ValueError(
            f"none of the {len(texts)} texts in {config.data!r} has {max(config.length)} tokens: give a smaller "
            "--length, or longer texts (files may be joined)"
        )
    return [texts[number] for number in found]


def measure(
    config: Config,
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[Document],
    count: int,
    seed: int,
    console: Console,
) -> Measured:
    """Compresses `count` documents cut from `texts` to every budget and asks, under a progress bar."""
    from rich import progress as bars  # importing it advances Python's random numbers

    draws = draw_cases(tokenizer, [text.text for text in texts], count, config.length, plan.tasks, seed)
    numbers, cases = zip(*draws, strict=True)
    columns = bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
    with bars.Progress(bars.TextColumn("measuring"), *columns, console=console) as progress:
        bar = progress.add_task("measuring", total=count * len(plan.cells))
        records = evaluate(
            model, tokenizer, cases, plan.cells, plan.gates, plan.sinks, plan.recent, lambda _: progress.advance(bar),
            together=8,
        )  # fmt: skip
    losses = losses_of(records, plan.budgets, config.loss, plan.control.max_loss)
    return Measured([texts[number].name for number in numbers], records, losses)
