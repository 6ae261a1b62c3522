"""How many entries may stay, who competes for them, and when eviction runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from .allocate import SCOPES, Allocation, Layout, allocate
from .policies.base import Policy
from .protect import Protected
from .store import SLACK

CALIBRATED = "calibrated"
_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")
_ACCEPTED = (
    "give a float in (0, 1], the share of the tokens seen; an int >= 1, entries per head on average; or text: "
    "'65536 entries', all entries of a row, or '512MiB' or '2GB' (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), its bytes"
)


@dataclass(frozen=True)
class Budget:
    """The entries that may stay in each row of a batch.

    Attributes:
        amount: a float in (0, 1] is a share of the tokens a row has seen; an int >= 1 is entries per head, on average
            over layers and heads; text is a row's total over layers and heads: "65536 entries", or the bytes allocated
            for them, "512MiB" (1024²) or "512MB" (1000²), in upper or lower case.

    Raises:
        ValueError: the amount is none of these.
    """

    amount: float | int | str

    def __post_init__(self) -> None:
        amount = self.amount
        if isinstance(amount, str):
            if self._parsed()[0] < 1:
                raise ValueError(f"budget {amount!r} is out of range: {_ACCEPTED}")
            return
        whole = isinstance(amount, Integral) and not isinstance(amount, bool) and amount >= 1
        share = isinstance(amount, Real) and not isinstance(amount, Integral) and 0 < amount <= 1
        if not whole and not share:
            raise ValueError(f"budget {amount!r} is out of range: {_ACCEPTED}")
        object.__setattr__(self, "amount", int(amount) if whole else float(amount))  # NumPy's numbers are accepted

    def _parsed(self) -> tuple[int, str]:
        """(number, "entries" or "bytes") of a text."""
        match = _TEXT.fullmatch(str(self.amount))
        number, unit = match.groups() if match else ("", "")
        if unit.lower() in ("entry", "entries") and number.isdigit():
            return int(number), "entries"
        if unit.upper() in _UNITS:
            return int(Decimal(number) * _UNITS[unit.upper()]), "bytes"
        if self.amount == CALIBRATED:
            raise ValueError(
                "budget 'calibrated' is looked up in the gates by evict() and cache.compress(); here its number is "
                "needed: gates.calibration.budget"
            )
        raise ValueError(f"budget {self.amount!r} is not understood: {_ACCEPTED}")

    @property
    def unlimited(self) -> bool:
        """Nothing is ever evicted."""
        return isinstance(self.amount, float) and self.amount == 1

    @property
    def in_bytes(self) -> bool:
        return isinstance(self.amount, str) and self._parsed()[1] == "bytes"

    def total(self, tokens: int, layout: Layout) -> int:
        """Entries that a row which has seen `tokens` tokens may store in all its layers and heads.

        A float counts whole entries per head, at least 1. Bytes are divided by the bytes of an entry (key, value,
        position and per-entry state) after the free room that the storage adds is set aside: at most `SLACK` of the
        entries, and one entry a segment (where they are in pages, two pages).

        Raises:
            ValueError: less than one entry per head.
        """
        if isinstance(self.amount, float):
            return max(1, int(self.amount * tokens + 1e-6)) * layout.segments  # 0.29 * 100 is 28.999… in floats
        if isinstance(self.amount, int):
            return self.amount * layout.segments
        number, unit = self._parsed()
        entries = number
        if unit == "bytes":
            entries = int((number / layout.entry_bytes - layout.segments * layout.spare) / (1 + SLACK))
        if entries < layout.segments:
            least = f"{layout.segments} entries"
            if unit == "bytes":
                least = f"{int((1 + layout.spare + SLACK) * layout.segments * layout.entry_bytes) + 1}B"
            raise ValueError(
                f"budget {self.amount!r} is less than one entry for each of a row's {layout.segments} heads in "
                f"{len(layout.heads)} layers; the least is '{least}'"
            )
        return entries


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a cache evicts and when.

    Attributes:
        policy: scores the entries.
        budget: how many stay.
        scope: who competes: "head" gives every (layer, head) the same number, "pyramid" the heads of lower layers more
            than those of higher ones (see `allocate.pyramid`), "layer" lets the heads of a layer compete, "global" all
            heads of all layers of a row. Rows never compete.
        sinks, recent: the first and last tokens of a row, always kept and counted in the budget. If they alone, with
            the tokens of `protect`, would exceed it, fewer recent tokens are protected, then fewer sinks.
        buffer: tokens that may be written above the budget before eviction runs again.
        floor: the share of the per-head budget, in [0, 1], that every head is guaranteed where heads compete: its best
            entries, at least one, stay before the rest is competed for. 0 guarantees nothing.
        prefill_chunk: longer inputs run in chunks of so many tokens with eviction after each; None runs all at once.
        protect: tokens given by the user that are never evicted.

    Raises:
        ValueError: unknown scope or a number out of its range.
    """

    policy: Policy
    budget: Budget
    scope: str
    sinks: int = 4
    recent: int = 32
    buffer: int = 128
    floor: float = 0.0
    prefill_chunk: int | None = None
    protect: Protected | None = None

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"unknown scope {self.scope!r}; known: {', '.join(SCOPES)}")
        for name in ("sinks", "recent", "buffer"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a share of the per-head budget in [0, 1], got {self.floor}")
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1 token, or None, got {self.prefill_chunk}")

    def changed(self, policy: Policy | None, budget: float | int | str | None, **options: Any) -> Plan:
        """The plan with what is not None replaced.

        A new policy brings its default scope and floor unless they are given.
        """
        if policy is not None:
            defaults = {"scope": policy.default_scope, "floor": policy.default_floor}
            options |= {name: value for name, value in defaults.items() if options.get(name) is None}
        new = {"policy": policy, "budget": None if budget is None else Budget(budget), **options}
        return replace(self, **{name: value for name, value in new.items() if value is not None})

    def for_rows(self, rows: Sequence[int]) -> Plan:
        """The plan of a cache whose row `i` was row `rows[i]`."""
        return self if self.protect is None else replace(self, protect=self.protect.for_rows(rows))

    @property
    def evicts(self) -> bool:
        return self.policy.evicts and not self.budget.unlimited

    def allocate(self, tokens: int, layout: Layout) -> Allocation:
        """Shares the budget of a row that has seen `tokens` tokens out to its groups of competitors."""
        total = self.budget.total(tokens, layout)
        return allocate(self.scope, total, tokens, layout, self.policy.window_size)

    def require_room(self, tokens: Sequence[int], layout: Layout) -> None:
        """Raises ValueError if `protect` has more than the budget of a row that has seen `tokens[row]` tokens."""
        if self.protect is None:
            return
        self.protect.check_rows(len(tokens))
        for row, count in enumerate(tokens):
            if self.evicts and self.budget.total(count, layout) < count * layout.segments:
                self.protected(row, count, min(self.allocate(count, layout).shares))

    def protected(self, row: int, tokens: int, share: int) -> tuple[int, int]:
        """(sinks, recent) that are really protected where a head may keep `share` of the row's `tokens` tokens.

        Raises:
            ValueError: the tokens of `protect` alone are more.
        """
        if self.protect is not None:
            return self.protect.limits(row, tokens, share, self.sinks, self.recent)
        sinks = min(self.sinks, share)
        return sinks, min(self.recent, share - sinks)

    def due(self, stored: int, tokens: int, new: int, layout: Layout) -> bool:
        """Whether a row must evict now.

        Args:
            stored: entries of the row in all segments.
            tokens: real tokens it has seen; at a chunk of a longer input, those it will have seen after the last chunk.
            new: how many of them the input brings.
        """
        if not self.evicts or new == 0:
            return False
        prompt = tokens == new
        return stored > self.budget.total(tokens, layout) + (0 if prompt else self.buffer * layout.segments)
