"""Eviction policies, one dataclass and one file each."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import tenure.eviction.policies, not {__name__!r}: a second name would give duplicate classes")

from .ada_criticalkv import AdaCriticalKV
from .adakv import AdaKV
from .cake import CAKE
from .criticalkv import CriticalKV
from .defensive import Defensive, LayerDefensive
from .expected_attention import ExpectedAttention
from .full import Full
from .gate_score import GateScore
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import Knorm
from .lagkv import LagKV
from .policy import Policy
from .pyramidkv import PyramidKV
from .random import Random
from .registry import get_policy, policy_names, policy_text, register
from .retention import Retention
from .retention_defensive import RetentionDefensive
from .rkv import RKV
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM
from .tova import TOVA

register(
    CAKE, H2O, RKV, TOVA, AdaCriticalKV, AdaKV, CriticalKV, Defensive, ExpectedAttention, Full, GateScore, KeyDiff,
    Knorm, LagKV, LayerDefensive, PyramidKV, Random, Retention, RetentionDefensive, SnapKV, StreamingLLM,
)  # fmt: skip

__all__ = [
    "CAKE", "H2O", "RKV", "TOVA", "AdaCriticalKV", "AdaKV", "CriticalKV", "Defensive", "ExpectedAttention", "Full",
    "GateScore",
    "KeyDiff", "Knorm", "LagKV", "LayerDefensive", "Policy", "PyramidKV", "Random", "Retention", "RetentionDefensive",
    "SnapKV", "StreamingLLM", "get_policy", "policy_names", "policy_text",
]  # fmt: skip
