"""Retrieval tasks, fidelity metrics, lm-eval's model type `tenure` (registered by this import), and reports."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from .cases import Case, Record, answer_score
from .cells import Cell, parse_cells
from .harness import Options, register, tasks_folder
from .intervals import Interval, PairedDifference, bootstrap_mean, paired_bootstrap, wilson
from .predictions import kl_to_full, top1_agreement
from .probe import RetrievalProbe
from .risk_control import BudgetDecision, Resplits, RiskControl, draw_cases, long_enough, losses_of, resplit, tasks_of
from .runner import check_inputs, evaluate
from .summary import summarise
from .tasks.builder import GENERATED, RETRIEVAL, RULER, TASKS, CaseBuilder, get_task

register()

__all__ = [
    "GENERATED", "RETRIEVAL", "RULER", "TASKS", "BudgetDecision", "Case", "CaseBuilder", "Cell", "Interval", "Options",
    "PairedDifference", "Record", "Resplits", "RetrievalProbe", "RiskControl", "answer_score", "bootstrap_mean",
    "check_inputs", "draw_cases", "evaluate", "get_task", "kl_to_full", "long_enough", "losses_of", "paired_bootstrap",
    "parse_cells", "register", "resplit", "summarise", "tasks_folder", "tasks_of", "top1_agreement", "wilson",
]  # fmt: skip
