"""Policies by name."""

from __future__ import annotations

from .base import Policy
from .full import Full
from .keydiff import KeyDiff
from .knorm import Knorm
from .random import Random
from .retention import Retention
from .snapkv import SnapKV
from .streaming import StreamingLLM

_CLASSES = (Retention, SnapKV, KeyDiff, Knorm, StreamingLLM, Random, Full)


def policy_names() -> tuple[str, ...]:
    """The names `get_policy` knows."""
    return tuple(sorted(policy.name for policy in _CLASSES))


def get_policy(policy: str | Policy) -> Policy:
    """The policy of that name with its default options; an instance is returned as it is.

    Raises:
        ValueError: no such policy; the message lists those known.
    """
    if isinstance(policy, Policy):
        return policy
    for known in _CLASSES:
        if policy == known.name:
            return known()
    raise ValueError(f"unknown policy {policy!r}; known: {', '.join(policy_names())}, or an instance of Policy")
