"""Units of work: one case each, on which all cells are measured, since its context is read once for all of them.

`UnitRunner` runs one so that a cell that fails stops no other; `export_cases` writes them for another program.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from tenure.checked import Count, KeptBudget, Range, read_fields

from ...retention import RetentionGates
from ..cases import Case, Label, Record
from ..cells import Cell
from ..runner import evaluate
from ..tasks.builder import CaseBuilder, MixedCaseBuilder
from .sweep_config import SweepConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Builder = CaseBuilder | MixedCaseBuilder


@dataclass(frozen=True)
class Unit:
    """Case number `index` of a task at a length and a seed."""

    task: Label
    length: Count
    seed: int
    index: Annotated[int, Range(0)]

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Unit:
        """The unit that a record or a failure is of; ValueError without its fields."""
        return cls(**read_fields(cls, line, unknown=set()))

    @property
    def name(self) -> str:
        """Readable: `vt, 1024 tokens, seed 0, case 3`."""
        return f"{self.task}, {self.length} tokens, seed {self.seed}, case {self.index}"


def all_units(config: SweepConfig) -> list[Unit]:
    """All units of a sweep: one length after the other as they are listed, within a length all first cases, then all
    second ones, so that at any time the finished cases of a length cover its tasks and seeds evenly."""
    return [
        Unit(task, length, seed, index)
        for length in config.lengths
        for index in range(config.cases)
        for seed in config.seeds
        for task in config.tasks
    ]


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured on a case, or with no policy the whole case.

    Attributes:
        task, length, seed, index: the unit.
        error: the error's type and its message's first line.
        traceback: where it happened.
        policy, scope, budget, aware: the cell as in `Record`; all None if the case itself failed.
    """

    task: Label
    length: Count
    seed: int
    index: Annotated[int, Range(0)]
    error: str
    traceback: str
    policy: Label | None = None
    scope: Label | None = None
    budget: KeptBudget | None = None
    aware: bool | None = None

    @classmethod
    def of(cls, unit: Unit, cell: Cell | None, error: Exception) -> Failure:
        """The failure of `cell`, or of the whole unit, by `error`."""
        import traceback

        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        where = "".join(traceback.format_exception(error)[-8:])
        if cell is None:
            return cls(**asdict(unit), error=text, traceback=where)
        return cls(
            **asdict(unit), error=text, traceback=where, policy=cell.name, scope=cell.scope, budget=cell.budget,
            aware=cell.aware,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Readable: the unit, and the cell if it is one."""
        unit = Unit(self.task, self.length, self.seed, self.index).name
        if self.policy is None:
            return unit
        return f"{unit}, {self.policy}:{self.scope} at {self.budget}{', question-aware' if self.aware else ''}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


logger = logging.getLogger(__name__)
_Key = tuple[str, str, float | int, bool]


@dataclass
class UnitRunner:
    """Runs units with one model on one device.

    Attributes:
        model, tokenizer, gates: see `evaluate`; the gates are on the model's device.
        cells: all are measured on every unit.
        builder: the builder of cases of a length and a seed.
        sinks, recent, together: see `evaluate`.
    """

    model: PreTrainedModel
    tokenizer: Any
    cells: Sequence[Cell]
    builder: Callable[[int, int], Builder]
    gates: RetentionGates | None = None
    sinks: int | None = None
    recent: int | None = None
    together: int = 1
    _builders: dict[tuple[int, int], Builder] = field(default_factory=dict, init=False, repr=False)

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
        """Fills `found`; after an error the cells that were not reached are tried again in smaller groups."""
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
    if record.finite:
        return record
    cell = {name: getattr(record, name) for name in ("policy", "scope", "budget", "aware")}
    text = f"not finite: KL {record.kl}, agreement {record.top1}, score {record.score}"
    return Failure(unit.task, unit.length, unit.seed, unit.index, text, "", **cell)


def export_cases(
    path: Path, units: Iterable[Unit], builder: Callable[[int, int], Builder], tokenizer: Any
) -> int:  # fmt: skip
    """Writes one line a unit and returns their number; the file appears when all are written.

    A line has `task, length, seed, index`; `context_ids, question_ids, answer_ids`, the model's input and the gold
    continuation, which is teacher-forced for the KL; `context, prompt_end, question`: the texts of the first two and
    the question alone; `answers, match`: what must be found in the generation, see `Case.score`; `max_new_tokens`; and
    `evidence`: token ranges of the planted facts. The ids are exact; the texts need not split into the same ids again.
    """
    builders: dict[tuple[int, int], Builder] = {}
    temporary = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for unit in units:
                place = unit.length, unit.seed
                if place not in builders:
                    builders[place] = builder(*place)
                line = case_line(builders[place].case(unit.task, unit.index), tokenizer)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def case_line(case: Case, tokenizer: Any) -> dict[str, Any]:
    """A case as plain values, see `export_cases`."""
    return {
        "task": case.task, "length": case.length, "seed": case.seed, "index": case.index,
        "context_ids": list(case.context_ids), "question_ids": list(case.question_ids),
        "answer_ids": list(case.answer_ids),
        "context": tokenizer.decode(case.context_ids), "prompt_end": tokenizer.decode(case.question_ids),
        "question": case.question, "answer": case.answer, "answers": list(case.answers or (case.answer,)),
        "match": case.match, "max_new_tokens": len(case.answer_ids) + case.extra_tokens,
        "evidence": [list(span) for span in case.facts],
    }  # fmt: skip
