"""The report as one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from . import charts, tables
from .compare import Difference
from .load import Run
from .numbers import SEED, Setting, settings_of
from .words import facts_of, intervals_note, run_line, significant_line

# Nothing may be loaded: the browser itself refuses what this leaves out.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def report_page(runs: Sequence[Run], differences: Sequence[Difference], folder: Path) -> str:
    """The page for one run, or for two with their differences.

    Args:
        folder: where the page will stand; links to the raw files are relative to it.
    """
    title = " and ".join(run.name for run in runs)
    body = [f"<h1>{escape(title)}</h1>"]
    for run in runs:
        name = f"{run.name}: " if len(runs) > 1 else ""
        body.append(f'<p class="soft">{escape(name + run_line(run))}</p>')
        body += [f'<p class="warn">{escape(name + text)}</p>' for text in _warnings(run)]
    parts, navigation = [], []
    if differences:
        navigation.append('<div><a href="#differences">Differences</a></div>')
        parts.append(_difference_section(runs, differences))
    for number, run in enumerate(runs):
        prefix = f"run{number}-"
        name = f"{run.name}: " if len(runs) > 1 else ""
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


def _sections(run: Run, found: Sequence[Setting], folder: Path) -> list[tuple[str, str, str]]:
    """(anchor, heading, HTML) of a run's sections."""
    sections = []
    if found:
        sections.append(("accuracy", "Accuracy", _accuracy(found)))
        sections.append(("curves", "Curves", _curves(found)))
        sections.append(("tasks", "Tasks", _heat_maps(found)))
        sections.append(("kl", "KL to the full cache", _kl(found)))
    if run.failures:
        sections.append(("failures", f"Failures ({len(run.failures)})", tables.failures(run.failures)))
    sections.append(("settings", "Settings", tables.facts(facts_of(run))))
    sections.append(("raw", "Raw files", _raw(run, folder)))
    return sections


def _warnings(run: Run) -> list[str]:
    warnings = []
    if run.units is not None and run.done < run.units:
        warnings.append(f"Not finished: {run.done} of {run.units} cases are here.")
    if run.failures:
        count = len(run.failures)
        warnings.append(f"{count} failure{'s' * (count != 1)}; what failed is left out of the means.")
    return warnings


def _accuracy(found: Sequence[Setting]) -> str:
    note = (
        f"{intervals_note()} Under each, its share of the full cache's accuracy. Shaded with a dot: the best at this "
        "budget, and every policy whose paired 95 % interval of the difference to it, on the same cases, holds 0 (not "
        "corrected for the number of policies)."
    )
    made = [f'<h3>{escape(one.title)}</h3><div class="card scroll">{tables.accuracy(one)}</div>' for one in found]
    return f'<p class="note">{escape(note)}</p>{"".join(made)}'


def _curves(found: Sequence[Setting]) -> str:
    drawn = charts.styles(found)
    made = []
    for one in found:
        both = charts.accuracy_chart(one, drawn) + charts.kl_chart(one, drawn)
        if both:
            made.append(
                f'<h3>{escape(one.title)}</h3><div class="card"><div class="charts">{both}</div>'
                f"{charts.legend(drawn)}</div>"
            )
    if not made:
        return '<p class="soft">No bytes were measured.</p>'
    return "".join(made)


def _heat_maps(found: Sequence[Setting]) -> str:
    ramp = ", ".join(tables.shade(value / 8)[0] for value in range(9))
    note = (
        '<p class="note">Accuracy of each task: 0 '
        f'<span class="scale" style="background:linear-gradient(90deg, {ramp})"></span> 1. '
        "A dot: the best on this task at this budget, or tied with it by the paired 95 % interval.</p>"
    )
    made = []
    for one in found:
        made.append(f"<h3>{escape(one.title)}</h3>")
        for budget in one.budgets or (1.0,):
            name = escape(tables.kept(budget)) if one.budgets else "full cache"
            made.append(f'<h4>{name}</h4><div class="card scroll">{tables.heat_map(one, budget)}</div>')
    return note + "".join(made)


def _kl(found: Sequence[Setting]) -> str:
    if not any(point.kl for one in found for point in one.points.values()):
        return '<p class="soft">No KL was measured.</p>'
    note = (
        "Mean KL divergence in nats over the positions of question and gold answer (question-aware: of the answer), "
        f"mean over tasks, with 95 % bootstrap intervals over cases (seed {SEED}); below it the megabytes kept, the "
        "mean over cases."
    )
    made = [f'<h3>{escape(one.title)}</h3><div class="card scroll">{tables.kl(one)}</div>' for one in found]
    return f'<p class="note">{escape(note)}</p>{"".join(made)}'


def _difference_section(runs: Sequence[Run], differences: Sequence[Difference]) -> str:
    note = (
        f"{runs[1].name} minus {runs[0].name}, paired on the cases that both have, mean over tasks and lengths. The "
        f"95 % intervals are the bootstrap's from 5000 resamples of the cases within task and length (seed {SEED}); p "
        f"(Holm) is adjusted for the {len(differences)} comparisons."
    )
    return (
        f'<section id="differences"><h2>Differences</h2><p class="note">{escape(note)}</p>'
        f"<p>{escape(significant_line(differences))}</p>"
        f'<div class="card scroll">{tables.differences(runs, differences)}</div></section>'
    )


def _raw(run: Run, folder: Path) -> str:
    links = []
    for path in run.files:
        try:
            address = os.path.relpath(path.resolve(), folder.resolve())
        except ValueError:  # on another drive
            address = str(path.resolve())
        links.append(f'<li><a href="{escape(quote(Path(address).as_posix()))}">{escape(str(path))}</a></li>')
    return f"<ul>{''.join(links)}</ul>"
