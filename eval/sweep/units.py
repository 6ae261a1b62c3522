"""The units of work: one case each, on which all cells are measured, since its context is read once for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..cells import Cell
from .config import SweepConfig


@dataclass(frozen=True)
class Unit:
    """Case number `index` of a task at a length and a seed."""

    task: str
    length: int
    seed: int
    index: int

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Unit:
        """The unit that a record or a failure is of; KeyError if it does not say."""
        return cls(line["task"], line["length"], line["seed"], line["index"])

    @property
    def name(self) -> str:
        """For people: `vt, 1024 tokens, seed 0, case 3`."""
        return f"{self.task}, {self.length} tokens, seed {self.seed}, case {self.index}"


def all_units(config: SweepConfig) -> list[Unit]:
    """All units of a sweep: one length after the other as they are listed, within a length all first cases, then all
    second ones, so that what is done of a length at any time covers its tasks and seeds evenly."""
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

    task: str
    length: int
    seed: int
    index: int
    error: str
    traceback: str
    policy: str | None = None
    scope: str | None = None
    budget: float | int | None = None
    aware: bool | None = None

    @classmethod
    def of(cls, unit: Unit, cell: Cell | None, error: Exception) -> Failure:
        """What `error` did to `cell`, or to the whole unit."""
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
        """For people: the unit, and the cell if it is one."""
        unit = Unit(self.task, self.length, self.seed, self.index).name
        if self.policy is None:
            return unit
        return f"{unit}, {self.policy}:{self.scope} at {self.budget}{', question-aware' if self.aware else ''}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
