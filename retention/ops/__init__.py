"""Gated attention and occupancy: fast forms, each with a plain twin in `naive`."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.retention.ops', not {__name__!r}: a second name would give duplicate classes")

from .after_prompt import biased_attention, gated_attention_after
from .gated_attention import Implementation, gated_attention
from .occupancy import occupancy, occupancy_at

__all__ = [
    "Implementation", "biased_attention", "gated_attention", "gated_attention_after", "occupancy", "occupancy_at",
]  # fmt: skip
