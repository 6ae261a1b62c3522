"""KV-cache eviction at inference: policies, budgets, the ragged cache and the session of an `evict` block."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eviction', not {__name__!r}: a second name would give duplicate classes")

from .api import evict
from .cache import RaggedCache
from .cache_report import Report
from .layer_view import LayerView
from .modalities import ModalityKept, kept_by_modality, modality_ranges
from .plan import Budget
from .policies import (
    CAKE,
    H2O,
    RKV,
    TOVA,
    AdaCriticalKV,
    AdaKV,
    CriticalKV,
    Defensive,
    ExpectedAttention,
    Full,
    GateScore,
    KeyDiff,
    Knorm,
    LagKV,
    LayerDefensive,
    Policy,
    PyramidKV,
    Random,
    Retention,
    RetentionDefensive,
    SnapKV,
    StreamingLLM,
    get_policy,
    policy_names,
    policy_text,
)
from .serialization import CacheFileError
from .session import Session
from .token_floors import TokenFloor

__all__ = [
    "CAKE", "H2O", "RKV", "TOVA", "AdaCriticalKV", "AdaKV", "Budget", "CacheFileError", "CriticalKV", "Defensive",
    "ExpectedAttention", "Full", "GateScore", "KeyDiff", "Knorm", "LagKV", "LayerDefensive", "LayerView",
    "ModalityKept", "Policy", "PyramidKV", "RaggedCache", "Random", "Report", "Retention", "RetentionDefensive",
    "Session", "SnapKV", "StreamingLLM", "TokenFloor", "evict", "get_policy", "kept_by_modality", "modality_ranges",
    "policy_names", "policy_text",
]  # fmt: skip
