"""How many entries may stay, who competes for them, and when eviction runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from .policies.base import Policy

SCOPES = ("global", "layer", "head")


@dataclass(frozen=True)
class Budget:
    """The entries that may stay, per head on average.

    Attributes:
        amount: a float in (0, 1] is a share of the tokens a row has seen; an int >= 1 is entries per head. A row's
            total is that number times layers times heads.

    Raises:
        ValueError: the amount is neither.
    """

    amount: float | int

    def __post_init__(self) -> None:
        amount = self.amount
        whole = isinstance(amount, Integral) and not isinstance(amount, bool) and amount >= 1
        share = isinstance(amount, Real) and not isinstance(amount, Integral) and 0 < amount <= 1
        if not whole and not share:
            raise ValueError(
                f"budget {amount!r} is out of range: give a float in (0, 1], the share of the tokens seen, or an int "
                ">= 1, entries per head on average"
            )

    @property
    def unlimited(self) -> bool:
        """Nothing is ever evicted."""
        return not isinstance(self.amount, Integral) and self.amount == 1

    def per_head(self, tokens: int) -> int:
        """Entries per head on average for a row that has seen `tokens` tokens; at least 1."""
        if isinstance(self.amount, Integral):
            return int(self.amount)
        return max(1, int(self.amount * tokens + 1e-6))  # 0.29 * 100 is 28.999… in floats


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a cache evicts and when.

    Attributes:
        policy: scores the entries.
        budget: how many stay.
        scope: who competes: "head" gives every (layer, head) the same number, "layer" lets the heads of a layer
            compete, "global" all heads of all layers of a row. Rows never compete.
        sinks, recent: the first and last tokens of a row, always kept and counted in the budget. If they alone would
            exceed it, fewer recent tokens are protected, then fewer sinks.
        buffer: tokens that may be written above the budget before eviction runs again.

    Raises:
        ValueError: unknown scope or a negative number.
    """

    policy: Policy
    budget: Budget
    scope: str
    sinks: int = 4
    recent: int = 32
    buffer: int = 128

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"unknown scope {self.scope!r}; known: {', '.join(SCOPES)}")
        for name in ("sinks", "recent", "buffer"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def changed(self, policy: Policy | None, budget: float | int | None, scope: str | None, **numbers: Any) -> Plan:
        """The plan with what is not None replaced; a new policy brings its default scope unless one is given."""
        if policy is not None and scope is None:
            scope = policy.default_scope
        new = {"policy": policy, "budget": None if budget is None else Budget(budget), "scope": scope, **numbers}
        return replace(self, **{name: value for name, value in new.items() if value is not None})

    @property
    def evicts(self) -> bool:
        return self.policy.evicts and not self.budget.unlimited

    def protected(self, tokens: int) -> tuple[int, int]:
        """(sinks, recent) that are really protected in a row that has seen `tokens` tokens."""
        allowed = self.budget.per_head(tokens)
        sinks = min(self.sinks, allowed)
        return sinks, min(self.recent, allowed - sinks)

    def due(self, stored: int, tokens: int, new: int, segments: int) -> bool:
        """Whether a row must evict now.

        Args:
            stored: entries of the row in all segments.
            tokens: real tokens it has seen.
            new: how many of them the forward that just ended brought.
            segments: layers times heads.
        """
        if not self.evicts or new == 0:
            return False
        allowed = self.budget.per_head(tokens)
        prompt = tokens == new
        return stored > (allowed if prompt else allowed + self.buffer) * segments
