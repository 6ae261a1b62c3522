"""Retrieval tasks, fidelity metrics, lm-eval's model type `tenure` (registered by this import), and reports."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from .calibration import Outcome, RiskControl
from .cases import Case, answer_score
from .cells import Cell, parse_cells
from .draws import draw_cases, long_enough, losses_of, tasks_of
from .fidelity import kl_to_full, top1_agreement
from .harness import Options, register, tasks_folder
from .probe import RetrievalProbe
from .resplits import Resplits, resplit
from .retrieval import CaseBuilder, check_task
from .runner import Record, check_inputs, evaluate
from .statistics import Interval, PairedDifference, bootstrap_mean, paired_bootstrap, wilson
from .summary import summarise
from .tasks.kinds import KINDS, RULER, TaskBuilder
from .templates import TASKS, get_task

register()

__all__ = [
    "KINDS",
    "RULER",
    "TASKS",
    "Case",
    "CaseBuilder",
    "Cell",
    "Interval",
    "Options",
    "Outcome",
    "PairedDifference",
    "Record",
    "Resplits",
    "RetrievalProbe",
    "RiskControl",
    "TaskBuilder",
    "answer_score",
    "bootstrap_mean",
    "check_inputs",
    "check_task",
    "draw_cases",
    "evaluate",
    "get_task",
    "kl_to_full",
    "long_enough",
    "losses_of",
    "paired_bootstrap",
    "parse_cells",
    "register",
    "resplit",
    "summarise",
    "tasks_folder",
    "tasks_of",
    "top1_agreement",
    "wilson",
]
