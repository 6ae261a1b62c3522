"""Consoles and files shared by the commands."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

if TYPE_CHECKING:
    from rich.console import Console

PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class WrittenFile:
    """For `Annotated[Path, ...]`: a command writes this file, which is tried before its work starts.

    Attributes:
        suffixes: accepted ends of its name; none: any.
        extra: of tenure, with matplotlib; empty: nothing but tenure is needed.
    """

    suffixes: tuple[str, ...] = ()
    extra: str = ""

    def check(self, path: Path, flag: str) -> None:
        """Raises:
        ValueError: another suffix, a folder or a device, or a place where nothing can be written.
        ImportError: matplotlib is missing.
        """
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            raise ValueError(f"{flag} is {str(path)!r}; accepted: a name that ends with {', '.join(self.suffixes)}")
        _need_matplotlib(self.extra, flag)
        if path.exists() and not path.is_file():
            raise ValueError(f"{flag} is {str(path)!r}, which is {_kind(path)}; accepted: a file's path")
        _try_folder(path.parent, path, flag)


@dataclass(frozen=True)
class WrittenFolder:
    """For `Annotated[Path, ...]`: a command writes into this folder, which is tried before its work starts.

    Attributes:
        extra: as of `WrittenFile`.
    """

    extra: str = ""

    def check(self, path: Path, flag: str) -> None:
        """Raises:
        ValueError: a file, or a place where nothing can be written.
        ImportError: matplotlib is missing.
        """
        _need_matplotlib(self.extra, flag)
        if path.exists() and not path.is_dir():
            raise ValueError(f"{flag} is {str(path)!r}, which is {_kind(path)}; accepted: a folder's path")
        _try_folder(path, path, flag)


@dataclass(frozen=True)
class Interpreter:
    """For `Annotated[Path, ...]`: the Python of another environment, which has to be there."""

    def check(self, path: Path, flag: str) -> None:
        """Raises:
        ValueError: no file that can be run.
        """
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise ValueError(f"{flag} is {str(path)!r}; accepted: an environment's Python, such as venv/bin/python")


OutputFile = Annotated[Path, WrittenFile()]
OutputFolder = Annotated[Path, WrittenFolder()]
Python = Annotated[Path, Interpreter()]


def prepare_paths(config: Any) -> Any:
    """The config with the user's folder for a `~` that begins a path, which shells leave alone in quotes.

    Raises:
        ValueError, ImportError: what the annotations of its fields refuse.
    """
    if not is_dataclass(config) or isinstance(config, type):
        return config
    given = {each.name: getattr(config, each.name) for each in fields(config) if each.init}
    changed = {name: _expanded(value) for name, value in given.items()}
    if changed != given:
        config = replace(config, **changed)
    for name, annotation in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name, None)
        for rule in _rules(annotation):
            if isinstance(value, Path):
                rule.check(value, f"--{name.replace('_', '-')}")
    return config


def _rules(annotation: Any) -> list[Any]:
    found = [each for each in getattr(annotation, "__metadata__", ()) if hasattr(each, "check")]
    return found + [rule for inner in get_args(annotation) for rule in _rules(inner)]


def _expanded(value: Any) -> Any:
    if isinstance(value, Path):
        return value.expanduser()
    return [_expanded(each) for each in value] if isinstance(value, list) else value


def _need_matplotlib(extra: str, flag: str) -> None:
    if extra and find_spec("matplotlib") is None:
        raise ImportError(f"the pictures of {flag} need matplotlib: pip install 'tenure[{extra}]'")


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or the like"


def _try_folder(folder: Path, path: Path, flag: str) -> None:
    """Writes an empty file to the folder, or to the nearest one above that exists, and removes it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{flag} is {str(path)!r}, and {str(folder)!r} cannot be written: {error.strerror}") from None


def make_console(stderr: bool = False) -> Console:
    """As wide as the terminal, with tables that fit; without one, wide enough; with NO_COLOR, without any style."""
    from .fitted_tables import FittingConsole

    color = None if os.environ.get("NO_COLOR") else "auto"
    console = FittingConsole(stderr=stderr, color_system=color)
    if console.is_terminal:
        return console
    return FittingConsole(stderr=stderr, width=max(console.width, 120), color_system=color)


def write_json(document: Any, path: str | Path) -> None:
    """The document as JSON, written under a temporary name first; NaN and infinity are refused."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, target)


def write_rows(rows: Sequence[Any], path: str | Path) -> None:
    """Dataclass instances as a JSON list of objects."""
    write_json([asdict(row) for row in rows], path)
