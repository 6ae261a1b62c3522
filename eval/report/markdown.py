"""The report's tables as Markdown, for other pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..cells import NO_SCOPE
from .needle_grid import DEPTHS, NeedleGrid, depth_name, needle_grids
from .numbers import Difference, MethodResult, SettingResults, is_full, method_label, settings_of
from .run_folder import RecordedRun
from .wording import between, budget_name, intervals_note, kept, run_line, short_names, signed, significant_line

FULL = ("full", NO_SCOPE)


def report_markdown(runs: Sequence[RecordedRun], differences: Sequence[Difference]) -> str:
    """Accuracy and KL of every policy and budget, each task, and the differences of two runs."""
    names = [plain(name) for name in short_names(runs)]
    parts = [f"# {' and '.join(names)}"]
    if differences:
        parts += ["## Differences", plain(significant_line(differences)), _differences(runs, differences)]
    for run, name in zip(runs, names, strict=True):
        note = f"{intervals_note()} Bold: the best at this budget, or tied with it."
        parts += [f"## {name}", plain(run_line(run)), note]
        if run.units is not None and run.done < run.units:
            parts.append(f"Not finished: {run.done} of {run.units} cases.")
        for setting in settings_of(run.records):
            parts += [f"### {setting.title}", _means(setting)]
            parts += [text for budget in setting.budgets for text in (f"#### {kept(budget)}", _tasks(setting, budget))]
        grids = needle_grids(run.records)
        if grids:
            parts += ["### Needle grid", _scores(grids), *map(_grid, grids)]
        if run.failures:
            parts += ["### Failures", "\n".join(f"* {plain(f'{one.name}: {one.error}')}" for one in run.failures)]
    return "\n\n".join(parts) + "\n"


def _means(setting: SettingResults) -> str:
    """Accuracy with its interval and KL, policies down and budgets across."""

    def cell(point: MethodResult | None) -> str:
        if point is None:
            return "–"
        text = f"{point.accuracy.value:.2f} [{between(point.accuracy)}]"
        text = f"**{text}**" if point.ahead else text
        return text if point.kl is None else f"{text}, KL {point.kl.value:.3f}"

    budgets = setting.budgets or (1.0,)
    rows = [["policy", *map(kept, budgets)], ["---"] * (1 + len(budgets))]
    for method in setting.methods:
        points = [setting.point(method, budget) for budget in budgets]
        cells = [cell(points[0]), *[""] * (len(budgets) - 1)] if is_full(method) else list(map(cell, points))
        rows.append([plain(method_label(method)), *cells])
    return _table(rows)


def _scores(grids: Sequence[NeedleGrid]) -> str:
    rows = [["needles", "policy", "kept", "score", "cases"], ["---"] * 5]
    rows += [
        [plain(grid.kind), plain(method_label(grid.method)), kept(grid.budget), f"{grid.score:.3f}", str(grid.cases)]
        for grid in grids
    ]
    return _table(rows)


def _grid(grid: NeedleGrid) -> str:
    """Lengths across, depths down."""
    rows = [[plain(f"{grid.kind}: {method_label(grid.method)}, {kept(grid.budget)}"), *map(str, grid.lengths)]]
    rows.append(["---"] * len(rows[0]))
    for row in range(DEPTHS):
        values = [grid.cells.get((row, length)) for length in grid.lengths]
        rows.append([depth_name(row), *("–" if value is None else f"{value:.2f}" for value in values)])
    return _table(rows)


def _tasks(setting: SettingResults, budget: float | int) -> str:
    rows = [["policy", *map(plain, setting.tasks)], ["---"] * (1 + len(setting.tasks))]
    for method in setting.methods:
        point = setting.point(method, budget)
        if point is not None:
            cells = [_task(point, task) for task in setting.tasks]
            rows.append([plain(method_label(method)), *cells])
    return _table(rows)


def _task(point: MethodResult, task: str) -> str:
    found = point.tasks.get(task)
    if found is None:
        return "–"
    text = f"{found.value:.2f} [{between(found)}]"
    return f"**{text}**" if task in point.tasks_ahead else text


def _differences(runs: Sequence[RecordedRun], found: Sequence[Difference]) -> str:
    names = [
        "policy",
        "kept",
        "cases",
        *map(plain, short_names(runs)),
        "difference",
        "95 %",
        "p",
        "p (Holm)",
        "KL difference",
    ]
    rows = [names, ["---"] * len(names)]
    for one in found:
        change = one.accuracy
        star = " *" if one.significant else ""
        kl = "–" if one.kl is None else f"{one.kl.value:+.4f} ({signed(one.kl, 4)})"
        rows.append([
            plain(method_label(one.method)), budget_name(one), str(one.cases), f"{one.before:.3f}", f"{one.after:.3f}",
            f"{change.value:+.3f}{star}", signed(change), f"{change.p_value:.4f}", f"{one.holm:.4f}", kl,
        ])  # fmt: skip
    return _table(rows)


def plain(text: str) -> str:
    """A text of a record as one line of Markdown that is neither a tag nor a link nor code."""
    line = escape(" ".join(text.split()), quote=False)
    return line.replace("\\", "\\\\").replace("[", "\\[").replace("`", "\\`")


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows)
