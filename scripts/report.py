"""`tenure report`: render one or two runs as an HTML page and Markdown tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .output import WrittenFile


@dataclass
class ReportConfig:
    """Render a run as a page: accuracy, KL and bytes of every policy and budget, tasks, settings, failures.

    For two runs, the page also shows how they differ on the cases that both contain, with paired bootstrap intervals.
    It is a single self-contained file; the same tables are written as Markdown to the same name with .md.
    """

    runs: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN]")]
    """Folders that `tenure sweep` or `tenure demo` wrote; a sweep need not be finished."""
    output: Annotated[Path, WrittenFile((".html", ".htm"))] | None = None
    """Path of the page; by default report.html in the last run's folder."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.runs) <= 2:
            raise ValueError(f"{len(self.runs)} runs are named; one, or two to compare, are accepted")


def main(config: ReportConfig) -> int:
    from ..eval.report import compare_runs, load_run, report_markdown, report_page
    from ..retention.checkpoint import write_atomic

    runs = [load_run(folder) for folder in config.runs]
    differences = compare_runs(*runs) if len(runs) == 2 else []
    page = config.output or config.runs[-1] / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, report_page(runs, differences, page.parent).encode())
    write_atomic(page.with_suffix(".md"), report_markdown(runs, differences).encode())
    print(f"Written: {page}, {page.with_suffix('.md')}")
    return 0
