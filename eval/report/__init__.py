"""Runs as one page: tables, curves, heat maps, failures, and the differences of two runs."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from .markdown import report_markdown
from .numbers import Difference, MethodResult, SettingResults, compare_runs, settings_of
from .page import report_page
from .run_folder import RecordedRun, load_run

__all__ = [
    "Difference", "MethodResult", "RecordedRun", "SettingResults", "compare_runs", "load_run", "report_markdown",
    "report_page", "settings_of",
]  # fmt: skip
