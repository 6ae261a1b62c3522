"""Policies, budgets, the ragged cache and the runtime for generation."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eviction', not {__name__!r}: a second name would give duplicate classes")

from .budget import Budget
from .cache import RaggedCache
from .policies import (
    Full,
    KeyDiff,
    Knorm,
    Policy,
    Random,
    Retention,
    SnapKV,
    StreamingLLM,
    get_policy,
    policy_names,
)
from .report import Report
from .session import Session, evict
from .view import LayerView

__all__ = [
    "Budget",
    "Full",
    "KeyDiff",
    "Knorm",
    "LayerView",
    "Policy",
    "RaggedCache",
    "Random",
    "Report",
    "Retention",
    "Session",
    "SnapKV",
    "StreamingLLM",
    "evict",
    "get_policy",
    "policy_names",
]
