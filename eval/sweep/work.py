"""One unit of work: all cells on one case, and none of them stops the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ...retention import RetentionGates
from ..cases import Case
from ..cells import Cell
from ..record import Record
from ..retrieval import CaseBuilder
from ..runner import evaluate
from .store import finite
from .units import Failure, Unit

logger = logging.getLogger(__name__)
_Key = tuple[str, str, float | int, bool]


@dataclass
class UnitRunner:
    """Runs units with one model on one device.

    Attributes:
        model, tokenizer, gates: see `evaluate`; the gates are on the model's device.
        cells: all are measured on every unit.
        builder: the `CaseBuilder` of a length and a seed.
        sinks, recent, together: see `evaluate`.
    """

    model: PreTrainedModel
    tokenizer: Any
    cells: Sequence[Cell]
    builder: Callable[[int, int], CaseBuilder]
    gates: RetentionGates | None = None
    sinks: int = 4
    recent: int = 32
    together: int = 1
    _builders: dict[tuple[int, int], CaseBuilder] = field(default_factory=dict, init=False, repr=False)

    def run(self, unit: Unit) -> list[Record | Failure]:
        """One result for each cell in the cells' order, or one failure of the whole unit; never raises an Exception."""
        found: dict[_Key, Record | Failure] = {}
        try:
            case = self._case(unit)
            self._measure(unit, case, list(self.cells), found)
        except Exception as error:
            logger.warning("%s: %s", unit.name, error, exc_info=True)
            if not found:
                return [Failure.of(unit, None, error)]
            found = {_key(cell): Failure.of(unit, cell, error) for cell in self.cells} | found
        return [found[_key(cell)] for cell in self.cells]

    def _case(self, unit: Unit) -> Case:
        place = unit.length, unit.seed
        if place not in self._builders:
            self._builders[place] = self.builder(*place)
        return self._builders[place].case(unit.task, unit.index)

    def _measure(self, unit: Unit, case: Case, cells: list[Cell], found: dict[_Key, Record | Failure]) -> None:
        """Fills `found`; after an error the cells that were not reached are tried again in smaller groups.

        Raises:
            Exception: the context cannot even be read with the full cache.
        """
        before = len(found)

        def note(record: Record) -> None:
            found[record.policy, record.scope, record.budget, record.aware] = _checked(unit, record)

        try:
            self._evaluate(case, cells, note)
        except Exception as error:
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            left = [cell for cell in cells if _key(cell) not in found]
            if len(left) == 1 and len(cells) == 1:
                logger.warning("%s, %s: %s", unit.name, left[0].name, error, exc_info=True)
                found[_key(left[0])] = Failure.of(unit, left[0], error)
                return
            if len(found) == before:
                self._evaluate(case, [Cell.of("full")], lambda record: None)
            # The culprit is most often among the first that were not reached.
            first = min(self.together, (len(left) + 1) // 2)
            for part in (left[:first], left[first:]):
                if part:
                    self._measure(unit, case, part, found)

    def _evaluate(self, case: Case, cells: Sequence[Cell], progress: Callable[[Record], None]) -> None:
        evaluate(
            self.model, self.tokenizer, [case], cells, self.gates, self.sinks, self.recent, progress,
            together=self.together,
        )  # fmt: skip


def _key(cell: Cell) -> _Key:
    return (*cell.key, cell.aware)


def _checked(unit: Unit, record: Record) -> Record | Failure:
    """The record, or a failure if its numbers are no numbers."""
    if finite(record):
        return record
    cell = {name: getattr(record, name) for name in ("policy", "scope", "budget", "aware")}
    text = f"not finite: KL {record.kl}, agreement {record.top1}, score {record.score}"
    return Failure(unit.task, unit.length, unit.seed, unit.index, text, "", **cell)
