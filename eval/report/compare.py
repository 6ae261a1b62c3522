"""Two runs on the cases that they share, cell by cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..record import Record
from ..statistics import PairedDifference, holm, stratified_difference
from .load import Run
from .numbers import SEED, Amount, CaseKey, Method, by_stratum, case_key, paired_strata

_Cell = tuple[str, str, Amount, bool]
_Values = Mapping[str, Mapping[CaseKey, float]]


@dataclass(frozen=True)
class Difference:
    """The second run minus the first in one cell.

    Attributes:
        method, budget, aware: the cell.
        cases: how many are shared.
        before, after: mean accuracy in the first and in the second run, each the mean over tasks and lengths.
        accuracy: the difference with its paired bootstrap interval, by resampling the cases within task and length.
        holm: the p-value of it, adjusted for the number of cells compared.
        kl: the same of the KL in nats; None where a run did not measure it.
    """

    method: Method
    budget: Amount
    aware: bool
    cases: int
    before: float
    after: float
    accuracy: PairedDifference
    holm: float
    kl: PairedDifference | None

    @property
    def significant(self) -> bool:
        """The 95 % interval of the accuracy leaves out 0."""
        return self.accuracy.low > 0 or self.accuracy.high < 0


def compare_runs(first: Run, second: Run) -> list[Difference]:
    """One difference for each cell that both runs have, in the first run's order.

    Cases are the same if task, length, seed, number and gold answer are.

    Raises:
        ValueError: the runs share no case, or no cell.
    """
    answers = {case_key(record): record.answer for record in first.records}
    theirs = {case_key(record): record.answer for record in second.records}
    shared = {key for key, answer in answers.items() if key in theirs and _same(answer, theirs[key])}
    if not shared:
        raise ValueError(
            f"{first.name} and {second.name} share no case (the same task, length, seed, number and answer): there is "
            "nothing to compare"
        )
    ours, other = _cells(first, shared), _cells(second, shared)
    each = [_difference(cell, ours[cell], other[cell]) for cell in ours if cell in other]
    found = [one for one in each if one is not None]
    if not found:
        raise ValueError(f"{first.name} and {second.name} share cases but no policy at the same budget")
    adjusted = holm([one.accuracy.p_value for one in found])
    return [replace(one, holm=p_value) for one, p_value in zip(found, adjusted, strict=True)]


def _same(one: str, other: str) -> bool:
    """Whether two records are of one case; a program that does not write the answer down is believed."""
    return not one or not other or one == other


def _cells(run: Run, shared: set[CaseKey]) -> dict[_Cell, list[Record]]:
    cells: dict[_Cell, list[Record]] = {}
    for record in run.records:
        if case_key(record) in shared:
            cells.setdefault((record.policy, record.scope, record.budget, record.aware), []).append(record)
    return cells


def _difference(cell: _Cell, first: list[Record], second: list[Record]) -> Difference | None:
    """None if the cell's cases are not shared; the p-value is not adjusted yet."""
    policy, scope, budget, aware = cell
    before, after = by_stratum(first, "score"), by_stratum(second, "score")
    strata = paired_strata(after, before)
    if not strata:
        return None
    accuracy = stratified_difference(strata, SEED)
    kl = paired_strata(by_stratum(second, "kl"), by_stratum(first, "kl"))
    measured = all(math.isfinite(value) for values in kl for value in values)
    return Difference(
        (policy, scope), budget, aware, sum(map(len, strata)), _mean(before, after), _mean(after, before), accuracy,
        accuracy.p_value, stratified_difference(kl, SEED) if measured else None,
    )  # fmt: skip


def _mean(one: _Values, other: _Values) -> float:
    """The mean over tasks and lengths of the first's values on the shared cases."""
    means = []
    for name, values in one.items():
        shared = [value for key, value in values.items() if key in other.get(name, {})]
        if shared:
            means.append(sum(shared) / len(shared))
    return sum(means) / len(means)
