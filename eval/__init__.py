"""Retrieval tasks, fidelity metrics, lm-eval's model type `tenure` (registered by this import), and reports."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from typing import TYPE_CHECKING

from tenure.lazy_names import lazy_names

from .harness.registration import register, tasks_folder

if TYPE_CHECKING:
    from .cases import Case, Record, answer_score
    from .cells import Cell, parse_cells
    from .harness.options import Options
    from .intervals import Interval, PairedDifference, bootstrap_mean, paired_bootstrap, wilson
    from .predictions import kl_to_full, top1_agreement
    from .probe import RetrievalProbe
    from .risk_control import (
        BudgetDecision,
        Resplits,
        RiskControl,
        draw_cases,
        long_enough,
        losses_of,
        resplit,
        tasks_of,
    )
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

# Imported on first use: lm-eval learns of the model type, and commands print their help, without torch.
_NAMES = {
    "cases": "Case Record answer_score",
    "cells": "Cell parse_cells",
    "harness.options": "Options",
    "intervals": "Interval PairedDifference bootstrap_mean paired_bootstrap wilson",
    "predictions": "kl_to_full top1_agreement",
    "probe": "RetrievalProbe",
    "risk_control": "BudgetDecision Resplits RiskControl draw_cases long_enough losses_of resplit tasks_of",
    "runner": "check_inputs evaluate",
    "summary": "summarise",
    "tasks.builder": "GENERATED RETRIEVAL RULER TASKS CaseBuilder get_task",
}
__getattr__ = lazy_names(__name__, _NAMES)
