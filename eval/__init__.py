"""Retrieval tasks, fidelity metrics and reports."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from .calibration import Outcome, RiskControl
from .cells import Cell, parse_cells
from .draws import draw_cases, long_enough, losses_of, tasks_of
from .fidelity import kl_to_full, top1_agreement
from .probe import RetrievalProbe
from .resplits import Resplits, resplit
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
    "Outcome",
    "PairedDifference",
    "Record",
    "Resplits",
    "RetrievalProbe",
    "RiskControl",
    "bootstrap_mean",
    "check_inputs",
    "draw_cases",
    "evaluate",
    "get_task",
    "kl_to_full",
    "long_enough",
    "losses_of",
    "paired_bootstrap",
    "parse_cells",
    "resplit",
    "summarise",
    "tasks_of",
    "top1_agreement",
    "wilson",
]
