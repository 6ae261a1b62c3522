"""A console that turns tables on their side where the terminal is too narrow for them, so that no number is cut off."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table


class FittingConsole(Console):
    """Prints tables as they are if their numbers fit into a line each, and else as a list of their rows."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(fitted(one, self) if isinstance(one, Table) else one for one in objects), **options)


def fitted(table: Table, console: Console) -> Table:
    """The table, or one of two columns with a section for each of its rows: its name, then headers and values."""
    if len(table.columns) < 3 or needed_width(table, console) <= console.width:
        return table
    turned = Table(
        Column(style="dim", overflow="fold"), Column(justify="right", overflow="fold"), title=table.title,
        title_justify=table.title_justify, caption=table.caption, show_header=False, box=table.box,
    )  # fmt: skip
    names = [column.header for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        turned.add_row(names[0], row[0], style="bold")
        for name, cell in zip(names[1:], row[1:], strict=True):
            turned.add_row(name, cell)
        turned.add_section()
    return turned


def needed_width(table: Table, console: Console) -> int:
    """Columns of the terminal that hold the table without a broken word, or a broken cell that may not be wrapped."""
    options, total = console.options.update_width(10_000), 1
    for column in table.columns:
        widths = []
        for cell in (column.header, *column.cells):
            text = console.render_str(cell) if isinstance(cell, str) else cell
            measured = Measurement.get(console, options, text)
            widths.append(measured.maximum if column.no_wrap else measured.minimum)
        total += max(widths) + 3
    return total
