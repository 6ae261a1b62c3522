"""Budgets of a prefetcher, and what it has done with them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PrefetchLimits:
    """Budgets of a `Prefetcher`.

    Attributes:
        look_ahead_steps: agents that may be called within so many steps are wanted (KVFlow's code: 2). What is brought
            earlier displaces what is called hardly later, and has to be brought back.
        look_ahead_s, least_reuse: where calls are expected by time, only those within so many seconds, and with so much
            expected discounted reuse, 0 to 1: by default that of a call which is certain to come in three mean steps.
        copies: prompts that are on their way at once.
        share: of the device's bytes, that those may take.
        seconds: of a link's time, that those may take.
    """

    look_ahead_steps: float = 2.0
    look_ahead_s: float = 30.0
    least_reuse: float = math.exp(-7.5)
    copies: int = 4
    share: float = 0.5
    seconds: float = 5.0

    def __post_init__(self) -> None:
        for name in ("look_ahead_steps", "look_ahead_s", "least_reuse", "copies", "share", "seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"got {name}={getattr(self, name)}; accepted: a finite number above 0")
        if self.least_reuse > 1:
            raise ValueError(f"got least_reuse={self.least_reuse}; accepted: above 0 and up to 1")


@dataclass
class PrefetchStatistics:
    """Counts since the prefetcher was made.

    Attributes:
        begun: prompts whose copies were begun; each then has `arrived`, is `cancelled` because the plan changed,
            `displaced` by a demand for the room, or `failed`.
        used: those that arrived and were there when their agent was called.
        too_late: not begun, as computing would have been sooner. no_room: nothing that ranks below could go.
            over_budget: not begun, as it alone is more than the budget.
        bytes: of the prompts that were begun.
    """

    begun: int = 0
    arrived: int = 0
    cancelled: int = 0
    displaced: int = 0
    failed: int = 0
    used: int = 0
    too_late: int = 0
    no_room: int = 0
    over_budget: int = 0
    bytes: int = 0

    @property
    def unused_bytes(self) -> float:
        """Of prompts that arrived and were not there when their agents were called, at the mean size of a prompt."""
        return self.bytes * max(0, self.arrived - self.used) / self.begun if self.begun else 0.0
