"""Cells, the things compared: a policy with a scope and a budget."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from tenure.documents import shown

from ..eviction import Budget, Policy, get_policy, policy_text
from ..eviction.plan import SCOPES, EvictionPlan
from ..eviction.presets import make_plan

NO_SCOPE = "none"
# SnapKV's scores with the heads of a layer competing are AdaKV (Feng et al. 2024) without its floor.
LABELS = {
    ("full", NO_SCOPE): "full cache",
    ("retention", "global"): "retention (global)",
    ("retention", "layer"): "retention (per layer)",
    ("retention", "head"): "retention (per head)",
    ("snapkv", "head"): "SnapKV",
    ("snapkv", "layer"): "AdaKV (no floor)",
    ("retention_defensive", "global"): "retention × defensive (global)",
    ("defensive", "layer"): "DefensiveKV",
    ("layer_defensive", "global"): "Layer-DefensiveKV",
    ("defensive(mass=0)", "layer"): "DefensiveKV, window only",
    ("layer_defensive(mass=0)", "global"): "Layer-DefensiveKV, window only",
    ("defensive(protection=cumulative)", "layer"): "DefensiveKV (cumulative)",
    ("layer_defensive(protection=cumulative)", "global"): "Layer-DefensiveKV (cumulative)",
    ("adakv", "layer"): "AdaKV",
    ("criticalkv", "head"): "CriticalKV",
    ("ada_criticalkv", "layer"): "AdaCriticalKV",
    ("pyramidkv", "pyramid"): "PyramidKV",
    ("expected_attention", "head"): "ExpectedAttention",
    ("keydiff", "head"): "KeyDiff",
    ("knorm", "head"): "Knorm",
    ("lagkv", "head"): "LagKV",
    ("rkv", "head"): "R-KV",
    ("cake", "preference"): "CAKE",
    ("tova", "head"): "TOVA",
    ("h2o", "head"): "H2O",
    ("streaming_llm", "head"): "StreamingLLM",
    ("random", "head"): "random",
}


@dataclass(frozen=True)
class Cell:
    """One way to compress: a policy, the entries that compete with each other, and the share that stays.

    Attributes:
        policy: an instance.
        scope: "global", "layer" or "head"; "none" for the full cache.
        budget: share of the context that stays, or entries per head; 1.0 for the full cache.
        prefill_chunk: tokens of the chunks in which the context is read, with a compression after each; None: in one
            piece.
        aware: the question is read before the compression (question-aware), as when a served model is given both; else
            after it (question-agnostic).
        preset: the released code whose rules are followed, see `eviction.presets`; None for ours.
    """

    policy: Policy
    scope: str
    budget: float | int
    prefill_chunk: int | None = None
    aware: bool = False
    preset: str | None = None

    @classmethod
    def of(
        cls, policy: str | Policy, budget: float | int = 1.0, scope: str | None = None,
        prefill_chunk: int | None = None, aware: bool = False, preset: str | None = None,
    ) -> Cell:  # fmt: skip
        """A cell with the policy's or the preset's scope unless one is given.

        Raises:
            ValueError: unknown policy, scope or preset, a budget or chunk out of range, or a value that the preset
                fixes.
        """
        chosen = get_policy(policy)
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ValueError(f"chunks must have at least 1 token, got {prefill_chunk}")
        if not chosen.evicts:
            return cls(chosen, NO_SCOPE, 1.0, aware=aware)
        if scope is not None and scope not in SCOPES:
            raise ValueError(f"unknown scope {shown(scope)}; known: {', '.join(SCOPES)}")
        Budget(budget)
        if preset is not None:
            plan = make_plan(chosen, budget, preset=preset, scope=scope, prefill_chunk=prefill_chunk)
            chosen, scope = plan.policy, plan.scope
        return cls(chosen, scope or chosen.default_scope, budget, prefill_chunk, aware, preset)

    def plan(self, base: EvictionPlan, buffer: int) -> EvictionPlan:
        """The plan of a cache under this cell; what the cell leaves open is as in `base`, unless it has a preset."""
        if self.preset is None:
            return base.changed(
                self.policy, self.budget, scope=self.scope, buffer=buffer, prefill_chunk=self.prefill_chunk
            )
        return make_plan(
            self.policy, self.budget, preset=self.preset, scope=self.scope, buffer=buffer,
            prefill_chunk=self.prefill_chunk,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """The policy with its options, after a + the preset, and after an @ the chunks in which the context is read."""
        text = policy_text(self.policy) + ("" if self.preset is None else f"+{self.preset}")
        return text if self.prefill_chunk is None else f"{text}@{self.prefill_chunk}"

    @property
    def key(self) -> tuple[str, str, float | int]:
        """(name, scope, budget)."""
        return self.name, self.scope, self.budget

    @property
    def label(self) -> str:
        """The name in tables and pictures."""
        return label(self.name, self.scope)

    @property
    def evicts(self) -> bool:
        return self.policy.evicts


def label(policy: str, scope: str) -> str:
    """The name of a policy and a scope in tables and pictures."""
    return LABELS.get((policy, scope), f"{policy} ({scope})")


def parse_cells(names: Iterable[str], budgets: Iterable[float | int], aware: Iterable[bool] = (False,)) -> list[Cell]:
    """Cells for names like "retention:global" or "snapkv", each at every budget; the full cache once.

    `aware`: whether the question is read before the compression; both values give two cells each.

    A name is `POLICY[(OPTION=VALUE,...)][+PRESET][:SCOPE][@CHUNK]`, e.g. "snapkv(window=16):layer@256" or
    "snapkv+defensivekv".

    Raises:
        ValueError: see `Cell.of`; a chunk that is no number.
    """
    cells: dict[Any, Cell] = {}
    budgets, aware = list(budgets), list(aware)
    for name in names:
        rest, at, chunk = name.partition("@")
        if at and not re.fullmatch("[0-9]{1,18}", chunk):
            raise ValueError(f"{shown(name)}: after @ comes the number of a chunk's tokens, got {shown(chunk)}")
        rest, _, scope = rest.partition(":")
        policy, _, preset = rest.partition("+")
        for budget, knows in product(budgets, aware):
            cell = Cell.of(policy, budget, scope or None, int(chunk) if at else None, knows, preset or None)
            cells.setdefault((*cell.key, cell.aware), cell)
    return list(cells.values())
