"""The eviction plan: budget, its allocation to layers and heads, protected tokens, and when eviction runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from itertools import accumulate
from numbers import Integral, Real
from typing import Annotated, Any, Literal

from tenure.checked import Range, read, verify
from tenure.documents import shown

from ..retention.calibration import Calibration, weights_digest
from ..retention.gates import RetentionGates
from .policies.policy import Policy, Protection
from .policies.registry import get_policy, policy_text
from .protected_tokens import ProtectedTokens
from .storage.segment_store import StorageConfig
from .token_floors import TokenFloor, token_floors

SCOPES = ("global", "layer", "head", "pyramid", "preference")
SCHEDULES = ("bounded", "filled", "once")
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
        window: tokens of the policy's observation window, for "pyramid" and "preference".

    Raises:
        ValueError: "preference", and layers with different numbers of heads.
    """
    average = total // layout.segments
    if scope == "preference":
        if len(set(layout.heads)) > 1:
            raise ValueError(
                f"scope 'preference' needs layers with the same number of key/value heads, got {layout.heads}: give "
                "another scope"
            )
        # Layers differ once `by_preference` has been asked; a head keeps its window in any case.
        return BudgetAllocation([average] * layout.segments, [min(average, window)] * len(layout.heads), average)
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


def by_preference(average: int, preferences: Sequence[float], tokens: int, window: int) -> list[int]:
    """Entries per head of each layer: the window, and the rest of the budget in proportion to the preferences.

    Source: CAKE (Qin et al., 2025), section 3, with the rounding of its released code: shares are rounded down, what a
    layer cannot hold is given to the others in equal parts, once, and so is the remainder. Where no head could hold the
    window, or no layer is preferred, all layers get the same.

    Args:
        average: entries per head on average over the layers.
        preferences: of the layers, not negative.
        tokens: tokens the row has seen.
        window: tokens of the observation window, which every layer keeps.
    """
    whole, most = sum(preferences), tokens - window
    total = (average - window) * len(preferences)
    if total < 0 or not 0 < whole < math.inf or average > tokens:
        return [average] * len(preferences)
    shares = [int(one / whole * total) for one in preferences]
    excess = sum(max(one - most, 0) for one in shares)
    shares = [min(one, most) for one in shares]
    _spread(shares, excess, most)
    _spread(shares, total - sum(shares), most)  # lost by rounding down
    return [window + min(one, most) for one in shares]


def _spread(shares: list[int], more: int, most: int) -> None:
    """Gives `more` in equal parts to the shares below `most`, one more to the first ones."""
    below = [index for index, one in enumerate(shares) if one < most]
    for place, index in enumerate(below):
        shares[index] += more // len(below) + (place < more % len(below))


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in integer shares proportional to `weights`, rounded so that they add up to it exactly.

    The cumulative sums of the shares are the rounded cumulative sums of the exact ones, so each error is below 1.
    """
    whole = sum(weights)
    ends = [int(total * part / whole + 0.5) for part in accumulate(weights)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_ROUNDING = 1e-6  # 0.29 * 100 is 28.999… in floats
_TEXT = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]+|%)\s*")
BUDGET_FORMS = (
    "give a float in (0, 1], the share of the tokens seen; an int >= 1, entries per head on average; or text: "
    "'20%', that share; '65536 entries', all entries of a row; or '512MiB' or '2GB' (B, KB, MB, GB, TB, KiB, MiB, GiB, "
    "TiB), its bytes"
)
MAX_ENTRIES = 2**62  # of a budget, and bytes: what int64 holds
Tokens = Annotated[int, Range(0, MAX_ENTRIES)]


@dataclass(frozen=True)
class Budget:
    """The number of entries that each row of a batch may keep.

    Attributes:
        amount: a float in (0, 1]: a share of the tokens that a row has seen; an int >= 1: entries per head, on average
            over layers and heads; text: a share as "20%", which becomes a float; a row's total over layers and heads,
            "65536 entries"; or the bytes allocated for them, "512MiB" (1024²) or "512MB" (1000²), in upper or lower
            case.

    Raises:
        ValueError: the amount is none of these.
    """

    amount: float | int | str

    def __post_init__(self) -> None:
        amount = self.amount
        if isinstance(amount, str):
            number, unit = self._parsed()
            if unit != "%":
                if not 1 <= number <= MAX_ENTRIES:
                    raise ValueError(f"budget {shown(amount)} is out of range: {BUDGET_FORMS}")
                return
            amount = float(number / 100)
        whole = isinstance(amount, Integral) and not isinstance(amount, bool) and 1 <= amount <= MAX_ENTRIES
        share = isinstance(amount, Real) and not isinstance(amount, Integral) and 0 < amount <= 1
        if not whole and not share:
            raise ValueError(f"budget {shown(self.amount)} is out of range: {BUDGET_FORMS}")
        object.__setattr__(self, "amount", int(amount) if whole else float(amount))  # NumPy's numbers too

    def _parsed(self) -> tuple[int | Decimal, str]:
        """(number, "entries", "bytes" or "%") of a text."""
        match = _TEXT.fullmatch(str(self.amount))
        number, unit = match.groups() if match else ("", "")
        if unit.lower() in ("entry", "entries") and number.isdigit():
            return int(number), "entries"
        if unit == "%":
            return Decimal(number), "%"
        if unit.upper() in _UNITS:
            return int(Decimal(number) * _UNITS[unit.upper()]), "bytes"
        if self.amount == CALIBRATED:
            raise ValueError(
                "budget 'calibrated' is looked up in the gates by evict() and cache.compress(); here its number is "
                "needed: gates.calibration.budget"
            )
        raise ValueError(f"budget {shown(self.amount)} is not understood: {BUDGET_FORMS}")

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
            return max(1, int(self.amount * tokens + _ROUNDING)) * layout.segments
        if isinstance(self.amount, int):
            return self.amount * layout.segments
        number, unit = self._parsed()
        entries = int(number)
        if unit == "bytes":
            entries = int((entries / layout.entry_bytes - layout.segments * layout.spare) / (1 + layout.slack))
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
class Rules:
    """Details in which released codes differ from each other; `Preset`s set them, and the defaults are ours.

    Attributes:
        rounding: the number that a budget given as a share is rounded down to a whole one of: the entries of a "head",
            or those of a "group" of heads that compete (the whole row in the scope "global", a layer in "layer").
        horizon: the time at which entries are scored between the chunks of a long input: the "end" of the input, or the
            tokens "seen" so far.
        floor: "lift": each head's best entries, a share `floor` of its budget, are kept before heads compete (AdaKV);
            "add": heads compete for the rest of the budget, and each keeps that number of entries more (DBTrimKV).

    Raises:
        ValueError: something else.
    """

    rounding: Literal["head", "group"] = "head"
    horizon: Literal["end", "seen"] = "end"
    floor: Literal["lift", "add"] = "lift"

    def __post_init__(self) -> None:
        verify(self)


@dataclass(frozen=True)
class EvictionPlan:
    """The options of `evict` that determine which entries a cache evicts and when.

    Attributes:
        policy: scores the entries.
        budget: number of entries to keep.
        scope: which entries compete: "head" gives every (layer, head) the same number, "pyramid" the heads of lower
            layers more than those of higher ones (see `pyramid`), "preference" those of preferred layers
            (`by_preference`), "layer" lets the heads of a layer compete, "global" all heads of all layers of a row.
            Rows never compete.
        sinks, recent: the first and last tokens of a row, always kept and counted in the budget. If they alone, with
            the tokens of `protect`, would exceed it, fewer recent tokens are protected, then fewer sinks. None is the
            policy's own number, `Policy.default_protection`, and at most its share of the budget.
        protection: numbers and a share in place of the policy's own.
        buffer: tokens that may be written above the budget before eviction runs again.
        floor: the share of the per-head budget, in [0, 1], that every head is guaranteed where heads compete: its best
            entries, at least one, are kept before heads compete for the rest. 0 guarantees nothing.
        prefill_chunk: longer inputs run in chunks of so many tokens with an eviction after each; None runs all at once.
        protect: tokens given by the user that are never evicted.
        schedule: when eviction runs: "bounded": at a prompt above the budget, and later above budget and buffer;
            "filled": whenever budget and buffer are reached, by a prompt too; "once": at a prompt, never later. With a
            budget of 1.0 and a policy that discards entries regardless of it, after every forward.
        rules: further details.
        token_floors: shares of the budget that the best entries of given tokens keep, see `TokenFloor`.

    Raises:
        ValueError: unknown scope or schedule, or a number out of its range.
    """

    policy: Policy
    budget: Budget
    scope: str
    sinks: Tokens | None = None
    recent: Tokens | None = None
    buffer: Tokens = 128
    floor: Annotated[float, Range(0, 1)] = 0.0
    prefill_chunk: Annotated[int, Range(1, MAX_ENTRIES)] | None = None
    protect: ProtectedTokens | None = None
    schedule: str = "bounded"
    rules: Rules = Rules()
    token_floors: tuple[TokenFloor, ...] = ()
    protection: Protection | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_floors", token_floors(self.token_floors))
        if self.scope not in SCOPES:
            raise ValueError(f"unknown scope {shown(self.scope)}; known: {', '.join(SCOPES)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {shown(self.schedule)}; known: {', '.join(SCHEDULES)}")
        verify(self)
        if self.scope == "preference" and not self.policy.prefers_layers:
            name = self.policy.name
            raise ValueError(f"scope 'preference' needs a policy with layer preferences (cake), got {name!r}")

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
        guard = None if self.protect is None else self.protect.for_rows(rows)
        return replace(self, protect=guard, token_floors=tuple(floor.for_rows(rows) for floor in self.token_floors))

    def check_rows(self, batch: int) -> None:
        """Raises ValueError if tokens to protect, or those of a floor, were given for another number of rows."""
        for tokens in (self.protect, *(floor.tokens for floor in self.token_floors)):
            if tokens is not None:
                tokens.check_rows(batch)

    @property
    def evicts(self) -> bool:
        return self.policy.evicts and (not self.budget.unlimited or self.policy.discards)

    def total(self, tokens: int, layout: BudgetLayout) -> int:
        """Entries that a row which has seen `tokens` tokens may store; ValueError as `Budget.total`."""
        if self.rules.rounding == "head" or not isinstance(self.budget.amount, float):
            return self.budget.total(tokens, layout)
        groups = {"global": [layout.segments], "layer": layout.heads}.get(self.scope, [1] * layout.segments)
        return max(layout.segments, sum(int(self.budget.amount * tokens * heads + _ROUNDING) for heads in groups))

    def allocate(self, tokens: int, layout: BudgetLayout) -> BudgetAllocation:
        """Allocates the budget of a row that has seen `tokens` tokens to its groups of competitors."""
        return allocate(self.scope, self.total(tokens, layout), tokens, layout, self.policy.window_size)

    def require_room(self, tokens: Sequence[int], layout: BudgetLayout) -> None:
        """Raises ValueError if `protect` exceeds the budget of a row that has seen `tokens[row]` tokens."""
        if self.protect is None:
            return
        self.protect.check_rows(len(tokens))
        for row, count in enumerate(tokens):
            if self.evicts and self.total(count, layout) < count * layout.segments:
                self.protected(row, count, min(self.allocate(count, layout).shares))

    def protected(self, row: int, tokens: int, share: int, later: bool = False) -> tuple[int, int]:
        """(sinks, recent) that are protected where a head may keep `share` of the row's `tokens` tokens.

        Args:
            later: the text has begun in an earlier input, see `Protection.later_share`.

        Raises:
            ValueError: the tokens of `protect` alone are more.
        """
        own = self.protection or self.policy.default_protection
        room = own.room(share, later)
        sinks = min(own.sinks, room) if self.sinks is None else self.sinks
        recent = min(own.recent, max(0, room - sinks)) if self.recent is None else self.recent
        floors = sum(int(share * floor.share) for floor in self.token_floors)
        if self.protect is not None:
            return self.protect.limits(row, tokens, share, sinks, recent, floors)
        share -= floors
        sinks = min(sinks, share)
        return sinks, min(recent, share - sinks)

    def due(self, stored: int, tokens: int, new: int, layout: BudgetLayout) -> bool:
        """Whether a row must evict now, by the schedule.

        Args:
            stored: entries of the row in all segments.
            tokens: real tokens it has seen; at a chunk of a longer input, those it will have seen after the last chunk.
            new: number of them that are in the input.
        """
        if not self.evicts or new == 0:
            return False
        prompt = tokens == new
        if self.schedule == "once" and not prompt:
            return False
        if self.budget.unlimited:
            return True  # the policy discards entries regardless of the budget
        above = stored - self.total(tokens, layout)
        room = self.buffer * layout.segments
        if self.schedule == "filled":
            return above >= max(1, room)
        return above > (0 if prompt else room)


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
    sinks: int | None
    recent: int | None
    buffer: int
    floor: float
    prefill_chunk: int | None
    protect: ProtectedTokens | None
    schedule: str = "bounded"
    rules: Rules = Rules()
    token_floors: tuple[TokenFloor, ...] = ()
    protection: Protection | None = None


def plan_to_json(plan: EvictionPlan) -> dict[str, Any]:
    """The plan as JSON values; ValueError if its policy has an option that is not a plain value."""
    plain = {each.name: getattr(plan, each.name) for each in fields(PlanDocument)}
    protect = None if plan.protect is None else vars(plan.protect)
    floors = [{"tokens": vars(floor.tokens), "share": floor.share} for floor in plan.token_floors]
    protection = None if plan.protection is None else vars(plan.protection)
    nested = {"protect": protect, "rules": vars(plan.rules), "token_floors": floors, "protection": protection}
    first = {"policy": _policy_to_json(plan.policy), "budget": plan.budget.amount, **nested}
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
    return (
        calibrated(plan, gates)
        if isinstance(budget, str) and budget == CALIBRATED
        else replace(plan, budget=Budget(budget))
    )


def calibrated(plan: EvictionPlan, gates: RetentionGates | None) -> EvictionPlan:
    """A copy with the budget that `tenure calibrate` stored with the gates.

    Sinks and recent tokens without numbers of their own are those of the calibration.

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
    sinks = found.sinks if plan.sinks is None else plan.sinks
    plan = replace(plan, sinks=sinks, recent=found.recent if plan.recent is None else plan.recent)
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
    differing += [option for option in ("prefill_chunk", "protect") if getattr(plan, option) is not None]
    differing += ["token_floors"] if plan.token_floors else []
    differing += [] if plan.protection is None else [f"{plan.protection}"]
    return differing + ([f"rules {plan.rules}"] if plan.rules != Rules() else [])
