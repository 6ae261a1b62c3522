"""What is compared: policies, scopes and budgets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..eviction import Budget, Policy, get_policy
from ..eviction.budget import SCOPES

NO_SCOPE = "none"
# SnapKV's scores with the heads of a layer competing are AdaKV (Feng et al. 2024) without its floor.
LABELS = {
    ("full", NO_SCOPE): "full cache",
    ("retention", "global"): "retention (global)",
    ("retention", "layer"): "retention (per layer)",
    ("retention", "head"): "retention (per head)",
    ("snapkv", "head"): "SnapKV",
    ("snapkv", "layer"): "AdaKV",
    ("keydiff", "head"): "KeyDiff",
    ("knorm", "head"): "Knorm",
    ("streaming_llm", "head"): "StreamingLLM",
    ("random", "head"): "random",
}


@dataclass(frozen=True)
class Cell:
    """One way to compress: a policy, who competes, and how much stays.

    Attributes:
        policy: an instance.
        scope: "global", "layer" or "head"; "none" for the full cache.
        budget: share of the context that stays, or entries per head; 1.0 for the full cache.
    """

    policy: Policy
    scope: str
    budget: float | int

    @classmethod
    def of(cls, policy: str | Policy, budget: float | int = 1.0, scope: str | None = None) -> Cell:
        """A cell with the policy's default scope unless one is given.

        Raises:
            ValueError: unknown policy or scope, or a budget out of range.
        """
        chosen = get_policy(policy)
        if not chosen.evicts:
            return cls(chosen, NO_SCOPE, 1.0)
        if scope is not None and scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")
        Budget(budget)
        return cls(chosen, scope or chosen.default_scope, budget)

    @property
    def key(self) -> tuple[str, str, float | int]:
        """(policy's name, scope, budget)."""
        return self.policy.name, self.scope, self.budget

    @property
    def label(self) -> str:
        """The name shown to people."""
        return label(self.policy.name, self.scope)

    @property
    def evicts(self) -> bool:
        return self.policy.evicts


def label(policy: str, scope: str) -> str:
    """The name shown to people for a policy and a scope."""
    return LABELS.get((policy, scope), f"{policy} ({scope})")


def parse_cells(names: Iterable[str], budgets: Iterable[float | int]) -> list[Cell]:
    """Cells for names like "retention:global" or "snapkv", each at every budget; the full cache once.

    Raises:
        ValueError: see `Cell.of`.
    """
    cells: dict[Any, Cell] = {}
    budgets = list(budgets)
    for name in names:
        policy, _, scope = name.partition(":")
        for budget in budgets:
            cell = Cell.of(policy, budget, scope or None)
            cells.setdefault(cell.key, cell)
    return list(cells.values())
