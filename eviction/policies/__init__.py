"""Eviction policies: one dataclass, one file each."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import tenure.eviction.policies, not {__name__!r}: a second name would give duplicate classes")

from .base import Policy
from .full import Full
from .keydiff import KeyDiff
from .knorm import Knorm
from .random import Random
from .registry import get_policy, policy_names
from .retention import Retention
from .snapkv import SnapKV
from .streaming import StreamingLLM

__all__ = [
    "Full",
    "KeyDiff",
    "Knorm",
    "Policy",
    "Random",
    "Retention",
    "SnapKV",
    "StreamingLLM",
    "get_policy",
    "policy_names",
]
