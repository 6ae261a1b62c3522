"""Help texts that fit the terminal, without a broken word: tyro's and argparse's tables of flags, laid out once more.

tyro fits its table to the terminal, but not the texts around it, and breaks words where its second column is narrow;
argparse breaks at hyphens, and leaves usage lines and examples as they are.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

MIN_WIDTH = 40  # columns: narrower terminals break lines of this length themselves
NARROW = 56  # columns, below which the texts of flags stand under the flags
WIDE = 128  # columns in which a table is made that is laid out again: one line a flag, and one table beside no other
STYLE = re.compile(r"\x1b\[[0-9;]*m")
FRAME = "│╭╮╰╯─"
# A flag and its text, two or more spaces between them.
ENTRY = re.compile(r"(?P<indent> *)(?P<name>\S+(?: \S+)*)(?: {2,}(?P<text>\S.*))?")


def terminal_width() -> int:
    return max(MIN_WIDTH, shutil.get_terminal_size().columns)


def wrapped(text: str, first: str = "", rest: str = "") -> str:
    """The paragraphs of a text, which blank lines separate, within the terminal's width.

    Args:
        first, rest: stand before the first line of a paragraph, and before its other lines.
    """
    fill = textwrap.TextWrapper(terminal_width(), first, rest, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(fill(" ".join(paragraph.split())) for paragraph in text.split("\n\n"))


@contextmanager
def fitted_help(arguments: Sequence[str], whole: bool = False) -> Iterator[None]:
    """Fits what is printed to stdout in the block to the terminal.

    Args:
        arguments: of the command; unless they ask for help, only long lines are wrapped.
        whole: lay out everything, in wide terminals too.
    """
    target, given = sys.stdout, os.environ.get("COLUMNS")
    width = terminal_width()
    again = any(flag in arguments for flag in ("-h", "--help")) and (whole or width < NARROW)
    held = _Held(target)
    if again:
        os.environ["COLUMNS"] = str(WIDE)
    try:
        with redirect_stdout(held):
            yield
    finally:
        if given is not None:
            os.environ["COLUMNS"] = given
        elif again:
            del os.environ["COLUMNS"]
        lines = held.getvalue().splitlines()
        fitting = laid_out(lines) if again else (_fitting(line, width) for line in lines)
        for line in fitting:
            print(line, file=target)
        target.flush()


def _fitting(line: str, width: int) -> str:
    return wrapped(line) if len(line) > width and "\x1b" not in line else line


def laid_out(lines: Sequence[str]) -> Iterator[str]:
    """The lines of a help text within the terminal's width: tables of flags, the texts around them, and no frames."""
    lines = [_without_frame(STYLE.sub("", line)) for line in lines if line.strip(" -") or not line.strip()]
    position = 0
    while position < len(lines):
        found = ENTRY.fullmatch(lines[position].rstrip())
        position += 1
        if found is None:  # a blank line
            yield ""
            continue
        indent, name, text = found["indent"], found["name"], [found["text"] or ""]
        while position < len(lines) and _indent(lines[position]) > len(indent) + 4:  # the text goes on
            text.append(lines[position].strip())
            position += 1
        if any(text):
            yield from _entry(indent, name, " ".join(text).strip())
        else:
            command = name.startswith(("usage:", "$ "))
            yield wrapped(name, indent, indent + "    " * command)


def _without_frame(line: str) -> str:
    if line.startswith("╭"):
        return f"{line.strip(FRAME + ' ')}:"
    if line.startswith("│"):
        return f" {line.strip('│')}".rstrip()
    return "" if line.startswith("╰") else line.rstrip()


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" ")) if line.strip() else 0


def _entry(indent: str, name: str, text: str) -> Iterator[str]:
    """A flag and its text: in two columns, or one below the other where the terminal or the flag needs it."""
    narrow = terminal_width() < NARROW
    column = indent + " " * (4 if narrow else 22)
    if not narrow and len(name) + 2 <= len(column) - len(indent):
        yield wrapped(text, f"{indent}{name:<{len(column) - len(indent)}}", column)
        return
    if len(indent + name) > terminal_width():
        name = re.sub(r",(?=\S)", ", ", name)  # lists of choices may be broken between these
    yield wrapped(name, indent, indent + "  ")
    yield wrapped(text, column, column)


class _Held(io.StringIO):
    """Keeps what is written, and looks like the stream that it stands for."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self._target = target

    def isatty(self) -> bool:
        return self._target.isatty()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._target.encoding
