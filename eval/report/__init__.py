"""Runs as one page: tables, curves, heat maps, failures, and the differences of two runs."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from .compare import Difference, compare_runs
from .load import Run, load_run
from .markdown import report_markdown
from .numbers import Point, Setting, settings_of
from .page import report_page

__all__ = [
    "Difference",
    "Point",
    "Run",
    "Setting",
    "compare_runs",
    "load_run",
    "report_markdown",
    "report_page",
    "settings_of",
]
