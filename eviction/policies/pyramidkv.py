"""PyramidKV: lower layers keep more entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's scores under budgets that fall linearly from the bottom layer to the top one.

    Source: "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling" (Cai et al., 2024),
    section 4.
    """

    name: ClassVar[str] = "pyramidkv"
    default_scope: ClassVar[str] = "pyramid"
