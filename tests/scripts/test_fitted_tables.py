"""Tables of all widths of terminals: no line is too long, and no number is cut off."""

from __future__ import annotations

import io

import pytest
from rich.table import Column, Table

from tenure.scripts.fitted_tables import FittingConsole


def printed(width: int, no_wrap: bool) -> str:
    out = io.StringIO()
    table = Table(
        Column("policy", no_wrap=no_wrap), Column("makespan s", justify="right", no_wrap=no_wrap),
        Column("GB, wasted", no_wrap=no_wrap), Column("vs lru_reactive (paper)", no_wrap=no_wrap), title="one cell",
    )  # fmt: skip
    table.add_row("ste_prefetch", "12345.6", "102, 1", "1.0234 (1.24)")
    table.add_row("expected_time", "[bold]98765.4[/bold]", "103, 2", "2.0567")
    FittingConsole(file=out, width=width, color_system=None).print(table)
    return out.getvalue()


@pytest.mark.parametrize("no_wrap", [True, False])
@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_every_number_is_whole(width: int, no_wrap: bool):
    text = printed(width, no_wrap)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for word in ("ste_prefetch", "expected_time", "12345.6", "98765.4", "1.0234", "(1.24)", "2.0567", "one cell"):
        assert word in text, f"{word} at {width}"


def test_a_wide_terminal_gets_rows_and_a_narrow_one_a_list():
    assert sum("ste_prefetch" in line and "12345.6" in line for line in printed(120, True).splitlines()) == 1
    assert not any("ste_prefetch" in line and "12345.6" in line for line in printed(40, True).splitlines())
