"""The numbers of a report: means over tasks with intervals, single tasks, and which policies lead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..cells import NO_SCOPE, label
from ..record import Record
from ..statistics import Interval, stratified_difference, stratified_mean
from ..summary import accuracy_interval

SEED = 0  # of every bootstrap of a report
Method = tuple[str, str]  # policy, scope
Amount = float | int
CaseKey = tuple[str, int, int, int]  # task, length, seed, index


@dataclass(frozen=True)
class Point:
    """A method at a budget, over the cases of one setting.

    Attributes:
        accuracy: the mean of the tasks' mean scores; Wilson's interval if there is one task and every answer is right
            or wrong, else the bootstrap's over cases within the tasks.
        kl: the same of the KL to the full cache in nats; None where it was not measured.
        bytes: mean bytes of a compressed cache; NaN where they were not measured.
        cases: how many.
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
class Setting:
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
    points: Mapping[tuple[Method, Amount], Point]

    @property
    def title(self) -> str:
        return f"{self.length:,} tokens, question {'read before' if self.aware else 'asked after'} the compression"

    @property
    def anchor(self) -> str:
        return f"{self.length}-{'aware' if self.aware else 'agnostic'}"

    @property
    def full(self) -> Point | None:
        return self.points.get((("full", NO_SCOPE), 1.0))

    def point(self, method: Method, budget: Amount) -> Point | None:
        """The full cache is the same at every budget."""
        return self.full if is_full(method) else self.points.get((method, budget))

def is_full(method: Method) -> bool:
    return method[0] == "full"


def case_key(record: Record) -> CaseKey:
    """What tells the case apart in a run."""
    return record.task, record.length, record.seed, record.index


def method_label(method: Method) -> str:
    return label(*method)


def settings_of(records: Sequence[Record]) -> list[Setting]:
    """One for each length and kind of question, of rising length.

    The methods are ordered by their mean accuracy over everything, so that all settings have the same order.
    """
    groups: dict[tuple[bool, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record.aware, record.length), []).append(record)
    found = [_setting(length, aware, groups[aware, length]) for aware, length in sorted(groups)]
    order = {method: number for number, method in enumerate(ranking(found))}
    return [replace(one, methods=tuple(sorted(one.methods, key=lambda method: order[method]))) for one in found]


def ranking(settings: Sequence[Setting]) -> list[Method]:
    """The full cache, then the methods by their mean accuracy over all settings and budgets, the best first."""
    found: dict[Method, list[float]] = {}
    for setting in settings:
        for (method, _), point in setting.points.items():
            found.setdefault(method, []).append(point.accuracy.value)
    return sorted(found, key=lambda method: (not is_full(method), -sum(found[method]) / len(found[method])))


def _setting(length: int, aware: bool, records: Sequence[Record]) -> Setting:
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
    return Setting(length, aware, tasks, methods, tuple(ordered), points)


def _point(records: Sequence[Record]) -> Point:
    scores = _by_task(records, "score")
    tasks = {task: accuracy_interval(list(found.values())) for task, found in scores.items()}
    strata = [list(found.values()) for found in scores.values()]
    accuracy = next(iter(tasks.values())) if len(tasks) == 1 else stratified_mean(strata, SEED)
    kl = [list(found.values()) for found in _by_task(records, "kl").values()]
    measured = all(math.isfinite(value) for values in kl for value in values)
    return Point(
        accuracy, stratified_mean(kl, SEED) if measured else None,
        sum(record.bytes for record in records) / len(records), len(records), tasks,
    )  # fmt: skip


def _mark_ahead(
    points: dict[tuple[Method, Amount], Point], cells: Mapping[tuple[Method, Amount], Sequence[Record]]
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


def _tied(
    best: Mapping[str, Mapping[CaseKey, float]], other: Mapping[str, Mapping[CaseKey, float]]
) -> bool:
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
