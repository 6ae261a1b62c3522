"""The numbers of a report: means over tasks with intervals, the leading policies, and two runs cell by cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..cases import Record
from ..cells import NO_SCOPE, label
from ..intervals import Interval, PairedDifference, holm, stratified_difference, stratified_mean
from ..summary import accuracy_interval
from .run_folder import RecordedRun

SEED = 0  # of every bootstrap of a report
Method = tuple[str, str]  # policy, scope
Amount = float | int
CaseKey = tuple[str, int, int, int]  # task, length, seed, index


@dataclass(frozen=True)
class MethodResult:
    """A method at a budget, over the cases of one setting.

    Attributes:
        accuracy: the mean of the tasks' mean scores; Wilson's interval if there is one task and every answer is right
            or wrong, else the bootstrap's over cases within the tasks.
        kl: the same of the KL to the full cache in nats; None where it was not measured.
        bytes: mean bytes of a compressed cache; NaN where they were not measured.
        cases: their number.
        tasks: the accuracy of each task.
        ahead: no method at this budget is better on the same cases: the best, and those whose paired 95 % interval of
            the difference to it holds 0.
        tasks_ahead: tasks on which this is so.
    """

    accuracy: Interval
    kl: Interval | None
    bytes: float
    cases: int
    tasks: Mapping[str, Interval]
    ahead: bool = False
    tasks_ahead: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SettingResults:
    """All that can be compared: one length and one kind of question.

    Attributes:
        length: tokens of a context.
        aware: the question was read before the compression.
        tasks: in the run's order.
        methods: the full cache first, then see `settings_of`.
        budgets: of those that evict, the largest first.
        points: by method and budget; the full cache's budget is 1.0. Cells without any record are absent.
    """

    length: int
    aware: bool
    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    budgets: tuple[Amount, ...]
    points: Mapping[tuple[Method, Amount], MethodResult]

    @property
    def title(self) -> str:
        return f"{self.length:,} tokens, question {'read before' if self.aware else 'asked after'} the compression"

    @property
    def anchor(self) -> str:
        return f"{self.length}-{'aware' if self.aware else 'agnostic'}"

    @property
    def full(self) -> MethodResult | None:
        return self.points.get((("full", NO_SCOPE), 1.0))

    def point(self, method: Method, budget: Amount) -> MethodResult | None:
        """The full cache is the same at every budget."""
        return self.full if is_full(method) else self.points.get((method, budget))


def is_full(method: Method) -> bool:
    return method[0] == "full"


def case_key(record: Record) -> CaseKey:
    """The identity of the case within a run."""
    return record.task, record.length, record.seed, record.index


def method_label(method: Method) -> str:
    return label(*method)


def settings_of(records: Sequence[Record]) -> list[SettingResults]:
    """One for each length and kind of question, of rising length.

    The methods are ordered by their mean accuracy over everything, so that all settings have the same order.
    """
    groups: dict[tuple[bool, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.aware, record.length), []).append(record)
    found = [_setting(length, aware, groups[aware, length]) for aware, length in sorted(groups)]
    order = {method: number for number, method in enumerate(ranking(found))}
    return [replace(one, methods=tuple(sorted(one.methods, key=lambda method: order[method]))) for one in found]


def ranking(settings: Sequence[SettingResults]) -> list[Method]:
    """The full cache, then the methods by their mean accuracy over all settings and budgets, the best first."""
    found: dict[Method, list[float]] = {}
    for setting in settings:
        for (method, _), point in setting.points.items():
            found.setdefault(method, []).append(point.accuracy.value)
    return sorted(found, key=lambda method: (not is_full(method), -sum(found[method]) / len(found[method])))


def _setting(length: int, aware: bool, records: Sequence[Record]) -> SettingResults:
    cells: dict[tuple[Method, Amount], list[Record]] = {}
    for record in records:
        cells.setdefault(((record.policy, record.scope), record.budget), []).append(record)
    methods = tuple(dict.fromkeys(method for method, _ in cells))
    budgets = {budget for method, budget in cells if not is_full(method)}
    # Shares before entries, each from large to small.
    ordered = sorted(budgets, key=lambda budget: (isinstance(budget, int), -budget))
    points = {key: _point(group) for key, group in cells.items()}
    for budget in ordered:
        _mark_ahead(points, {key: group for key, group in cells.items() if key[1] == budget and not is_full(key[0])})
    tasks = tuple(dict.fromkeys(record.task for record in records))
    return SettingResults(length, aware, tasks, methods, tuple(ordered), points)


def _point(records: Sequence[Record]) -> MethodResult:
    scores = _by_task(records, "score")
    tasks = {task: accuracy_interval(list(found.values())) for task, found in scores.items()}
    strata = [list(found.values()) for found in scores.values()]
    accuracy = next(iter(tasks.values())) if len(tasks) == 1 else stratified_mean(strata, SEED)
    kl = [list(found.values()) for found in _by_task(records, "kl").values()]
    measured = all(math.isfinite(value) for values in kl for value in values)
    return MethodResult(
        accuracy, stratified_mean(kl, SEED) if measured else None,
        sum(record.bytes for record in records) / len(records), len(records), tasks,
    )  # fmt: skip


def _mark_ahead(
    points: dict[tuple[Method, Amount], MethodResult], cells: Mapping[tuple[Method, Amount], Sequence[Record]]
) -> None:
    """Sets `ahead` and `tasks_ahead` of the points of one budget."""
    scores = {key: _by_task(group, "score") for key, group in cells.items()}
    if not scores:
        return
    best = max(scores, key=lambda key: points[key].accuracy.value)
    tasks = {task for found in scores.values() for task in found}
    leaders = {
        task: max((key for key in scores if task in scores[key]), key=lambda key: points[key].tasks[task].value)
        for task in tasks
    }
    for key, found in scores.items():
        over = {task for task in found if _tied({task: scores[leaders[task]][task]}, {task: found[task]})}
        ahead = _tied(scores[best], found)
        points[key] = replace(points[key], ahead=ahead, tasks_ahead=frozenset(over))


def _tied(best: Mapping[str, Mapping[CaseKey, float]], other: Mapping[str, Mapping[CaseKey, float]]) -> bool:
    strata = paired_strata(best, other)
    if not strata or all(value == 0 for values in strata for value in values):
        return bool(strata)
    return stratified_difference(strata, SEED, resamples=2000).low <= 0


def paired_strata(
    one: Mapping[str, Mapping[CaseKey, float]], other: Mapping[str, Mapping[CaseKey, float]]
) -> list[list[float]]:
    """Differences `one − other` on the cases that both have, task by task; tasks without any are left out."""
    strata = []
    for task, values in one.items():
        shared = [key for key in values if key in other.get(task, {})]
        if shared:
            strata.append([values[key] - other[task][key] for key in shared])
    return strata


def _by_task(records: Iterable[Record], name: str) -> dict[str, dict[CaseKey, float]]:
    found: dict[str, dict[CaseKey, float]] = {}
    for record in records:
        found.setdefault(record.task, {})[case_key(record)] = float(getattr(record, name))
    return found


def by_stratum(records: Iterable[Record], name: str) -> dict[str, dict[CaseKey, float]]:
    """An attribute of the records by task and length, and by case."""
    found: dict[str, dict[CaseKey, float]] = {}
    for record in records:
        found.setdefault(f"{record.task}/{record.length}", {})[case_key(record)] = float(getattr(record, name))
    return found


_Cell = tuple[str, str, Amount, bool]
_Values = Mapping[str, Mapping[CaseKey, float]]


@dataclass(frozen=True)
class Difference:
    """The second run minus the first in one cell.

    Attributes:
        method, budget, aware: the cell.
        cases: number of shared cases.
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


def compare_runs(first: RecordedRun, second: RecordedRun) -> list[Difference]:
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


def _cells(run: RecordedRun, shared: set[CaseKey]) -> dict[_Cell, list[Record]]:
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
