"""The report's tables as HTML; all text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..statistics import Interval
from ..summary import budget_text
from ..sweep.units import Failure
from .compare import Difference
from .load import Run
from .numbers import Amount, Point, Setting, is_full, method_label
from .words import budget_name

# White to dark blue through the lightness alone, so that it reads in grey and for every kind of colour vision.
_LIGHT, _DARK = (247, 250, 253), (8, 64, 129)


def accuracy(setting: Setting) -> str:
    """Policies down, budgets across."""

    def cell(point: Point) -> str:
        full = setting.full
        share = "" if full is None or full is point or not full.accuracy.value else (
            f"<small>{point.accuracy.value / full.accuracy.value:.0%} of full</small>"
        )  # fmt: skip
        value = f"<b>{point.accuracy.value:.2f}</b>"
        return f"<td{_ahead(point)}>{value}<small>{between(point.accuracy)}</small>{share}</td>"

    return _by_budget(setting, cell)


def kl(setting: Setting) -> str:
    """The same of the KL, with the megabytes kept."""

    def cell(point: Point) -> str:
        size = f"{point.bytes / 1e6:.2f} MB" if point.bytes > 0 else ""
        if point.kl is None:
            return f"<td>–<small>{size}</small></td>"
        interval = f"{point.kl.low:.3f}–{point.kl.high:.3f}"
        return f"<td>{point.kl.value:.3f}<small>{interval}</small><small>{size}</small></td>"

    return _by_budget(setting, cell)


def _by_budget(setting: Setting, cell) -> str:
    head = "".join(f"<th>{escape(kept(budget))}</th>" for budget in setting.budgets) or "<th>everything kept</th>"
    rows = []
    for method in setting.methods:
        name = f"<th>{breakable(method_label(method))}</th>"
        if is_full(method):
            point = setting.full
            wide = f'<td class="wide" colspan="{max(1, len(setting.budgets))}"'
            found = "" if point is None else cell(point).replace("<td", wide, 1)
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


def heat_map(setting: Setting, budget: Amount) -> str:
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


def _heat(point: Point, task: str) -> str:
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


def differences(runs: Sequence[Run], found: Sequence[Difference]) -> str:
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


def failures(found: Sequence[Failure]) -> str:
    """What failed, where, and why."""
    parts = []
    for one in found:
        trace = f"<pre>{escape(one.traceback)}</pre>" if one.traceback else ""
        parts.append(f"<details><summary>{escape(one.name)}</summary><p>{escape(one.error)}</p>{trace}</details>")
    return f'<div class="card">{"".join(parts)}</div>'


def facts(found: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    rows = "".join(f"<tr><th>{breakable(name)}</th><td>{escape(value)}</td></tr>" for name, value in found)
    return f'<div class="card scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def short_names(runs: Sequence[Run]) -> list[str]:
    """The folders' own names where they differ, else as they were given."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [run.name for run in runs]


def breakable(name: str) -> str:
    """A name that may be broken after its underscores and dots."""
    return escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def kept(budget: Amount) -> str:
    return f"{budget_text(budget)} kept"


def between(interval: Interval) -> str:
    """`.76–.91`."""
    return f"{_short(interval.low)}–{_short(interval.high)}"


def signed(interval: Interval, digits: int = 3) -> str:
    return f"{interval.low:+.{digits}f} to {interval.high:+.{digits}f}"


def _ahead(point: Point) -> str:
    return ' class="ahead"' if point.ahead else ""


def _short(value: float) -> str:
    text = f"{value:.2f}"
    return text if value >= 0.995 else text.removeprefix("0")
