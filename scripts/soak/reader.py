"""A reader of untrusted input, and its verdict on what it accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

FEW, SOME, MANY = 0.005, 0.08, 1.0  # shares of readers that take about 100, 5 and 0.3 ms


class WrongResult(AssertionError):
    """A reader accepted what cannot be used."""


@dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
        files: a valid input: content by the name of the file.
        read: reads it from a folder.
        seal: makes checksums in the folder right again after a change.
        share: of the attempts.
    """

    name: str
    files: Mapping[str, bytes]
    read: Callable[[Path], object]
    seal: Callable[[Path], None] | None = None
    share: float = MANY


def require(condition: object, what: str) -> None:
    """Raises WrongResult unless it holds, under `python -O` too."""
    if not condition:
        raise WrongResult(what)
