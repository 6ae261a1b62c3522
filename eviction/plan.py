"""The eviction plan: budget, its allocation to layers and heads, protected tokens, and when eviction runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from itertools import accumulate
from numbers import Integral, Real
from typing import Any

import torch

from tenure.checked import read

from ..retention.calibration import Calibration, weights_digest
from ..retention.gates import RetentionGates
from .policies.policy import Policy
from .policies.registry import get_policy, policy_text
from .storage.segment_store import StorageConfig

SCOPES = ("global", "layer", "head", "pyramid")
PYRAMID_BETA = 20  # β of PyramidKV, section 4
CALIBRATED = "calibrated"  # the budget that `tenure calibrate` stored with the gates


@dataclass(frozen=True)
class BudgetLayout:
    """The heads that a row's budget is shared among, and the bytes of their entries.

    Attributes:
        heads: key/value heads of each layer that evicts.
        entry_bytes: bytes of one entry: key, value, position and per-entry state; the maximum over layers.
        spare: entries per segment that the storage may allocate in addition to the slack.
        slack: free slots that the storage may allocate, as a share of the entries.
    """

    heads: tuple[int, ...]
    entry_bytes: int
    spare: int = 1
    slack: float = StorageConfig.slack

    @property
    def segments(self) -> int:
        """Heads in all layers."""
        return sum(self.heads)


@dataclass(frozen=True)
class BudgetAllocation:
    """The number of entries of one row that each group of competitors keeps.

    Attributes:
        groups: one number per group: the row (scope "global"), its layers ("layer"), or its heads layer by layer.
        shares: for each layer, the entries that each of its heads is certain to have; tokens that must be kept in all
            heads have to fit in it.
        average: entries per head, rounded down.
    """

    groups: list[int]
    shares: list[int]
    average: int


def allocate(scope: str, total: int, tokens: int, layout: BudgetLayout, window: int = 0) -> BudgetAllocation:
    """Allocates `total` entries to groups; the groups' numbers add up to it exactly.

    Args:
        scope: one of `SCOPES`.
        tokens: tokens the row has seen.
        window: tokens of the policy's observation window, for "pyramid".
    """
    average = total // layout.segments
    if scope == "global":
        return BudgetAllocation([total], [average] * len(layout.heads), average)
    if scope == "layer":
        groups = apportion(total, layout.heads)
        return BudgetAllocation(groups, [k // h for k, h in zip(groups, layout.heads, strict=True)], average)
    weights = [1.0] * len(layout.heads)
    if scope == "pyramid":
        weights = pyramid(total / layout.segments, tokens, len(layout.heads), window)
    per_layer = apportion(total, [w * h for w, h in zip(weights, layout.heads, strict=True)])
    per_head = [apportion(k, [1] * heads) for k, heads in zip(per_layer, layout.heads, strict=True)]
    return BudgetAllocation([k for layer in per_head for k in layer], [min(layer) for layer in per_head], average)


def pyramid(average: float, tokens: int, layers: int, window: int = 0) -> list[float]:
    """Entries per head of each layer, falling linearly from the bottom layer to the top one; `average` on average.

    Source: PyramidKV (Cai et al., 2024), with β = 20, as computed by kvpress's `PyramidKVPress.get_layer_budget`: the
    top layer gets average/β; where the bottom one would then exceed `tokens - window` it gets that, and the top one the
    rest. Where the top layer could not hold the window, or any entry, all layers get the same.

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
    """`total` in integer shares proportional to `weights`, rounded so that they add up to it exactly.

    The cumulative sums of the shares are the rounded cumulative sums of the exact ones, so each error is below 1.
    """
    whole = sum(weights)
    ends = [int(total * part / whole + 0.5) for part in accumulate(weights)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


TokenRanges = tuple[tuple[int, int], ...]
PROTECT_FORMS = "give token ranges [(start, stop), …] or a bool mask (tokens,) or (batch, tokens)"


@dataclass(frozen=True)
class ProtectedTokens:
    """Tokens that are never evicted (a system prompt, a tool's description): ranges of positions in each row.

    Padding has no position. Ranges may exceed the tokens that a row has seen: they apply to later tokens, including
    generated ones.

    Attributes:
        rows: sorted, disjoint `(start, stop)` ranges for each row; a single element if `shared`.
        shared: the single element is for all rows.
    """

    rows: tuple[TokenRanges, ...]
    shared: bool = True

    @classmethod
    def of(cls, given: Any) -> ProtectedTokens:
        """From token ranges `[(start, stop), …]`, the same for all rows, or a bool mask `(tokens,)`, `(batch, tokens)`.

        Raises:
            ValueError: something else, a negative start, or a stop before its start.
        """
        if isinstance(given, ProtectedTokens):
            return given
        if isinstance(given, torch.Tensor):
            if given.dtype != torch.bool or given.ndim not in (1, 2):
                raise ValueError(f"protect is a {given.dtype} tensor of shape {tuple(given.shape)}; {PROTECT_FORMS}")
            rows = given.reshape(-1, given.shape[-1])
            return cls(tuple(_runs(row) for row in rows), shared=given.ndim == 1)
        return cls((_merged(given),))

    def for_rows(self, rows: Sequence[int]) -> ProtectedTokens:
        """A copy for a batch whose row `i` was row `rows[i]`."""
        return self if self.shared else ProtectedTokens(tuple(self.rows[row] for row in rows), shared=False)

    def check_rows(self, batch: int) -> None:
        """Raises ValueError if a mask was given for another number of rows."""
        if not self.shared and len(self.rows) != batch:
            raise ValueError(
                f"protect is a mask for {len(self.rows)} rows, the cache has {batch}; beams and return sequences are "
                "rows of their own"
            )

    def _ranges(self, row: int) -> TokenRanges:
        return self.rows[0 if self.shared else row]

    def count(self, row: int, tokens: int) -> int:
        """Number of protected tokens among the row's `tokens` tokens."""
        return sum(max(0, min(stop, tokens) - start) for start, stop in self._ranges(row))

    def table(self, tokens: Sequence[int], device: torch.device) -> torch.Tensor:
        """bool `(batch, max(tokens))`: True for the protected tokens of each row."""
        table = torch.zeros(len(tokens), max(tokens, default=0), dtype=torch.bool, device=device)
        for row in range(len(tokens)):
            for start, stop in self._ranges(row):
                table[row, start:stop] = True
        return table

    def limits(self, row: int, tokens: int, share: int, sinks: int, recent: int) -> tuple[int, int]:
        """(sinks, recent) that fit into a row's share together with its protected tokens.

        Args:
            tokens: tokens the row has seen.
            share: entries that each of its heads may keep.
            sinks, recent: requested numbers of first and last tokens. Sinks take precedence over recent tokens.

        Raises:
            ValueError: the protected tokens alone are more than `share`.
        """
        left = share - self.count(row, tokens)
        if left < 0:
            raise ValueError(
                f"{share - left} of the {tokens} tokens of row {row} are protected, the budget leaves each head "
                f"{share}: raise the budget or protect fewer tokens"
            )
        inside = {position for start, stop in self._ranges(row) for position in range(start, min(stop, sinks))}
        first = _fitting(range(min(sinks, tokens)), inside, left)
        left -= sum(position not in inside for position in range(first))
        newest = range(max(first, tokens - recent), tokens)
        inside = {p for a, b in self._ranges(row) for p in range(max(a, newest.start), min(b, newest.stop))}
        return first, _fitting(reversed(newest), inside, left)


def _fitting(positions: Iterable[int], inside: set[int], left: int) -> int:
    """Number of `positions`, in order, that fit into `left` entries; those `inside` are counted already."""
    count = 0
    for position in positions:
        left -= position not in inside
        if left < 0:
            break
        count += 1
    return count


def _merged(given: Any) -> TokenRanges:
    try:
        pairs = sorted((int(start), int(stop)) for start, stop in given)
    except (TypeError, ValueError):
        raise ValueError(f"protect is {given!r}; {PROTECT_FORMS}") from None
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


def _runs(mask: torch.Tensor) -> TokenRanges:
    """The runs of True in a bool `(tokens,)`."""
    edge = mask.new_zeros(1)
    change = torch.cat([edge, mask, edge]).diff().nonzero().squeeze(1).tolist()
    return tuple(zip(change[::2], change[1::2], strict=True))


_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")
BUDGET_FORMS = (
    "give a float in (0, 1], the share of the tokens seen; an int >= 1, entries per head on average; or text: "
    "'65536 entries', all entries of a row, or '512MiB' or '2GB' (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), its bytes"
)


@dataclass(frozen=True)
class Budget:
    """The number of entries that each row of a batch may keep.

    Attributes:
        amount: a float in (0, 1]: a share of the tokens that a row has seen; an int >= 1: entries per head, on average
            over layers and heads; text: a row's total over layers and heads, "65536 entries", or the bytes allocated
            for them, "512MiB" (1024²) or "512MB" (1000²), in upper or lower case.

    Raises:
        ValueError: the amount is none of these.
    """

    amount: float | int | str

    def __post_init__(self) -> None:
        amount = self.amount
        if isinstance(amount, str):
            if self._parsed()[0] < 1:
                raise ValueError(f"budget {amount!r} is out of range: {BUDGET_FORMS}")
            return
        whole = isinstance(amount, Integral) and not isinstance(amount, bool) and amount >= 1
        share = isinstance(amount, Real) and not isinstance(amount, Integral) and 0 < amount <= 1
        if not whole and not share:
            raise ValueError(f"budget {amount!r} is out of range: {BUDGET_FORMS}")
        object.__setattr__(self, "amount", int(amount) if whole else float(amount))  # NumPy's numbers too

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
        raise ValueError(f"budget {self.amount!r} is not understood: {BUDGET_FORMS}")

    @property
    def unlimited(self) -> bool:
        """Nothing is ever evicted."""
        return isinstance(self.amount, float) and self.amount == 1

    @property
    def in_bytes(self) -> bool:
        return isinstance(self.amount, str) and self._parsed()[1] == "bytes"

    def total(self, tokens: int, layout: BudgetLayout) -> int:
        """Entries that a row which has seen `tokens` tokens may store in all its layers and heads.

        A float gives whole entries per head, at least 1. Bytes are divided by the bytes of an entry (key, value,
        position and per-entry state) after subtracting the free slots that the storage may allocate: `layout.slack` of
        the entries, and `layout.spare` entries per segment (one; two pages where entries are in pages).

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
            entries = int((number / layout.entry_bytes - layout.segments * layout.spare) / (1 + layout.slack))
        if entries < layout.segments:
            least = f"{layout.segments} entries"
            if unit == "bytes":
                least = f"{int((1 + layout.spare + layout.slack) * layout.segments * layout.entry_bytes) + 1}B"
            raise ValueError(
                f"budget {self.amount!r} is less than one entry for each of a row's {layout.segments} heads in "
                f"{len(layout.heads)} layers; the least is '{least}'"
            )
        return entries


@dataclass(frozen=True)
class EvictionPlan:
    """The options of `evict` that determine which entries a cache evicts and when.

    Attributes:
        policy: scores the entries.
        budget: number of entries to keep.
        scope: which entries compete: "head" gives every (layer, head) the same number, "pyramid" the heads of lower
            layers more than those of higher ones (see `pyramid`), "layer" lets the heads of a layer compete, "global"
            all heads of all layers of a row. Rows never compete.
        sinks, recent: the first and last tokens of a row, always kept and counted in the budget. If they alone, with
            the tokens of `protect`, would exceed it, fewer recent tokens are protected, then fewer sinks.
        buffer: tokens that may be written above the budget before eviction runs again.
        floor: the share of the per-head budget, in [0, 1], that every head is guaranteed where heads compete: its best
            entries, at least one, are kept before heads compete for the rest. 0 guarantees nothing.
        prefill_chunk: longer inputs run in chunks of so many tokens with an eviction after each; None runs all at once.
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
    protect: ProtectedTokens | None = None

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

    def changed(self, policy: Policy | None, budget: float | int | str | None, **options: Any) -> EvictionPlan:
        """A copy with the given options; None leaves an option as it is.

        A new policy implies its default scope and floor unless they are given.
        """
        if policy is not None:
            defaults = {"scope": policy.default_scope, "floor": policy.default_floor}
            options |= {name: value for name, value in defaults.items() if options.get(name) is None}
        new = {"policy": policy, "budget": None if budget is None else Budget(budget), **options}
        return replace(self, **{name: value for name, value in new.items() if value is not None})

    def for_rows(self, rows: Sequence[int]) -> EvictionPlan:
        """The plan of a cache whose row `i` was row `rows[i]`."""
        return self if self.protect is None else replace(self, protect=self.protect.for_rows(rows))

    @property
    def evicts(self) -> bool:
        return self.policy.evicts and not self.budget.unlimited

    def allocate(self, tokens: int, layout: BudgetLayout) -> BudgetAllocation:
        """Allocates the budget of a row that has seen `tokens` tokens to its groups of competitors."""
        total = self.budget.total(tokens, layout)
        return allocate(self.scope, total, tokens, layout, self.policy.window_size)

    def require_room(self, tokens: Sequence[int], layout: BudgetLayout) -> None:
        """Raises ValueError if `protect` exceeds the budget of a row that has seen `tokens[row]` tokens."""
        if self.protect is None:
            return
        self.protect.check_rows(len(tokens))
        for row, count in enumerate(tokens):
            if self.evicts and self.budget.total(count, layout) < count * layout.segments:
                self.protected(row, count, min(self.allocate(count, layout).shares))

    def protected(self, row: int, tokens: int, share: int) -> tuple[int, int]:
        """(sinks, recent) that are protected where a head may keep `share` of the row's `tokens` tokens.

        Raises:
            ValueError: the tokens of `protect` alone are more.
        """
        if self.protect is not None:
            return self.protect.limits(row, tokens, share, self.sinks, self.recent)
        sinks = min(self.sinks, share)
        return sinks, min(self.recent, share - sinks)

    def due(self, stored: int, tokens: int, new: int, layout: BudgetLayout) -> bool:
        """Whether a row must evict now: above budget after a prompt, above budget and buffer later.

        Args:
            stored: entries of the row in all segments.
            tokens: real tokens it has seen; at a chunk of a longer input, those it will have seen after the last chunk.
            new: number of them that are in the input.
        """
        if not self.evicts or new == 0:
            return False
        prompt = tokens == new
        return stored > self.budget.total(tokens, layout) + (0 if prompt else self.buffer * layout.segments)


_PLAIN = (bool, int, float, str, dict, list, tuple, type(None))


@dataclass(frozen=True)
class PolicyDocument:
    """A policy in JSON; an option may be one, too."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class PlanDocument:
    """An `EvictionPlan` in JSON."""

    policy: PolicyDocument
    budget: float | int | str
    scope: str
    sinks: int
    recent: int
    buffer: int
    floor: float
    prefill_chunk: int | None
    protect: ProtectedTokens | None


def plan_to_json(plan: EvictionPlan) -> dict[str, Any]:
    """The plan as JSON values; ValueError if its policy has an option that is not a plain value."""
    plain = {each.name: getattr(plan, each.name) for each in fields(PlanDocument)}
    protect = None if plan.protect is None else vars(plan.protect)
    first = {"policy": _policy_to_json(plan.policy), "budget": plan.budget.amount, "protect": protect}
    return first | {name: value for name, value in plain.items() if name not in first}


def plan_from_json(document: dict[str, Any], known: Iterable[Policy]) -> EvictionPlan:
    """The plan of a document made by `plan_to_json`.

    Args:
        known: policies whose classes are looked up by name in addition to those of the registry.

    Raises:
        ValueError, TypeError: unknown policy or option, or a value that is missing, of another type or out of range.
    """
    found = read(PlanDocument, document, "the plan")
    policy = _policy_from_json(found.policy, {type(one).name: type(one) for one in known})
    return EvictionPlan(**vars(found) | {"policy": policy, "budget": Budget(found.budget)})


def _policy_to_json(policy: Policy) -> dict[str, Any]:
    options = {field.name: getattr(policy, field.name) for field in fields(policy)}  # type: ignore[arg-type]
    plain = {name: _policy_to_json(value) if isinstance(value, Policy) else value for name, value in options.items()}
    other = [name for name, value in plain.items() if not isinstance(value, _PLAIN)]
    if other:
        raise ValueError(
            f"a cache under policy {policy.name!r} cannot be saved, its {', '.join(other)} is not a plain value; "
            'cache.compress("full", 1.0) first continues without it'
        )
    return {"name": policy.name, "options": plain}


def _policy_from_json(found: PolicyDocument, known: dict[str, type[Policy]]) -> Policy:
    kind = known.get(found.name) or type(get_policy(found.name))
    return kind(**{key: _option(value, known) for key, value in found.options.items()})


def _option(value: Any, known: dict[str, type[Policy]]) -> Any:
    if isinstance(value, Mapping):
        return _policy_from_json(read(PolicyDocument, value), known)
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples, a frozen policy has no lists


def with_budget(plan: EvictionPlan, budget: float | int | str | None, gates: RetentionGates | None) -> EvictionPlan:
    """A copy with that budget, looked up in the gates if it is "calibrated"; None leaves the plan's.

    Raises:
        ValueError: an invalid budget; for "calibrated": no gates, gates without a calibration or changed since, or a
            calibration for other options.
    """
    if budget is None:
        return plan
    return calibrated(plan, gates) if budget == CALIBRATED else replace(plan, budget=Budget(budget))


def calibrated(plan: EvictionPlan, gates: RetentionGates | None) -> EvictionPlan:
    """A copy with the budget that `tenure calibrate` stored with the gates.

    Raises:
        ValueError: no gates, gates without a calibration or changed since, or a calibration for other options.
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


def _differences(plan: EvictionPlan, found: Calibration) -> list[str]:
    """Options in which the plan differs from the calibration's measurements."""
    name = plan.policy.name
    same_kind = name == found.policy.partition("(")[0]
    pairs = {
        "policy": (policy_text(plan.policy) if same_kind else name, found.policy),
        "scope": (plan.scope, found.scope),
        "floor": (plan.floor, found.floor),
        "sinks": (plan.sinks, found.sinks),
        "recent": (plan.recent, found.recent),
    }
    differing = [f"{option} {now!r} (calibrated: {then!r})" for option, (now, then) in pairs.items() if now != then]
    return differing + [option for option in ("prefill_chunk", "protect") if getattr(plan, option) is not None]
