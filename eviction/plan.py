"""How a row's budget is shared out to those who compete for it.

Tokens that the user wants kept whatever the policy says: a system prompt, a tool's description.

How many entries may stay, who competes for them, and when eviction runs.

A plan as plain JSON values, and back.

`budget="calibrated"`: the budget that `tenure calibrate` stored with the gates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from itertools import accumulate
from numbers import Integral, Real
from typing import Any

import torch

from ..retention.calibration import Calibration, weights_digest
from ..retention.gates import RetentionGates
from .policies.base import Policy
from .policies.registry import get_policy, policy_text
from .storage.segments import SLACK

SCOPES = ("global", "layer", "head", "pyramid")
PYRAMID_BETA = 20


@dataclass(frozen=True)
class Layout:
    """What a row's budget is shared among.

    Attributes:
        heads: key/value heads of each layer that evicts.
        entry_bytes: bytes of one entry: key, value, position and per-entry state; of the layer where it is largest.
        spare: entries a segment that the storage may have room for beyond the slack.
    """

    heads: tuple[int, ...]
    entry_bytes: int
    spare: int = 1

    @property
    def segments(self) -> int:
        """Heads of all layers."""
        return sum(self.heads)


@dataclass(frozen=True)
class Allocation:
    """The entries of one row that each group of competitors keeps.

    Attributes:
        groups: one number a group: the row (scope "global"), its layers ("layer"), or its heads layer by layer.
        shares: for each layer, how many entries every one of its heads can be promised; tokens that must stay in all
            heads have to fit in it.
        average: entries per head, rounded down.
    """

    groups: list[int]
    shares: list[int]
    average: int


def allocate(scope: str, total: int, tokens: int, layout: Layout, window: int = 0) -> Allocation:
    """Shares `total` entries out; the groups' numbers add up to it exactly.

    Args:
        scope: one of `SCOPES`.
        tokens: tokens the row has seen.
        window: tokens of the policy's observation window, for "pyramid".
    """
    average = total // layout.segments
    if scope == "global":
        return Allocation([total], [average] * len(layout.heads), average)
    if scope == "layer":
        groups = apportion(total, layout.heads)
        return Allocation(groups, [k // h for k, h in zip(groups, layout.heads, strict=True)], average)
    weights = [1.0] * len(layout.heads)
    if scope == "pyramid":
        weights = pyramid(total / layout.segments, tokens, len(layout.heads), window)
    per_layer = apportion(total, [w * h for w, h in zip(weights, layout.heads, strict=True)])
    per_head = [apportion(k, [1] * heads) for k, heads in zip(per_layer, layout.heads, strict=True)]
    return Allocation([k for layer in per_head for k in layer], [min(layer) for layer in per_head], average)


def pyramid(average: float, tokens: int, layers: int, window: int = 0) -> list[float]:
    """Entries per head of each layer, falling linearly from the bottom layer to the top one; `average` on average.

    Source: PyramidKV (Cai et al., 2024), with β = 20, as computed by kvpress's `PyramidKVPress.get_layer_budget`: the
    top layer gets average/β, unless the bottom one would exceed `tokens - window`, which then is its share and the top
    one's grows. Where the top layer would not hold the window, or nothing, all layers get the same.

    Args:
        average: entries per head on average over the layers.
        tokens: tokens the row has seen.
        window: tokens of the observation window, which every layer keeps.
    """
    low = average / PYRAMID_BETA
    high = 2 * average - low
    if high >= tokens - window:
        high = float(tokens - window)
        low = 2 * average - high
    if layers == 1 or not tokens >= high >= low >= max(1, window):
        return [average] * layers
    return [high - (high - low) * layer / (layers - 1) for layer in range(layers)]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole shares proportional to `weights`, each rounded so that they add up to it exactly.

    The running sum of the shares is the running sum of the exact ones, rounded: no share is off by a whole entry.
    """
    whole = sum(weights)
    ends = [int(total * part / whole + 0.5) for part in accumulate(weights)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


Ranges = tuple[tuple[int, int], ...]
_ACCEPTED = "give token ranges [(start, stop), …] or a bool mask (tokens,) or (batch, tokens)"


@dataclass(frozen=True)
class Protected:
    """Ranges of positions among each row's real tokens; padding has no position.

    Positions beyond what a row has seen protect nothing yet: ranges may be given before the prompt is known, and cover
    generated tokens once they reach them.

    Attributes:
        rows: sorted, disjoint `(start, stop)` ranges for each row; a single element is meant for all rows.
        shared: the single element is for all rows.
    """

    rows: tuple[Ranges, ...]
    shared: bool = True

    @classmethod
    def of(cls, given: Any) -> Protected:
        """From token ranges `[(start, stop), …]`, the same for all rows, or a bool mask `(tokens,)`, `(batch, tokens)`.

        Raises:
            ValueError: something else, a negative start, or a stop before its start.
        """
        if isinstance(given, Protected):
            return given
        if isinstance(given, torch.Tensor):
            if given.dtype != torch.bool or given.ndim not in (1, 2):
                raise ValueError(f"protect is a {given.dtype} tensor of shape {tuple(given.shape)}; {_ACCEPTED}")
            rows = given.reshape(-1, given.shape[-1])
            return cls(tuple(_runs(row) for row in rows), shared=given.ndim == 1)
        return cls((_merged(given),))

    def for_rows(self, rows: Sequence[int]) -> Protected:
        """For a batch whose row `i` was row `rows[i]`."""
        return self if self.shared else Protected(tuple(self.rows[row] for row in rows), shared=False)

    def check_rows(self, batch: int) -> None:
        """Raises ValueError if a mask was given for another number of rows."""
        if not self.shared and len(self.rows) != batch:
            raise ValueError(
                f"protect is a mask for {len(self.rows)} rows, the cache has {batch}; beams and return sequences are "
                "rows of their own"
            )

    def _ranges(self, row: int) -> Ranges:
        return self.rows[0 if self.shared else row]

    def count(self, row: int, tokens: int) -> int:
        """How many of the row's `tokens` tokens are protected."""
        return sum(max(0, min(stop, tokens) - start) for start, stop in self._ranges(row))

    def table(self, tokens: Sequence[int], device: torch.device) -> torch.Tensor:
        """bool `(batch, max(tokens))`: which tokens of each row are protected."""
        table = torch.zeros(len(tokens), max(tokens, default=0), dtype=torch.bool, device=device)
        for row in range(len(tokens)):
            for start, stop in self._ranges(row):
                table[row, start:stop] = True
        return table

    def limits(self, row: int, tokens: int, share: int, sinks: int, recent: int) -> tuple[int, int]:
        """(sinks, recent) that fit beside the protected tokens of a row.

        Args:
            tokens: tokens the row has seen.
            share: how many entries each of its heads may keep.
            sinks, recent: how many first and last tokens are wanted. Sinks come first, recent ones take what is left.

        Raises:
            ValueError: the protected tokens alone are more than `share`.
        """
        left = share - self.count(row, tokens)
        if left < 0:
            raise ValueError(
                f"{share - left} of the {tokens} tokens of row {row} are protected, the budget leaves each head "
                f"{share}: raise the budget or protect fewer tokens"
            )
        inside = {place for start, stop in self._ranges(row) for place in range(start, min(stop, sinks))}
        first = _reach(range(min(sinks, tokens)), inside, left)
        left -= sum(place not in inside for place in range(first))
        newest = range(max(first, tokens - recent), tokens)
        inside = {p for a, b in self._ranges(row) for p in range(max(a, newest.start), min(b, newest.stop))}
        return first, _reach(reversed(newest), inside, left)


def _reach(places: Iterable[int], inside: set[int], left: int) -> int:
    """How many of `places`, in order, fit in `left` where those `inside` are counted already."""
    reached = 0
    for place in places:
        left -= place not in inside
        if left < 0:
            break
        reached += 1
    return reached


def _merged(given: Any) -> Ranges:
    try:
        pairs = sorted((int(start), int(stop)) for start, stop in given)
    except (TypeError, ValueError):
        raise ValueError(f"protect is {given!r}; {_ACCEPTED}") from None
    for start, stop in pairs:
        if start < 0 or stop < start:
            raise ValueError(f"protect has the range {(start, stop)}: 0 <= start <= stop is needed")
    merged: list[tuple[int, int]] = []
    for start, stop in pairs:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)


def _runs(mask: torch.Tensor) -> Ranges:
    """The runs of True in a bool `(tokens,)`."""
    edge = mask.new_zeros(1)
    change = torch.cat([edge, mask, edge]).diff().nonzero().squeeze(1).tolist()
    return tuple(zip(change[::2], change[1::2], strict=True))


CALIBRATED = "calibrated"
_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")
_ACCEPTED_BUDGET = (
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
                raise ValueError(f"budget {amount!r} is out of range: {_ACCEPTED_BUDGET}")
            return
        whole = isinstance(amount, Integral) and not isinstance(amount, bool) and amount >= 1
        share = isinstance(amount, Real) and not isinstance(amount, Integral) and 0 < amount <= 1
        if not whole and not share:
            raise ValueError(f"budget {amount!r} is out of range: {_ACCEPTED_BUDGET}")
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
        raise ValueError(f"budget {self.amount!r} is not understood: {_ACCEPTED_BUDGET}")

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


_PLAIN = (bool, int, float, str, dict, list, tuple, type(None))
NUMBERS = ("scope", "sinks", "recent", "buffer", "floor", "prefill_chunk")


def plan_to_json(plan: Plan) -> dict[str, Any]:
    guard = plan.protect
    return {
        "policy": _policy_to_json(plan.policy),
        "budget": plan.budget.amount,
        "protect": None if guard is None else {"rows": guard.rows, "shared": guard.shared},
        **{name: getattr(plan, name) for name in NUMBERS},
    }


def plan_from_json(document: dict[str, Any], known: Iterable[Policy]) -> Plan:
    """The plan of a document made by `plan_to_json`.

    Args:
        known: policies whose classes are used for their names, besides those of the registry.

    Raises:
        ValueError, KeyError, TypeError: unknown policy or option, or a value that is missing or out of range.
    """
    guard = document["protect"]
    if guard is not None:
        rows = tuple(tuple((int(start), int(stop)) for start, stop in ranges) for ranges in guard["rows"])
        guard = Protected(rows, bool(guard["shared"]))
    policy = _policy_from_json(document["policy"], {type(one).name: type(one) for one in known})
    numbers = {name: document[name] for name in NUMBERS}
    return Plan(policy, Budget(document["budget"]), protect=guard, **numbers)


def _policy_to_json(policy: Policy) -> dict[str, Any]:
    options = {field.name: getattr(policy, field.name) for field in fields(policy)}  # type: ignore[arg-type]
    plain = {name: _policy_to_json(value) if isinstance(value, Policy) else value for name, value in options.items()}
    other = [name for name, value in plain.items() if not isinstance(value, _PLAIN)]
    if other:
        raise ValueError(
            f"a cache under policy {policy.name!r} cannot be saved, its {', '.join(other)} is no plain value; "
            'cache.compress("full", 1.0) first goes on without it'
        )
    return {"name": policy.name, "options": plain}


def _policy_from_json(document: dict[str, Any], known: dict[str, type[Policy]]) -> Policy:
    name = document["name"]
    kind = known.get(name) or type(get_policy(name))
    return kind(**{key: _option(value, known) for key, value in document["options"].items()})


def _option(value: Any, known: dict[str, type[Policy]]) -> Any:
    if isinstance(value, dict):
        return _policy_from_json(value, known)
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples, a frozen policy has no lists


def with_budget(plan: Plan, budget: float | int | str | None, gates: RetentionGates | None) -> Plan:
    """The plan with that budget, looked up in the gates if it is "calibrated"; None leaves the plan's.

    Raises:
        ValueError: the budget is none of the accepted, or for "calibrated": no gates, gates without a calibration or
            changed since, or one made for another way of evicting.
    """
    if budget is None:
        return plan
    return calibrated(plan, gates) if budget == CALIBRATED else replace(plan, budget=Budget(budget))


def calibrated(plan: Plan, gates: RetentionGates | None) -> Plan:
    """The plan with the budget that `tenure calibrate` stored with the gates.

    Raises:
        ValueError: no gates, gates without a calibration or changed since, or one made for another way of evicting.
    """
    if gates is None:
        raise ValueError("budget 'calibrated' is stored with gates: give the gates, or a number as the budget")
    found = gates.calibration
    if found is None:
        raise ValueError(
            "budget 'calibrated' needs gates that were calibrated: run `tenure calibrate --gates FOLDER` first, or "
            "give a number as the budget"
        )
    differing = _differences(plan, found)
    if differing:
        raise ValueError(
            f"budget 'calibrated' promises nothing with {', '.join(differing)}: run `tenure calibrate` for that, or "
            f"give its number, {found.budget}, without the promise"
        )
    if found.weights != weights_digest(gates.state_dict()):
        raise ValueError("the gates have changed since they were calibrated; run `tenure calibrate` again")
    return replace(plan, budget=Budget(found.budget))


def _differences(plan: Plan, found: Calibration) -> list[str]:
    """What the plan does otherwise than the calibration's measurements did."""
    name = plan.policy.name
    same_kind = name == found.policy.partition("(")[0]
    pairs = {
        "policy": (policy_text(plan.policy) if same_kind else name, found.policy),
        "scope": (plan.scope, found.scope),
        "floor": (plan.floor, found.floor),
        "sinks": (plan.sinks, found.sinks),
        "recent": (plan.recent, found.recent),
    }
    differing = [f"{what} {now!r} (calibrated: {then!r})" for what, (now, then) in pairs.items() if now != then]
    return differing + [what for what in ("prefill_chunk", "protect") if getattr(plan, what) is not None]
