"""Consoles and files shared by the commands."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def make_console() -> Console:
    """As wide as the terminal; wide enough for the tables where there is none."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


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
