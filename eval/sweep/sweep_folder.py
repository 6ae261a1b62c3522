"""A sweep's folder: settings.json, and one part-K.jsonl a process with one line for each case and cell.

All lines of a unit are written at once and stand together; a unit counts when all are there, so a process that is
killed at any moment loses at most the unit it was at. The next start removes the rest of such a unit. `SweepFolder`
holds the folder's lock; while it does, part-K.jsonl is written by process K alone. A part-K.jsonl.gz counts as well:
an earlier run, compressed.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tenure.checked import KeptBudget, Size, read
from tenure.documents import file_lines, load_json, parse_json

from ...retention.checkpoint import write_atomic
from ..cases import Label, Record
from .units import Failure, Unit

SETTINGS_FILE = "settings.json"
SESSIONS = "sessions"  # when and how it ran, which may differ from start to start
_PART = re.compile(r"part-(\d+)\.jsonl(\.gz)?")
Line = dict[str, Any]


def part_path(folder: Path, number: int) -> Path:
    """The file that process `number` writes."""
    return folder / f"part-{number}.jsonl"


def part_paths(folder: Path) -> list[Path]:
    """The parts that are there, by number."""
    found = {path: _PART.fullmatch(path.name) for path in folder.glob("part-*.jsonl*")}
    numbers = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(numbers, key=lambda path: (numbers[path], path.name))


def append_unit(path: Path, results: Iterable[Record | Failure]) -> None:
    """Adds the lines of one unit in a single write that has reached the disk when this returns."""
    text = "".join(json.dumps(one.to_dict(), ensure_ascii=False, allow_nan=False) + "\n" for one in results)
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_units(path: Path, cells: int) -> tuple[dict[Unit, list[Line]], bool]:
    """The complete units of a part, and whether it holds nothing else.

    Args:
        cells: number of lines of a complete unit, unless the unit failed as a whole.

    Raises:
        ValueError: a line before the last that no sweep wrote, or a file that is too long or cannot be unpacked.
    """
    lines, rest = 0, False  # whether the last line was cut short
    units: dict[Unit, list[Line]] = {}
    for number, text in file_lines(path):
        rest = not text.endswith(b"\n")
        if rest:
            break
        try:
            line = parse_json(text, f"line {number}")
            units.setdefault(Unit.of(line), []).append(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}, is not a sweep's record: {error}: remove it or the file"
            ) from None
        lines += 1
    # A unit that is there twice was written by a process that outlived its parent, and by the next one.
    complete = {unit: found[:cells] for unit, found in units.items() if len(found) >= cells or is_whole_failure(found)}
    return complete, not rest and sum(map(len, complete.values())) == lines


def is_whole_failure(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the lines of a unit say that the case itself failed."""
    return len(lines) == 1 and "error" in lines[0] and lines[0].get("policy") is None


@dataclass(frozen=True)
class _SweepSettings:
    """Of settings.json: policy, scope, budget and awareness of every cell, in the order of a unit's lines."""

    cells: Annotated[tuple[tuple[Label, Label, KeptBudget, bool], ...], Size(1)]
    sessions: tuple[Mapping[str, Any], ...] = ()


@dataclass
class SweepFolder:
    """A sweep's folder, open for writing; use as a context manager.

    Attributes:
        folder: made if it is not there.
        settings: those that the numbers depend on; they must equal those that the folder was begun with.
            `settings["cells"]` lists the cells.
        session: about this start; added to those before.
        retry_failed: units with a failure are forgotten, so that they are run again.
        done: after entering, the units that need not be run.

    Raises:
        ValueError: on entering: other settings, another process that writes there, or files that no sweep wrote.
    """

    folder: Path
    settings: dict[str, Any]
    session: dict[str, Any] = field(default_factory=dict)
    retry_failed: bool = False
    done: set[Unit] = field(default_factory=set, init=False)

    def __enter__(self) -> SweepFolder:
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(f"another sweep writes to {self.folder}: wait for it, or give another --output") from None
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def failures(self) -> list[Failure]:
        """All that failed, in this start or one before."""
        lines = [line for part in part_paths(self.folder) for found in self._read(part)[0].values() for line in found]
        return [read(Failure, line) for line in lines if "error" in line]

    def _open(self) -> None:
        path = self.folder / SETTINGS_FILE
        sessions = []
        if path.is_file():
            before = read_settings(self.folder)
            sessions = before.pop(SESSIONS, [])
            changed = difference(before, json.loads(json.dumps(self.settings)))
            if changed:
                raise ValueError(f"{self.folder} was begun with other settings, {changed}: give another --output")
        elif part_paths(self.folder):
            raise ValueError(f"{self.folder} has records but no {SETTINGS_FILE}: give another --output")
        document = self.settings | {SESSIONS: [*sessions, self.session]}
        write_atomic(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
        for part in part_paths(self.folder):
            self._repair(part)

    def _repair(self, part: Path) -> None:
        """Leaves whole units in a file, none that another file has too."""
        units, clean = self._read(part)
        keep = {
            unit: lines
            for unit, lines in units.items()
            if unit not in self.done and not (self.retry_failed and any("error" in line for line in lines))
        }
        if not clean or len(keep) < len(units):
            text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for lines in keep.values() for one in lines)
            data = text.encode()
            write_atomic(part, gzip.compress(data) if part.suffix == ".gz" else data)
        self.done |= set(keep)

    def _read(self, part: Path) -> tuple[dict[Unit, list[Line]], bool]:
        return read_units(part, len(self.settings["cells"]))


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in settings.json.

    Raises:
        ValueError: it is absent or not a sweep's.
    """
    path = folder / SETTINGS_FILE
    try:
        document = load_json(path)
        read(_SweepSettings, document, unknown=set())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {SETTINGS_FILE}") from None
    except ValueError as error:
        raise ValueError(f"{path} does not hold a sweep's settings: {error}") from None
    return document


def difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """The first setting that differs, in words; "" if none does. The listing of cells follows from the other settings
    and comes last."""
    names = sorted({*before, *now}, key=lambda name: (name == "cells", name))
    for name in names:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            return difference(old, new, f"{prefix}{name}.")
        return f"{prefix}{name} was {_short(old)} and is now {_short(new)}"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:150]} …"
