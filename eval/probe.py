"""A small retrieval evaluation for the middle of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..retention import RetentionGates
from .cases import Record
from .cells import Cell
from .intervals import wilson
from .runner import evaluate
from .tasks.builder import CaseBuilder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RetrievalProbe:
    """Measures gates under real eviction: KL to the full cache and accuracy, question-agnostic.

    Args:
        tokenizer: the model's.
        texts: the haystack.
        tasks: names of tasks, see `tenure.eval.TASKS`.
        length: tokens of a context.
        cases: number of cases of each task.
        budgets: shares of the context that stay.
        scope: the entries that compete.
        seed: chooses the cases; not the demo's by default, so that gates chosen by the probe are judged by other cases.
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], tasks: Sequence[str] = ("needle", "phrase", "multikey"),
        length: int = 512, cases: int = 6, budgets: Sequence[float] = (0.2,), scope: str = "global",
        seed: int = 1_000_003,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.tasks = tuple(tasks)
        self.cells = [Cell.of("retention", budget, scope) for budget in budgets]
        self.cases = list(CaseBuilder(tokenizer, texts, length, seed).cases(tasks, cases))
        self._full: dict[str, float] | None = None

    def __call__(self, model: PreTrainedModel, gates: RetentionGates) -> dict[str, float]:
        """Metrics by name: `eval/kl@0.2` (nats), `eval/accuracy@0.2`, `eval/<task>@0.2` for every budget.

        The full cache's accuracy, `eval/accuracy@full`, is measured at the first call: the frozen model keeps it.

        Raises:
            ValueError: gates of another model.
        """
        cells = self.cells if self._full else [Cell.of("full"), *self.cells]
        training = model.training
        model.eval()
        try:
            records = evaluate(model, self.tokenizer, self.cases, cells, gates)
        finally:
            model.train(training)
        if self._full is None:
            full = [record for record in records if record.policy == "full"]
            self._full = {name: value for name, value in self._metrics(full, "full").items() if "kl" not in name}
        metrics = dict(self._full)
        for cell in self.cells:
            chosen = [record for record in records if record.policy != "full" and record.budget == cell.budget]
            metrics |= self._metrics(chosen, f"{cell.budget:g}")
        return metrics

    def _metrics(self, records: list[Record], suffix: str) -> dict[str, float]:
        metrics = {
            f"eval/kl@{suffix}": sum(record.kl for record in records) / len(records),
            f"eval/accuracy@{suffix}": _accuracy(records),
        }
        for task in self.tasks:
            metrics[f"eval/{task}@{suffix}"] = _accuracy([record for record in records if record.task == task])
        return metrics


def _accuracy(records: list[Record]) -> float:
    return wilson(sum(record.correct for record in records), len(records)).value
