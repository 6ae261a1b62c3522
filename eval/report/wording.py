"""Sentences and facts that the page and the Markdown share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..intervals import Interval
from ..summary import budget_text
from .numbers import SEED, Amount, Difference, method_label
from .run_folder import RecordedRun


def run_line(run: RecordedRun) -> str:
    """One line about a run: model, device, versions, numbers of cases and records."""
    settings = run.settings
    model = settings.get("model", "")
    name = model.get("id", "") if isinstance(model, Mapping) else str(model)
    versions = {**settings.get("versions", {}), **settings.get("kvpress", {})}  # where kvpress answered, by its own
    parts = [
        ", ".join(filter(None, [name, str(settings.get("dtype", "")), str(settings.get("device", ""))])),
        f"{run.done} cases, {len(run.records):,} records",
        ", ".join(f"{key} {value}" for key, value in versions.items()),
    ]
    return "; ".join(filter(None, parts)) + "."


def intervals_note() -> str:
    return (
        "Accuracy is the mean of the tasks' mean scores. Intervals are 95 %: the bootstrap's over cases within the "
        f"tasks (2000 resamples, seed {SEED}); of a single task, Wilson's if every answer is right or wrong."
    )


def significant_line(differences: Sequence[Difference]) -> str:
    """A sentence about the accuracies that differ."""
    found = [one for one in differences if one.significant]
    if not found:
        return f"No accuracy differs significantly: all {len(differences)} intervals hold 0."
    names = [f"{method_label(one.method)} at {budget_name(one)} ({one.accuracy.value:+.2f})" for one in found]
    kept = sum(one.holm < 0.05 for one in found)
    return (
        f"{len(found)} of {len(differences)} accuracies differ (their interval leaves out 0), {kept} of them also "
        f"after Holm's correction: {'; '.join(names)}."
    )


def budget_name(one: Difference) -> str:
    return budget_text(one.budget) + (", question-aware" if one.aware else "")


def facts_of(run: RecordedRun) -> list[tuple[str, str]]:
    """Settings and sessions, flat, as (name, value), without the list of cells, which follows from the others."""
    settings = {name: value for name, value in run.settings.items() if name != "cells"}
    facts = list(_flat(settings))
    for number, session in enumerate(run.sessions, 1):
        facts += _flat(session, f"session {number}: ")
    return facts


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            facts += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            facts.append((prefix + name, ", ".join(map(_plain, value)) or "–"))
        else:
            facts.append((prefix + name, _plain(value)))
    return facts


def _plain(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def short_names(runs: Sequence[RecordedRun]) -> list[str]:
    """The folders' own names; where they are the same, with the parents' names, or else with numbers."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    return names if len(set(names)) == len(names) else [f"{number}: {name}" for number, name in enumerate(names, 1)]


def kept(budget: Amount) -> str:
    return f"{budget_text(budget)} kept"


def between(interval: Interval) -> str:
    """`.76–.91`."""
    return f"{_short(interval.low)}–{_short(interval.high)}"


def signed(interval: Interval, digits: int = 3) -> str:
    return f"{interval.low:+.{digits}f} to {interval.high:+.{digits}f}"


def _short(value: float) -> str:
    text = f"{value:.2f}"
    return text if value >= 0.995 else text.removeprefix("0")
