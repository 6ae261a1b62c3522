"""Presets: eviction as released codes do it, each under one name for `evict`, sweeps, lm-eval and the commands.

A preset fixes what its source fixes and leaves the rest; docs/reference/presets.md compares it with our defaults.
`make_plan` is where all plans are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from tenure.documents import shown

from .plan import CALIBRATED, Budget, EvictionPlan, Rules
from .policies.policy import Policy
from .policies.registry import get_policy, policy_text
from .protected_tokens import ProtectedTokens

DEFAULT_POLICY = "retention"
_NO_TOKENS = {"sinks": 0, "recent": 0}
_ONCE = {"schedule": "once", "prefill_chunk": None}
_KVPRESS_POLICIES = (
    "snapkv", "adakv", "criticalkv", "ada_criticalkv", "pyramidkv", "expected_attention", "keydiff", "knorm", "lagkv",
    "tova", "h2o", "streaming_llm", "random", "full",
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """The settings of a released code.

    Attributes:
        source: the code.
        policies: names of the policies that it has.
        default: the one that is taken if none is given; None: one has to be given.
        fixed: options of `EvictionPlan` that it fixes; "scope" None is the policy's default, as is "floor" None.
        rules: by policy, or under "" for the others.
        policy_options: options of policies that it fixes, for those policies that have them.
        free: options of policies that may differ from their defaults; None: all.
    """

    source: str
    policies: tuple[str, ...]
    default: str | None
    fixed: Mapping[str, Any]
    rules: Mapping[str, Rules] = field(default_factory=dict)
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    free: frozenset[str] | None = frozenset()


PRESETS: Mapping[str, Preset] = {
    "defensivekv": Preset(
        "FFY0/DefensiveKV",
        ("layer_defensive", "defensive", "snapkv", "adakv", "criticalkv", "ada_criticalkv", "full"),
        "layer_defensive",
        {**_NO_TOKENS, **_ONCE, "scope": None, "floor": None},
        {name: Rules(rounding="group") for name in ("layer_defensive", "defensive")},
        {"window": 32},
    ),
    "trimkv": Preset(
        "ngocbh/trimkv (rg)",
        ("retention", "full"),
        "retention",
        {**_NO_TOKENS, "scope": "head", "floor": 0.0, "schedule": "filled"},
        {"": Rules(horizon="seen")},
    ),
    "dbtrimkv": Preset(
        "ngocbh/trimkv (rg10)",
        ("retention", "full"),
        "retention",
        {**_NO_TOKENS, "scope": "global", "schedule": "filled"},
        {"": Rules(horizon="seen", floor="add")},
        free=frozenset({"lookahead", "threshold"}),
    ),
    "kvpress": Preset(
        "NVIDIA/kvpress",
        _KVPRESS_POLICIES,
        None,
        {**_NO_TOKENS, **_ONCE, "scope": None, "floor": None},
        policy_options={"recent": 0.0, "average": True},  # of h2o: its ObservedAttentionPress
        free=None,
    ),
}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"unknown preset {shown(name)}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def make_plan(
    policy: str | Policy | None = None, budget: float | int | str = 0.2, *, preset: str | None = None,
    scope: str | None = None, floor: float | None = None, protect: Any = None, **options: Any,
) -> EvictionPlan:  # fmt: skip
    """The plan of `evict`'s options; a calibrated budget is still to be looked up.

    Args:
        policy: None for the preset's, or retention.
        preset: one of `PRESETS`.
        options: further fields of `EvictionPlan`; None for the default.

    Raises:
        ValueError: an unknown name, a value out of range, or a value other than the one that the preset fixes.
    """
    given = {"scope": scope, "floor": floor, **options}
    given = {name: value for name, value in given.items() if value is not None}
    rules = Rules()
    if preset is None:
        chosen = get_policy(DEFAULT_POLICY if policy is None else policy)
    else:
        found = get_preset(preset)
        chosen = preset_policy(preset, policy)
        fixed = {name: value for name, value in found.fixed.items() if value is not None or name == "prefill_chunk"}
        defaults = {"scope": chosen.default_scope, "floor": chosen.default_floor}
        fixed |= {name: defaults[name] for name in defaults if name in found.fixed and name not in fixed}
        for name, value in fixed.items():
            if name in given and given[name] != value:
                raise ValueError(
                    f"preset {preset!r} has {name}={value!r}, got {given[name]!r}: leave out {name}, or the preset"
                )
        given |= fixed
        _check_threshold(preset, chosen, budget, given.get("floor", 0.0))
        rules = found.rules.get(chosen.name, found.rules.get("", rules))
    return EvictionPlan(
        chosen,
        Budget(1.0 if isinstance(budget, str) and budget == CALIBRATED else budget),
        given.pop("scope", chosen.default_scope),
        floor=given.pop("floor", chosen.default_floor),
        protect=None if protect is None else ProtectedTokens.of(protect),
        rules=rules,
        **given,
    )


def preset_policy(preset: str, policy: str | Policy | None) -> Policy:
    """The policy as the preset has it.

    Raises:
        ValueError: no policy where one is needed, one that the source does not have, or an option that it fixes.
    """
    found = get_preset(preset)
    if policy is None and found.default is None:
        raise ValueError(f"preset {preset!r} needs a policy; accepted: {', '.join(found.policies)}")
    chosen = get_policy(found.default if policy is None else policy)  # type: ignore[arg-type]
    if chosen.name not in found.policies:
        raise ValueError(
            f"preset {preset!r} has no policy {policy_text(chosen)!r}; accepted: {', '.join(found.policies)}"
        )
    wanted = dict(found.policy_options)
    if preset == "dbtrimkv" and getattr(chosen, "lookahead", 1) > 1:
        wanted["age"] = 2
    changes = {}
    for option in fields(chosen):  # type: ignore[arg-type]  # policies are dataclasses
        default = option.default if option.default is not MISSING else None
        value, fixed = getattr(chosen, option.name), wanted.get(option.name, default)
        if found.free is not None and option.name not in found.free and value not in (default, fixed):
            raise ValueError(
                f"preset {preset!r} has {option.name}={fixed!r} in policy {chosen.name!r}, got {value!r}: leave out "
                f"{option.name}, or the preset"
            )
        if option.name in wanted and value == default:
            changes[option.name] = fixed
    return replace(chosen, **changes) if changes else chosen  # type: ignore[type-var]


def _check_threshold(preset: str, policy: Policy, budget: float | int | str, floor: float) -> None:
    """DBTrimKV's strategies of thresholds know neither a budget nor a floor."""
    if getattr(policy, "threshold", None) is None:
        return
    if budget != 1.0:
        raise ValueError(f"preset {preset!r} with a threshold has no budget: give budget=1.0, got {budget!r}")
    if floor:
        raise ValueError(f"preset {preset!r} with a threshold has no floor, got {floor!r}")
