"""Independent retrieval cases for calibration, and the losses of what was measured on them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .cases import Case
from .prompts import encode
from .retrieval import CaseBuilder
from .runner import Record
from .templates import TASKS, get_task

KL, ANSWERS = "kl", "answers"


def long_enough(tokenizer: Any, texts: Sequence[str], tokens: int) -> list[int]:
    """Which of the texts have at least `tokens` tokens: a document cut from one of them does not repeat itself."""
    return [number for number, text in enumerate(texts) if len(encode(tokenizer, text, plain=True)) >= tokens]


def draw_cases(
    tokenizer: Any, texts: Sequence[str], count: int, lengths: Sequence[int], tasks: Sequence[str], seed: int
) -> Iterator[tuple[int, Case]]:
    """Cases with the number of the text that their document is a part of.

    The texts take turns in a random order, so that with no more cases than texts no two cases share one. Given the
    text, cases are independent: passage, task, length, facts and depth are drawn anew for each (`CaseBuilder`'s own
    sequence spreads the depths evenly instead). A document that starts near the end of its text goes on at its start.

    Args:
        texts: each of at least as many tokens as the longest length.
        lengths, tasks: each case draws one of each.
        seed: the same seed gives the same cases.

    Raises:
        ValueError: no texts, an unknown task, or a length that cannot hold the frame and the facts.
    """
    if not texts:
        raise ValueError("there is no text to draw documents from")
    order = list(range(len(texts)))
    random.Random(f"{seed}/texts").shuffle(order)
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        text = order[number % len(order)]
        builder = CaseBuilder(tokenizer, [texts[text]], rng.choice(list(lengths)), seed=rng.getrandbits(31))
        yield text, builder.case(rng.choice(list(tasks)), 0)


def tasks_of(loss: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks whose questions a loss is measured on: those given, or the loss itself if it is a task.

    Raises:
        ValueError: neither "kl" nor "answers" nor a task, or an unknown task.
    """
    for task in tasks:
        get_task(task)
    if loss in (KL, ANSWERS):
        return tuple(tasks)
    if loss not in TASKS:
        raise ValueError(f"unknown loss {loss!r}; known: {KL}, {ANSWERS}, {', '.join(TASKS)}")
    return (loss,)


def losses_of(
    records: Sequence[Record], budgets: Sequence[float | int], loss: str, max_loss: float = 1.0
) -> np.ndarray:
    """The losses that a calibration is about: float64 `(cases, budgets)` in [0, max_loss].

    Args:
        records: of one policy: for each case those of the full cache (needed for a task's loss) and of every budget, as
            `evaluate` returns them.
        loss: "kl": `min(KL to the full cache, max_loss)` in nats; anything else: `max_loss` where the full cache's
            answer is right and the compressed cache's wrong, 0 elsewhere.
    """
    cells: dict[float | int, list[Record]] = {budget: [] for budget in budgets}
    full: list[Record] = []
    for record in records:
        (full if record.policy == "full" else cells[record.budget]).append(record)
    columns = []
    for budget in budgets:
        if loss == KL:
            columns.append([min(record.kl, max_loss) for record in cells[budget]])
        else:
            pairs = zip(full, cells[budget], strict=True)
            columns.append([max_loss * (before.correct and not after.correct) for before, after in pairs])
    return np.array(columns, dtype=np.float64).T
