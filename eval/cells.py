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
from ..eviction.policies.policy import Protection
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
        protection: sinks and recent tokens in place of the policy's own; None for those.
    """

    policy: Policy
    scope: str
    budget: float | int
    prefill_chunk: int | None = None
    aware: bool = False
    preset: str | None = None
    protection: Protection | None = None

    @classmethod
    def of(
        cls, policy: str | Policy, budget: float | int = 1.0, scope: str | None = None,
        prefill_chunk: int | None = None, aware: bool = False, preset: str | None = None,
        protection: Protection | None = None,
    ) -> Cell:  # fmt: skip
        """A cell with the policy's or the preset's scope unless one is given.

        Raises:
            ValueError: unknown policy, scope or preset, a budget or chunk out of range, a value that the preset fixes,
                or a protection with a preset.
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
            if protection is not None:
                raise ValueError(f"presets protect no tokens: leave out {_brackets(protection)}, or +{preset}")
            plan = make_plan(chosen, budget, preset=preset, scope=scope, prefill_chunk=prefill_chunk)
            chosen, scope = plan.policy, plan.scope
        return cls(chosen, scope or chosen.default_scope, budget, prefill_chunk, aware, preset, protection)

    def plan(self, base: EvictionPlan, buffer: int) -> EvictionPlan:
        """The plan of a cache under this cell; what the cell leaves open is as in `base`, unless it has a preset."""
        if self.preset is None:
            return base.changed(
                self.policy, self.budget, scope=self.scope, buffer=buffer, prefill_chunk=self.prefill_chunk,
                protection=self.protection,
            )  # fmt: skip
        return make_plan(
            self.policy, self.budget, preset=self.preset, scope=self.scope, buffer=buffer,
            prefill_chunk=self.prefill_chunk,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """The policy with its options, in brackets the protection, then the preset and the tokens of its chunks."""
        text = policy_text(self.policy) + ("" if self.protection is None else _brackets(self.protection))
        text += "" if self.preset is None else f"+{self.preset}"
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
    name, bracket, rest = policy.partition("[")
    if bracket and (name, scope) in LABELS:
        return f"{LABELS[name, scope]} [{rest}"
    return LABELS.get((policy, scope), f"{policy} ({scope})")


def _brackets(protection: Protection) -> str:
    """`[4,32]`, `[4,32,10%]` with a share, `[4,32,10%,50%]` with another one while a text continues."""
    shares = [protection.share, protection.later_share]
    last = max((index for index, default in enumerate((1.0, None)) if shares[index] != default), default=-1)
    text = "".join(f",{100 * share:g}%" for share in shares[: last + 1] if share is not None)
    return f"[{protection.sinks},{protection.recent}{text}]"


_SHARE = r"(?:,([0-9]{1,3}(?:\.[0-9]{1,3})?)%)?"
_PROTECTION = re.compile(rf"(.*)\[([0-9]{{1,9}}),([0-9]{{1,9}}){_SHARE}{_SHARE}\]")


def _split_protection(name: str) -> tuple[str, Protection | None]:
    """("retention", its protection) of "retention[4,32,10%]"."""
    if "[" not in name and "]" not in name:
        return name, None
    found = _PROTECTION.fullmatch(name)
    if found is None:
        raise ValueError(f"{shown(name)}: brackets hold sinks, recent tokens and perhaps shares: [4,32] or [4,32,10%]")
    policy, sinks, recent, share, later = found.groups()
    shares = 1.0 if share is None else float(share) / 100, None if later is None else float(later) / 100
    return policy, Protection(int(sinks), int(recent), *shares)


def parse_cells(names: Iterable[str], budgets: Iterable[float | int], aware: Iterable[bool] = (False,)) -> list[Cell]:
    """Cells for names like "retention:global" or "snapkv", each at every budget; the full cache once.

    `aware`: whether the question is read before the compression; both values give two cells each.

    A name is a policy, its options in parentheses, its sinks and recent tokens in brackets, and after +, : and @ a
    preset, a scope and the tokens of a chunk; all but the policy may be left out: "snapkv(window=16):layer@256",
    "snapkv+defensivekv", "retention[4,32]", or "retention[4,32,25%]" with at most a quarter of a head's entries.

    Raises:
        ValueError: see `Cell.of`; a chunk that is no number, or brackets with something else.
    """
    cells: dict[Any, Cell] = {}
    budgets, aware = list(budgets), list(aware)
    for name in names:
        rest, at, chunk = name.partition("@")
        if at and not re.fullmatch("[0-9]{1,18}", chunk):
            raise ValueError(f"{shown(name)}: after @ comes the number of a chunk's tokens, got {shown(chunk)}")
        rest, _, scope = rest.partition(":")
        rest, _, preset = rest.partition("+")
        policy, protection = _split_protection(rest)
        for budget, knows in product(budgets, aware):
            size = int(chunk) if at else None
            cell = Cell.of(policy, budget, scope or None, size, knows, preset or None, protection)
            cells.setdefault((*cell.key, cell.aware), cell)
    return list(cells.values())
