"""Tables of means over records of single cases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from .cases import Record
from .cells import label
from .intervals import Interval, bootstrap_mean, wilson

Row = dict[str, Any]


def summarise(records: Iterable[Record], confidence: float = 0.95) -> list[Row]:
    """One row for each task, length, policy, scope, budget and awareness, in order of first appearance.

    A row has `task, length, policy, scope, budget, aware, accuracy, ci_low, ci_high`, `n` (cases), `kl` (nats),
    `entries`, `bytes` and `seconds` (means over the cases). The interval is Wilson's where every answer is right or
    wrong, the bootstrap's where some are right in part.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        key = (record.task, record.length, record.policy, record.scope, record.budget, record.aware)
        groups.setdefault(key, []).append(record)
    rows = []
    for (task, length, policy, scope, budget, aware), group in groups.items():
        accuracy = accuracy_interval([record.score for record in group], confidence)
        rows.append(
            {"task": task, "length": length, "policy": policy, "scope": scope, "budget": budget, "aware": aware}
            | {"accuracy": accuracy.value, "ci_low": accuracy.low, "ci_high": accuracy.high, "n": len(group)}
            | {name: _mean(group, name) for name in ("kl", "entries", "bytes", "seconds")}
        )
    return rows


def accuracy_interval(scores: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of scores in [0, 1] with Wilson's interval if all are 0 or 1, else the bootstrap's; ValueError for none."""
    if all(score in (0.0, 1.0) for score in scores):
        return wilson(int(sum(scores)), len(scores), confidence)
    return bootstrap_mean(scores, confidence=confidence)


def kl_intervals(records: Sequence[Record], seed: int = 0) -> dict[tuple, Interval]:
    """Mean KL with its bootstrap interval for each (length, policy, scope, budget, aware), over all tasks."""
    groups: dict[tuple, list[float]] = {}
    for record in records:
        key = (record.length, record.policy, record.scope, record.budget, record.aware)
        groups.setdefault(key, []).append(record.kl)
    return {key: bootstrap_mean(values, seed) for key, values in groups.items()}


def markdown_tables(records: Sequence[Record]) -> str:
    """One Markdown table a kind of question, length and budget: policies down, tasks across, as the demo prints it."""
    rows = summarise(records)
    kl = kl_intervals(records)
    awareness = list(dict.fromkeys(row["aware"] for row in rows))
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["policy"] != "full"))
    tables = [
        (table_rows(rows, length, budget, aware), length, budget, kl)
        for aware, length, budget in product(awareness, lengths, budgets)
    ]
    return "\n\n".join(_markdown(*table) for table in tables if table[0])


def table_rows(
    rows: Sequence[Row], length: int, budget: float | int, aware: bool = False
) -> dict[tuple[str, str], list[Row]]:
    """The rows of one table by (policy, scope): this length, budget and awareness, and the full cache."""
    table: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        here = row["length"] == length and row["aware"] == aware
        if here and (row["budget"] == budget or row["policy"] == "full"):
            table.setdefault((row["policy"], row["scope"]), []).append(row)
    return table


def accuracy_text(row: Row) -> str:
    """`0.95 [.76–.99]`."""
    return f"{row['accuracy']:.2f} [{_short(row['ci_low'])}–{_short(row['ci_high'])}]"


def budget_text(budget: float | int) -> str:
    """`20%` for a share, `256 entries` for a number."""
    return f"{budget:.0%}" if isinstance(budget, float) else f"{budget} entries"


def mean_over_tasks(rows: Sequence[Row], name: str) -> float:
    """A column's mean over the tasks, each weighted by its cases."""
    return sum(row[name] * row["n"] for row in rows) / sum(row["n"] for row in rows)


def _markdown(
    table: dict[tuple[str, str], list[Row]], length: int, budget: float | int, kl: dict[tuple, Interval]
) -> str:
    tasks = list(dict.fromkeys(row["task"] for rows in table.values() for row in rows))
    aware = ", question-aware" if next(iter(table.values()))[0]["aware"] else ""
    lines = [
        f"**{length} tokens, {budget_text(budget)} kept{aware}** ({table_cases(table)} cases a cell)\n",
        f"| policy | {' | '.join(tasks)} | KL to full (nats) | entries | MB | ms |",
        "|" + " --- |" * (len(tasks) + 5),
    ]
    for (policy, scope), rows in table.items():
        interval = kl[(length, policy, scope, rows[0]["budget"], rows[0]["aware"])]
        by_task = {row["task"]: accuracy_text(row) for row in rows}
        cells = [label(policy, scope), *(by_task.get(task, "–") for task in tasks)]
        cells.append(f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]")
        cells.append(f"{mean_over_tasks(rows, 'entries'):,.0f}")
        cells.append(f"{mean_over_tasks(rows, 'bytes') / 1e6:.1f}")
        cells.append(f"{mean_over_tasks(rows, 'seconds') * 1e3:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_cases(table: dict[tuple[str, str], list[Row]]) -> str:
    """`20`, or `18-20` where cells differ."""
    counts = {row["n"] for rows in table.values() for row in rows}
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)}-{max(counts)}"


def _short(value: float) -> str:
    text = f"{value:.2f}"
    return text if value >= 0.995 else text.removeprefix("0")


def _mean(group: Sequence[Record], name: str) -> float:
    return sum(getattr(record, name) for record in group) / len(group)
