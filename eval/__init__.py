"""Retrieval tasks, fidelity metrics and reports."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from .cells import Cell, parse_cells
from .fidelity import kl_to_full, top1_agreement
from .probe import RetrievalProbe
from .retrieval import Case, CaseBuilder
from .runner import Record, check_inputs, evaluate
from .statistics import Interval, PairedDifference, bootstrap_mean, paired_bootstrap, wilson
from .summary import summarise
from .templates import TASKS, get_task

__all__ = [
    "TASKS",
    "Case",
    "CaseBuilder",
    "Cell",
    "Interval",
    "PairedDifference",
    "Record",
    "RetrievalProbe",
    "bootstrap_mean",
    "check_inputs",
    "evaluate",
    "get_task",
    "kl_to_full",
    "paired_bootstrap",
    "parse_cells",
    "summarise",
    "top1_agreement",
    "wilson",
]
