"""The report as one HTML file that loads nothing and runs nothing; all text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from ..sweep.units import Failure
from .charts import accuracy_chart, kl_chart, legend, styles
from .needle_grid import DEPTHS, NeedleGrid, depth_name, needle_grids
from .numbers import SEED, Amount, Difference, MethodResult, SettingResults, is_full, method_label, settings_of
from .run_folder import RecordedRun
from .wording import (
    between,
    budget_name,
    facts_of,
    intervals_note,
    kept,
    run_line,
    short_names,
    signed,
    significant_line,
)

# Nothing may be loaded: the browser itself refuses what this leaves out.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def report_page(runs: Sequence[RecordedRun], differences: Sequence[Difference], folder: Path) -> str:
    """The page for one run, or for two with their differences.

    Args:
        folder: of the page; raw files in it or below are linked.
    """
    names = short_names(runs)
    title = " and ".join(names)
    body = [f"<h1>{escape(title)}</h1>"]
    for run, own in zip(runs, names, strict=True):
        name = f"{own}: " if len(runs) > 1 else ""
        body.append(f'<p class="soft">{escape(name + run_line(run))}</p>')
        body += [f'<p class="warn">{escape(name + text)}</p>' for text in _warnings(run)]
    parts, navigation = [], []
    if differences:
        navigation.append('<div><a href="#differences">Differences</a></div>')
        parts.append(_difference_section(runs, differences))
    for number, run in enumerate(runs):
        prefix = f"run{number}-"
        name = f"{names[number]}: " if len(runs) > 1 else ""
        links = []
        for anchor, heading, html in _sections(run, settings_of(run.records), folder):
            links.append(f'<a href="#{prefix}{anchor}">{escape(heading)}</a>')
            parts.append(f'<section id="{prefix}{anchor}"><h2>{escape(name + heading)}</h2>{html}</section>')
        navigation.append(f"<div>{escape(name)}{''.join(links)}</div>")
    css = files(__package__ or "tenure.eval.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{css}</style>\n</head>\n'
        f"<body>\n<main>\n{''.join(body)}\n<nav>{''.join(navigation)}</nav>\n{chr(10).join(parts)}\n</main>\n</body>\n</html>\n"
    )


def _sections(run: RecordedRun, found: Sequence[SettingResults], folder: Path) -> list[tuple[str, str, str]]:
    """(anchor, heading, HTML) of a run's sections."""
    sections = []
    if found:
        sections.append(("accuracy", "Accuracy", _accuracy(found)))
        sections.append(("curves", "Curves", _curves(found)))
        sections.append(("tasks", "Tasks", _heat_maps(found)))
        grids = needle_grids(run.records)
        if grids:
            sections.append(("grid", "Needle grid", _needle_grids(grids)))
        sections.append(("kl", "KL to the full cache", _kl(found)))
    if run.failures:
        sections.append(("failures", f"Failures ({len(run.failures)})", failure_list(run.failures)))
    sections.append(("settings", "Settings", facts_table(facts_of(run))))
    sections.append(("raw", "Raw files", _raw(run, folder)))
    return sections


def _warnings(run: RecordedRun) -> list[str]:
    warnings = []
    if run.units is not None and run.done < run.units:
        warnings.append(f"Not finished: {run.done} of {run.units} cases are here.")
    if run.failures:
        count = len(run.failures)
        warnings.append(f"{count} failure{'s' * (count != 1)}; what failed is left out of the means.")
    return warnings


def _accuracy(found: Sequence[SettingResults]) -> str:
    note = (
        f"{intervals_note()} Under each, its share of the full cache's accuracy. Shaded with a dot: the best at this "
        "budget, and every policy whose paired 95 % interval of the difference to it, on the same cases, holds 0 (not "
        "corrected for the number of policies)."
    )
    made = [f'<h3>{escape(one.title)}</h3><div class="card scroll">{accuracy_table(one)}</div>' for one in found]
    return f'<p class="note">{escape(note)}</p>{"".join(made)}'


def _curves(found: Sequence[SettingResults]) -> str:
    drawn = styles(found)
    made = []
    for one in found:
        both = accuracy_chart(one, drawn) + kl_chart(one, drawn)
        if both:
            made.append(
                f'<h3>{escape(one.title)}</h3><div class="card"><div class="charts">{both}</div>{legend(drawn)}</div>'
            )
    if not made:
        return '<p class="soft">No bytes were measured.</p>'
    return "".join(made)


def _heat_maps(found: Sequence[SettingResults]) -> str:
    ramp = ", ".join(shade(value / 8)[0] for value in range(9))
    note = (
        '<p class="note">Accuracy of each task: 0 '
        f'<span class="scale" style="background:linear-gradient(90deg, {ramp})"></span> 1. '
        "A dot: the best on this task at this budget, or tied with it by the paired 95 % interval.</p>"
    )
    made = []
    for one in found:
        made.append(f"<h3>{escape(one.title)}</h3>")
        for budget in one.budgets or (1.0,):
            name = escape(kept(budget)) if one.budgets else "full cache"
            made.append(f'<h4>{name}</h4><div class="card scroll">{heat_map_table(one, budget)}</div>')
    return note + "".join(made)


def _needle_grids(grids: Sequence[NeedleGrid]) -> str:
    note = (
        '<p class="note">Accuracy by the tokens of the context (across) and the depth of the needle (down, from its '
        "beginning). The score is the mean of a grid's cells.</p>"
    )
    made = []
    for kind in dict.fromkeys(grid.kind for grid in grids):
        cards = "".join(needle_grid_table(grid) for grid in grids if grid.kind == kind)
        made.append(f'<h3>{escape(kind)}</h3><div class="card scroll">{cards}</div>')
    return note + "".join(made)


def needle_grid_table(grid: NeedleGrid) -> str:
    """A heat map: lengths across, depths down, with the score above it."""
    name = method_label(grid.method) if is_full(grid.method) else f"{method_label(grid.method)}, {kept(grid.budget)}"
    head = "".join(f"<th>{length:,}</th>" for length in grid.lengths)
    rows = []
    for row in range(DEPTHS):
        cells = []
        for length in grid.lengths:
            value = grid.cells.get((row, length))
            if value is None:
                cells.append('<td class="none">–</td>')
                continue
            background, ink = shade(value)
            cells.append(f'<td style="background:{background};color:{ink}">{value:.2f}</td>')
        rows.append(f"<tr><th>{depth_name(row)}</th>{''.join(cells)}</tr>")
    caption = f"{escape(name)}: score {grid.score:.3f}, {grid.cases} cases"
    return (
        f'<p class="note">{caption}</p><table class="heat"><thead><tr><th>depth</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _kl(found: Sequence[SettingResults]) -> str:
    if not any(point.kl for one in found for point in one.points.values()):
        return '<p class="soft">No KL was measured.</p>'
    note = (
        "Mean KL divergence in nats over the positions of question and gold answer (question-aware: of the answer), "
        f"mean over tasks, with 95 % bootstrap intervals over cases (seed {SEED}); below it the megabytes kept, the "
        "mean over cases."
    )
    made = [f'<h3>{escape(one.title)}</h3><div class="card scroll">{kl_table(one)}</div>' for one in found]
    return f'<p class="note">{escape(note)}</p>{"".join(made)}'


def _difference_section(runs: Sequence[RecordedRun], differences: Sequence[Difference]) -> str:
    first, second = short_names(runs)
    note = (
        f"{second} minus {first}, paired on the cases that both have, mean over tasks and lengths. The "
        f"95 % intervals are the bootstrap's from 5000 resamples of the cases within task and length (seed {SEED}); p "
        f"(Holm) is adjusted for the {len(differences)} comparisons."
    )
    return (
        f'<section id="differences"><h2>Differences</h2><p class="note">{escape(note)}</p>'
        f"<p>{escape(significant_line(differences))}</p>"
        f'<div class="card scroll">{difference_table(runs, differences)}</div></section>'
    )


def _raw(run: RecordedRun, folder: Path) -> str:
    """The names of the files, with links where they are in the page's folder or below: other paths are private."""
    items = []
    for path in run.files:
        name, place = escape(path.name), path.resolve()
        if place.is_relative_to(folder.resolve()):
            address = quote(place.relative_to(folder.resolve()).as_posix())
            name = f'<a href="{escape(address)}">{name}</a>'
        items.append(f"<li>{name}</li>")
    return f"<ul>{''.join(items)}</ul>"


# White to dark blue through the lightness alone, so that it reads in grey and for every kind of colour vision.
_LIGHT, _DARK = (247, 250, 253), (8, 64, 129)


def accuracy_table(setting: SettingResults) -> str:
    """Policies down, budgets across."""

    def cell(point: MethodResult) -> str:
        full = setting.full
        share = "" if full is None or full is point or not full.accuracy.value else (
            f"<small>{point.accuracy.value / full.accuracy.value:.0%} of full</small>"
        )  # fmt: skip
        value = f"<b>{point.accuracy.value:.2f}</b>"
        return f"<td{_ahead(point)}>{value}<small>{between(point.accuracy)}</small>{share}</td>"

    return _by_budget(setting, cell)


def kl_table(setting: SettingResults) -> str:
    """The same of the KL, with the megabytes kept."""

    def cell(point: MethodResult) -> str:
        size = f"{point.bytes / 1e6:.2f} MB" if point.bytes > 0 else ""
        if point.kl is None:
            return f"<td>–<small>{size}</small></td>"
        interval = f"{point.kl.low:.3f}–{point.kl.high:.3f}"
        return f"<td>{point.kl.value:.3f}<small>{interval}</small><small>{size}</small></td>"

    return _by_budget(setting, cell)


def _by_budget(setting: SettingResults, cell) -> str:
    head = "".join(f"<th>{escape(kept(budget))}</th>" for budget in setting.budgets) or "<th>everything kept</th>"
    rows = []
    for method in setting.methods:
        name = f"<th>{breakable(method_label(method))}</th>"
        if is_full(method):
            point = setting.full
            rest = "<td></td>" * (len(setting.budgets) - 1)  # its number stands under the others' first ones
            found = "" if point is None else cell(point) + rest
            rows.append(f'<tr class="full">{name}{found}</tr>')
            continue
        points = [setting.point(method, budget) for budget in setting.budgets]
        rows.append(f"<tr>{name}{''.join('<td>–</td>' if point is None else cell(point) for point in points)}</tr>")
    counts = sorted({point.cases for point in setting.points.values()})
    cases = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = f"{len(setting.tasks)} task{'s' * (len(setting.tasks) != 1)}, {cases} cases a cell"
    return (
        f"<table><thead><tr><th>policy</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f'<p class="note">{caption}</p>'
    )


def heat_map_table(setting: SettingResults, budget: Amount) -> str:
    """Policies down, tasks across, at one budget; the full cache first."""
    head = "".join(f"<th>{breakable(task)}</th>" for task in setting.tasks)
    rows = []
    for method in setting.methods:
        point = setting.point(method, budget)
        if point is None:
            continue
        cells = "".join(_heat(point, task) for task in setting.tasks)
        full = ' class="full"' if is_full(method) else ""
        rows.append(f"<tr{full}><th>{breakable(method_label(method))}</th>{cells}</tr>")
    return f'<table class="heat"><thead><tr><th>policy</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _heat(point: MethodResult, task: str) -> str:
    found = point.tasks.get(task)
    if found is None:
        return '<td class="none">–</td>'
    background, ink = shade(found.value)
    ahead = ' class="ahead"' if task in point.tasks_ahead else ""
    style = f'style="background:{background};color:{ink}"'
    return f'<td{ahead} {style} title="{escape(between(found))}">{found.value:.2f}</td>'


def shade(value: float) -> tuple[str, str]:
    """Background and text colour for a number in [0, 1]."""
    mixed = [round(a + (b - a) * min(max(value, 0.0), 1.0)) for a, b in zip(_LIGHT, _DARK, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed), "#0b0f18" if value < 0.65 else "#ffffff"


def difference_table(runs: Sequence[RecordedRun], found: Sequence[Difference]) -> str:
    """One row a policy and budget."""
    columns = ("kept", "cases", *short_names(runs), "difference", "p", "p (Holm)", "KL difference")
    head = "".join(f"<th>{breakable(name)}</th>" for name in columns)
    rows = []
    for one in found:
        change = one.accuracy
        bold = ("<b>", "</b>") if one.significant else ("", "")
        cells = [
            escape(budget_name(one)), str(one.cases), f"{one.before:.3f}", f"{one.after:.3f}",
            f"{bold[0]}{change.value:+.3f}{' *' if one.significant else ''}{bold[1]}<small>{signed(change)}</small>",
            f"{change.p_value:.4f}", f"{one.holm:.4f}",
            "–" if one.kl is None else f"{one.kl.value:+.4f}<small>{signed(one.kl, 4)}</small>",
        ]  # fmt: skip
        name = f"<th>{breakable(method_label(one.method))}</th>"
        rows.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return (
        f"<table><thead><tr><th>policy</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        '<p class="note">* the 95 % interval leaves out 0</p>'
    )


def failure_list(found: Sequence[Failure]) -> str:
    """The failures with their places and reasons."""
    parts = []
    for one in found:
        trace = f"<pre>{escape(one.traceback)}</pre>" if one.traceback else ""
        parts.append(f"<details><summary>{escape(one.name)}</summary><p>{escape(one.error)}</p>{trace}</details>")
    return f'<div class="card">{"".join(parts)}</div>'


def facts_table(found: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    rows = "".join(f"<tr><th>{breakable(name)}</th><td>{escape(value)}</td></tr>" for name, value in found)
    return f'<div class="card scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def breakable(name: str) -> str:
    """A name that may be broken after its underscores and dots."""
    return escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def _ahead(point: MethodResult) -> str:
    return ' class="ahead"' if point.ahead else ""
