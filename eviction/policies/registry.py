"""Policies by name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from .ada_criticalkv import AdaCriticalKV
from .adakv import AdaKV
from .base import Policy
from .criticalkv import CriticalKV
from .defensive import Defensive, LayerDefensive
from .expected_attention import ExpectedAttention
from .full import Full
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import Knorm
from .lagkv import LagKV
from .pyramidkv import PyramidKV
from .random import Random
from .retention import Retention
from .retention_defensive import RetentionDefensive
from .snapkv import SnapKV
from .streaming import StreamingLLM
from .tova import TOVA

_CLASSES: tuple[type[Policy], ...] = (
    AdaCriticalKV,
    AdaKV,
    CriticalKV,
    Defensive,
    ExpectedAttention,
    Full,
    H2O,
    KeyDiff,
    Knorm,
    LagKV,
    LayerDefensive,
    PyramidKV,
    Random,
    Retention,
    RetentionDefensive,
    SnapKV,
    StreamingLLM,
    TOVA,
)


def policy_names() -> tuple[str, ...]:
    """The names `get_policy` knows."""
    return tuple(sorted(policy.name for policy in _CLASSES))


def get_policy(policy: str | Policy, **options: Any) -> Policy:
    """The policy of that name, or an instance, with these options and for the rest its own.

    Raises:
        ValueError: no such policy, or no such option of it; the message lists those known.
    """
    chosen = policy if isinstance(policy, Policy) else _by_name(policy)
    known = [field.name for field in fields(chosen)]  # type: ignore[arg-type]  # policies are dataclasses
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(
            f"policy {chosen.name!r} has no option {', '.join(unknown)}; known: {', '.join(known) or 'none'}"
        )
    return replace(chosen, **options) if options else chosen  # type: ignore[type-var]


def _by_name(name: str) -> Policy:
    for known in _CLASSES:
        if name == known.name:
            return known()
    raise ValueError(f"unknown policy {name!r}; known: {', '.join(policy_names())}, or an instance of Policy")
