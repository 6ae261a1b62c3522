"""Whether a calibration's promise holds: many splits of measured cases into calibration and held-out halves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .calibration import RiskControl


@dataclass(frozen=True)
class Resplits:
    """What became of the promise in many splits.

    The splits share one pool of cases and are not independent experiments, and a held-out half is finite: a budget
    whose expected loss is just within the bound exceeds it in about half of the held-out halves.

    Attributes:
        splits: how many were made.
        broken: in how many the chosen budget's mean loss on the held-out half exceeded the bound.
        none: in how many no budget was accepted; nothing was promised there.
        chosen: how often each budget was chosen.
        mean_loss: of the chosen budgets on the held-out halves; NaN where none was ever chosen.
    """

    splits: int
    broken: int
    none: int
    chosen: dict[float | int, int] = field(default_factory=dict)
    mean_loss: float = float("nan")

    @property
    def rate(self) -> float:
        """Share of the splits in which the bound was broken."""
        return self.broken / self.splits


def resplit(
    losses: np.ndarray,
    budgets: Sequence[float | int],
    groups: Sequence[int],
    control: RiskControl,
    splits: int = 200,
    seed: int = 0,
) -> Resplits:
    """Calibrates on a random half of the groups and judges the chosen budget on the others, `splits` times.

    Args:
        losses, budgets: as in `RiskControl.decide`.
        groups: the group of each case; a group is never torn apart: its document, or its own number.

    Raises:
        ValueError: fewer than two groups, or what `RiskControl.decide` refuses.
    """
    labels = np.asarray(groups)
    distinct = np.unique(labels)
    if len(labels) != len(losses) or len(distinct) < 2:
        raise ValueError(f"expected the groups of {len(losses)} cases, two or more different ones, got {len(distinct)}")
    rng = np.random.default_rng(seed)
    chosen: Counter[float | int] = Counter()
    held_out = []
    for _ in range(splits):
        inside = np.isin(labels, rng.permutation(distinct)[: (len(distinct) + 1) // 2])
        outcome = control.decide(losses[inside], budgets)
        if outcome.accepted is not None:
            chosen[budgets[outcome.accepted]] += 1
            held_out.append(float(losses[~inside, outcome.accepted].mean()))
    broken = sum(loss > control.bound for loss in held_out)
    mean = float(np.mean(held_out)) if held_out else float("nan")
    in_order = {budget: chosen[budget] for budget in budgets if chosen[budget]}
    return Resplits(splits, broken, splits - len(held_out), in_order, mean)
