"""The helps of all commands in narrow and wide terminals: lines that fit, words that are whole."""

from __future__ import annotations

import contextlib
import io
import re
from functools import cache

import pytest

from tenure.scripts import cli
from tenure.scripts.help_layout import laid_out

WIDTHS = (40, 60, 80, 120, 200)
GROUPS = sorted({name.split()[0] for name in cli.COMMANDS if " " in name})
LINES = [*([name] for name in cli.COMMANDS), *([group] for group in GROUPS if group not in cli.COMMANDS), []]


class Screen(io.StringIO):
    encoding = "utf-8"  # with frames around tables


@cache
def shown(name: str, width: int) -> list[str]:
    """The lines of a command's help; of the overview without a name."""
    screen = Screen()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(screen):
        patched.setenv("COLUMNS", str(width))
        with contextlib.suppress(SystemExit):
            cli.main([*name.split(), "--help"])
    return screen.getvalue().splitlines()


def words(lines: list[str]) -> set[str]:
    """Words without the frames; a list of choices may be broken after its commas."""
    parts = (part.strip(":") for line in lines for part in re.split(r"[\s│]+|(?<=,)", line))  # headings get a colon
    return {part for part in parts if part.strip("╭╮╰╯─")}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [" ".join(line) for line in LINES], ids=lambda name: name or "overview")
def test_lines_fit_and_words_are_whole(name: str, width: int):
    lines = shown(name, width)
    assert len(lines) > 5
    long = [line for line in lines if len(line) > width and " " in line.strip()]
    assert not long, "more than one word, and wider than the terminal"
    assert not words(lines) - words(shown(name, max(WIDTHS)))
    assert words(shown(name, max(WIDTHS))) == words(lines), "nothing is missing"


HELP = """\
usage: x [-h] --flag {first,second,third,fourth,fifth} [--other NAME]

A line of text.

╭─ options ────────────────────────────────╮
│ -h, --help     show this                 │
│ --flag {first,second,third,fourth,fifth} │
│                which of them; a sentence │
│                that goes on              │
╰──────────────────────────────────────────╯
  $ x --flag first --other something-long
""".splitlines()


def test_a_narrow_terminal_has_texts_below_their_flags(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert "\n".join(laid_out(HELP)).splitlines() == [
        "usage: x [-h] --flag",
        "    {first,second,third,fourth,fifth}",
        "    [--other NAME]",
        "",
        "A line of text.",
        "",
        "options:",
        "  -h, --help",
        "      show this",
        "  --flag {first, second, third, fourth,",
        "    fifth}",
        "      which of them; a sentence that",
        "      goes on",
        "",
        "  $ x --flag first --other",
        "      something-long",
    ]


def test_a_wide_terminal_has_two_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert "\n".join(laid_out(HELP)).splitlines()[6:11] == [
        "  -h, --help            show this",
        "  --flag {first,second,third,fourth,fifth}",
        "                        which of them; a sentence that goes",
        "                        on",
        "",
    ]


def test_styles_and_plain_frames_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = ["\x1b[1musage:\x1b[0m x", " options", " -------- ", "  --flag  \x1b[2mits text\x1b[0m "]
    assert list(laid_out(lines)) == ["usage: x", " options", "  --flag", "      its text"]
