"""What clients say about what they will do next: one internal type, and a reader for each wire format."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving.hints', not {__name__!r}: a second name would give duplicate classes")

from .formats import HintReader, hint_formats, request_fields
from .hint import Action, ActionKind, Hint, HintStore, SessionAction

__all__ = ["Action", "ActionKind", "Hint", "HintReader", "HintStore", "SessionAction", "hint_formats", "request_fields"]
