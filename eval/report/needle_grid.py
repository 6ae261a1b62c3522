"""The needle grid: accuracy by the length of the context and the depth of the needle ("needle in a haystack").

Single needles and several ones are grids of their own, one a policy and budget. A grid's score is the mean of its
cells, so that lengths and depths with more cases count no more than others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..cases import Record
from .numbers import Amount, Method, is_full

DEPTHS = 10  # rows of a grid: tenths of the context
KINDS: Mapping[str, tuple[str, ...]] = {
    "single needle": ("needle", "niah_single_1", "niah_single_2", "niah_single_3"),
    "several needles": (
        "multikey", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class NeedleGrid:
    """The grid of one policy at one budget.

    Attributes:
        kind: a key of `KINDS`.
        method, budget: the policy with its scope, and the budget.
        lengths: tokens of the contexts, ascending: the columns.
        cells: mean score by `(row, length)`, row 0 at the beginning of the context; cells without cases are absent.
        cases: their number.
    """

    kind: str
    method: Method
    budget: Amount
    lengths: tuple[int, ...]
    cells: Mapping[tuple[int, int], float]
    cases: int

    @property
    def score(self) -> float:
        """The mean of the cells."""
        return sum(self.cells.values()) / len(self.cells)


def needle_grids(records: Sequence[Record]) -> list[NeedleGrid]:
    """The grids of question-agnostic records of a known depth on needle tasks at two lengths or more.

    By kind, the full cache first, then by budget, the largest first, and by score, the highest first.
    """
    grids = []
    for kind, tasks in KINDS.items():
        chosen = [record for record in records if record.task in tasks and not record.aware and record.depth >= 0]
        lengths = tuple(sorted({record.length for record in chosen}))
        if len(lengths) < 2:
            continue
        groups: dict[tuple[Method, Amount], list[Record]] = {}
        for record in chosen:
            groups.setdefault(((record.policy, record.scope), record.budget), []).append(record)
        found = [_grid(kind, *key, lengths, group) for key, group in groups.items()]
        grids += sorted(found, key=lambda one: (not is_full(one.method), -one.budget, -one.score))
    return grids


def _grid(kind: str, method: Method, budget: Amount, lengths: tuple[int, ...], records: Sequence[Record]) -> NeedleGrid:
    scores: dict[tuple[int, int], list[float]] = {}
    for record in records:
        row = min(DEPTHS - 1, int(record.depth * DEPTHS))
        scores.setdefault((row, record.length), []).append(record.score)
    means = {cell: sum(values) / len(values) for cell, values in scores.items()}
    return NeedleGrid(kind, method, budget, lengths, means, len(records))


def depth_name(row: int) -> str:
    """`0–10 %` for row 0."""
    return f"{row * 100 // DEPTHS}–{(row + 1) * 100 // DEPTHS} %"
