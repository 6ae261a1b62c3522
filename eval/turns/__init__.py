"""Conversations about one context: many questions or turns on a cache that is kept (SCBench, LongMemEval, MMDU)."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from typing import TYPE_CHECKING

from tenure.lazy_names import lazy_names

from .conversation import Conversation, Turn, turn_score
from .generated import FAMILIES, ConversationBuilder
from .readers import FORMATS, read_conversations

if TYPE_CHECKING:
    from .runner import Protocol, TurnRecord, run_turns, turn_rows

__all__ = [
    "FAMILIES", "FORMATS", "Conversation", "ConversationBuilder", "Protocol", "Turn", "TurnRecord",
    "read_conversations", "run_turns", "turn_rows", "turn_score",
]  # fmt: skip

# Imported on first use, as it needs torch.
__getattr__ = lazy_names(__name__, {"runner": "Protocol TurnRecord run_turns turn_rows"})
