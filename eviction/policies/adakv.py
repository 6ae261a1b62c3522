"""AdaKV: the heads of a layer compete for its budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's scores; heads compete within a layer, with a fifth of the budget guaranteed to each.

    Source: "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference" (Feng et
    al., 2024), algorithm 1; the guarantee (`alpha_safeguard`) as in kvpress.
    """

    name: ClassVar[str] = "adakv"
    default_scope: ClassVar[str] = "layer"
    default_floor: ClassVar[float] = 0.2
