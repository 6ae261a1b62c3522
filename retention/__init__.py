"""Retention gates, gated attention and the seams to a transformers model."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.retention', not {__name__!r}: a second name would give duplicate classes")

from .attach import Attached, Prompt, attach, attach_after, read_prompt
from .calibration import Calibration, TriedBudget
from .capacity import Capacity, capacity_loss
from .checkpoint import CheckpointError, CheckpointInfo, fingerprint
from .decoder_layers import UnsupportedModelError
from .gate_config import RetentionConfig
from .gates import RetentionGates
from .ops import gated_attention, occupancy
from .segments import Segments
from .soft_eviction import SoftEviction

__all__ = [
    "Attached", "Calibration", "Capacity", "CheckpointError", "CheckpointInfo", "Prompt", "RetentionConfig",
    "RetentionGates", "Segments", "SoftEviction", "TriedBudget", "UnsupportedModelError", "attach", "attach_after",
    "capacity_loss", "fingerprint", "gated_attention", "occupancy", "read_prompt",
]  # fmt: skip
