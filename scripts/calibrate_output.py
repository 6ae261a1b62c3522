"""What `tenure calibrate` shows and writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..eval import BudgetDecision, Cell, Resplits, RiskControl, bootstrap_mean, resplit
from ..eval.summary import budget_text
from ..retention import Calibration
from ..retention.checkpoint import write_atomic

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .calibrate import Config
    from .calibrate_cases import Measured

SPLITS = 200


def introduction(config: Config, cells: Sequence[Cell], names: Sequence[str]) -> str:
    """What is about to be measured, and what the promise will be about."""
    lengths = " or ".join(str(length) for length in config.length)
    shown = f"{', '.join(names[:8])}{', …' * (len(names) > 8)}"
    lines = [
        f"{cells[-1].label}: {config.cases} documents of {lengths} tokens from {len(names)} texts ({shown}), each "
        f"compressed to {len(cells) - 1} budgets before its question is known."
    ]
    if config.cases > len(names):
        lines.append(
            "Several documents share a text: the promise is for further passages of these texts, and for other texts "
            "only as far as they are like them."
        )
    return "\n".join(lines)


def table(config: Config, outcome: BudgetDecision, losses: np.ndarray) -> Table:
    """One row a budget, the largest first."""
    from rich.table import Table

    statistic = "p-value" if config.method == "ltt" else "bound on the mean"
    rows = Table(title=f"Loss: {loss_text(config)}; bound {config.bound:g}", title_justify="left")
    for name in ("budget", "mean loss", "largest", statistic):
        rows.add_column(name, justify="right")
    rows.add_column("accepted")
    for row, largest in zip(outcome.table, losses.max(0), strict=True):
        mark = "yes" if row.accepted else "no"
        rows.add_row(
            budget_text(row.budget), f"{row.mean_loss:.4f}", f"{largest:.3f}", f"{row.statistic:.2g}", mark
        )
    return rows


def loss_text(config: Config) -> str:
    """The loss in words."""
    if config.loss == "kl":
        return f"KL to the full cache in nats, at most {config.max_loss:g} a case"
    kind = "" if config.loss == "answers" else f" ({config.loss})"
    return f"answers{kind} that the full cache gives right and the compressed one wrong"


def conclusion(calibration: Calibration) -> str:
    """The chosen budget and its promise."""
    return f"{budget_text(calibration.budget)} of the cache: {calibration.promise} drawn like these."


def refusal(control: RiskControl, outcome: BudgetDecision, cases: int) -> str:
    """Why no budget qualifies and what would help, in one sentence."""
    first = outcome.table[0]
    needed = control.cases_needed(first.mean_loss)
    if needed is None:
        help_ = "no number of cases would do: raise the bound or try larger budgets"
    else:
        help_ = f"{needed} cases would do for {control.bound:g} if its mean stayed as it is"
    reachable = control.reachable(first.mean_loss, cases)
    return (
        f"no budget qualifies and nothing is stored: {budget_text(first.budget)}, the largest, has a mean loss of "
        f"{first.mean_loss:.4f}; with {cases} cases it meets a bound of {reachable:.4f} or more, and {help_}"
    )


def show_validation(
    console: Console,
    config: Config,
    control: RiskControl,
    outcome: BudgetDecision,
    measured: Measured,
    validation: Measured,
) -> None:
    """The chosen budget on the held-out documents, and the promise in random splits of all documents."""
    from rich.table import Table

    names = ", ".join(dict.fromkeys(sorted(validation.documents)))
    if outcome.accepted is not None:
        found = bootstrap_mean(list(validation.losses[:, outcome.accepted]), config.seed)
        budget = budget_text(outcome.table[outcome.accepted].budget)
        verdict = "within" if found.value <= config.bound else "above"
        console.print(
            f"Held out, {len(validation.losses)} documents of {names}: mean loss {found.value:.4f} at {budget} (95% "
            f"interval {found.low:.4f} to {found.high:.4f}), {verdict} the bound.",
            markup=False,
            highlight=False,
        )
    losses = np.concatenate([measured.losses, validation.losses])
    documents = measured.documents + validation.documents
    budgets = [row.budget for row in outcome.table]
    rows = Table(title=f"{SPLITS} random halves of all {len(losses)} documents, calibrated on one, judged by the other")
    rows.title_justify = "left"
    for name in ("halves of", "bound broken", "promised", "none accepted", "held-out mean", "chosen"):
        rows.add_column(name, justify="left" if name == "chosen" else "right")
    promised = f"≤ {1 - config.confidence:.0%}" if config.method == "ltt" else "mean ≤ bound"
    groups: dict[str, Sequence[int]] = {"documents": range(len(losses))}
    if len(set(documents)) > 1:
        order = {name: number for number, name in enumerate(sorted(set(documents)))}
        groups["texts"] = [order[name] for name in documents]
    for name, labels in groups.items():
        found = resplit(losses, budgets, labels, control, SPLITS, config.seed)
        rows.add_row(name, *_split_cells(found, promised))
    console.print(rows)


def _split_cells(found: Resplits, promised: str) -> list[str]:
    chosen = ", ".join(f"{budget_text(budget)} ({times})" for budget, times in found.chosen.items())
    return [f"{found.rate:.1%}", promised, str(found.none), f"{found.mean_loss:.4f}", chosen]


def write_json(
    path: Path,
    calibration: Calibration | None,
    outcome: BudgetDecision,
    measured: Measured,
    validation: Measured | None,
) -> None:
    """The calibration (null if there is none), the table, and every single case of both sets."""
    document: dict[str, Any] = {
        "calibration": None if calibration is None else calibration.to_dict(),
        "table": [asdict(row) for row in outcome.table],
    }
    for name, cases in (("measured", measured), ("validation", validation)):
        if cases is not None:
            document[name] = {
                "documents": cases.documents,
                "losses": cases.losses.tolist(),
                "records": [record.to_dict() for record in cases.records],
            }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
