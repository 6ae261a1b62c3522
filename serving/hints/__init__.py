"""Hints of clients about their next calls: one internal type, and a reader for each wire format."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving.hints', not {__name__!r}: a second name would give duplicate classes")

from .formats import HintReader, hint_formats, request_fields
from .hint import ActionKind, Hint, HintAction, HintConfig, HintStore, SessionAction

__all__ = [
    "ActionKind", "Hint", "HintAction", "HintConfig", "HintReader", "HintStore", "SessionAction", "hint_formats",
    "request_fields",
]  # fmt: skip
