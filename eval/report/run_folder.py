"""A run's records, failures and settings from its folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tenure.checked import Range, read, read_fields
from tenure.documents import json_lines, load_json, shown

from ..cases import Record
from ..sweep.sweep_folder import SESSIONS, SETTINGS_FILE, part_paths, read_settings, read_units
from ..sweep.units import Failure, Unit

RESULTS_FILE = "results.json"  # of `tenure demo`
_NEEDED = ("task", "length", "seed", "index", "policy", "scope", "budget", "score")
# Values of fields that another program leaves out.
_ABSENT = {
    "depth": math.nan, "answer": "", "prediction": "", "kl": math.nan, "top1": math.nan, "entries": 0, "bytes": 0,
    "kept_share": math.nan, "seconds": math.nan, "compress_seconds": math.nan, "read_seconds": math.nan,
}  # fmt: skip


@dataclass(frozen=True)
class _DemoResults:
    """The demo's file of results."""

    records: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _ShownModel:
    """Of the settings of a sweep: what a report names the model by."""

    id: str = ""


@dataclass(frozen=True)
class _ShownSettings:
    """The settings that a report shows in a sentence of their own; all of them are in its table."""

    model: _ShownModel | str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    kvpress: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Any] = field(default_factory=dict)
    units: Annotated[int, Range(0)] | None = None
    sessions: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class _SweptTasks:
    """Of the settings of a sweep: the order of its tasks."""

    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordedRun:
    """A run as its folder holds it.

    Attributes:
        folder: as it was given.
        records: of complete cases only.
        failures: cells and cases that failed.
        settings: the run's settings and versions, as they are written there.
        sessions: when and where.
        files: the raw files.
        units: number of cases that were wanted; None where it is not recorded.
    """

    folder: Path
    records: list[Record] = field(repr=False)
    failures: list[Failure] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    sessions: list[dict[str, Any]] = field(repr=False)
    files: list[Path]
    units: int | None = None

    @property
    def name(self) -> str:
        """Of the folder alone: where it is on this machine is nobody else's concern."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def done(self) -> int:
        """Cases that are complete, the failed among them."""
        found = {Unit(one.task, one.length, one.seed, one.index) for one in (*self.records, *self.failures)}
        return len(found)


def load_run(folder: Path) -> RecordedRun:
    """The run in `folder`: a sweep's (finished or not), the demo's, or another program's records.

    Another program's are *.jsonl with one record a line that has at least `task, length, seed, index, policy, scope,
    budget, score`.

    Raises:
        ValueError: there is none of these, or a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}; give one that `tenure sweep` or `tenure demo` wrote")
    if (folder / SETTINGS_FILE).is_file() and part_paths(folder):
        run = _sweep(folder)
    elif (folder / RESULTS_FILE).is_file():
        run = _demo(folder)
    elif sorted(folder.glob("*.jsonl")):
        run = _others(folder)
    else:
        raise ValueError(
            f"{folder} has neither {SETTINGS_FILE} with part-*.jsonl nor {RESULTS_FILE} nor other *.jsonl: give a "
            "folder that `tenure sweep` or `tenure demo` wrote"
        )
    try:
        read(_ShownSettings, run.settings, unknown=set())
    except ValueError as error:
        raise ValueError(f"the settings in {folder} cannot be used: {error}") from None
    if not run.records and not run.failures:
        raise ValueError(f"{folder} has no complete case yet")
    return run


def _sweep(folder: Path) -> RecordedRun:
    settings = read_settings(folder)
    sessions = settings.pop(SESSIONS, [])
    records, failures = [], []
    seen: set[Unit] = set()
    for part in part_paths(folder):
        units, _ = read_units(part, len(settings["cells"]))
        for unit in units.keys() - seen:
            failures += [read(Failure, line, str(part)) for line in units[unit] if "error" in line]
            records += _records((line for line in units[unit] if "error" not in line), part)
        seen |= units.keys()
    order = {tuple(cell): number for number, cell in enumerate(settings["cells"])}
    swept = read(_SweptTasks, settings.get("sweep", {}), str(folder / SETTINGS_FILE), set())
    tasks = {task: number for number, task in enumerate(swept.tasks)}

    def place(record: Record) -> tuple[Any, ...]:
        cell = order.get((record.policy, record.scope, record.budget, record.aware))
        if cell is None:
            raise ValueError(
                f"{folder} has a record of {shown(record.policy)}:{shown(record.scope)} at {record.budget}, which is "
                f"not among the cells in {SETTINGS_FILE}"
            )
        return tasks.get(record.task, 0), record.length, record.seed, record.index, cell

    records.sort(key=place)  # the same order whichever process wrote what
    files = [folder / SETTINGS_FILE, *part_paths(folder)]
    return RecordedRun(folder, records, failures, settings, sessions, files, settings.get("units"))


def _demo(folder: Path) -> RecordedRun:
    path = folder / RESULTS_FILE
    try:
        found = read(_DemoResults, load_json(path), unknown=set())
    except ValueError as error:
        raise ValueError(f"{path} does not hold the demo's results: {error}") from None
    return RecordedRun(folder, list(_records(found.records, path)), [], dict(found.settings), [], [path])


def _others(folder: Path) -> RecordedRun:
    files = sorted(folder.glob("*.jsonl"))
    records: list[Record] = []
    for path in files:
        records += _records((line for _, line in json_lines(path)), path)
    settings: dict[str, Any] = {}
    if (folder / SETTINGS_FILE).is_file():
        settings = _json_mapping(folder / SETTINGS_FILE)
        files = [folder / SETTINGS_FILE, *files]
    return RecordedRun(folder, records, [], settings, [], files)


def _json_mapping(path: Path) -> dict[str, Any]:
    document = load_json(path)
    if not isinstance(document, dict):
        raise ValueError(f"got {shown(document)} in {path}; accepted: a mapping of settings")
    return document


def _records(lines: Iterable[Mapping[str, Any]], path: Path) -> Iterator[Record]:
    """Records whose numbers that were not measured are NaN."""
    for number, line in enumerate(lines, 1):
        try:
            values = read_fields(Record, line, _NEEDED, unknown=set())
        except ValueError as error:
            raise ValueError(f"{path}: record {number}: {error}") from None
        yield Record(**_ABSENT | values | {"correct": values["score"] == 1.0})
