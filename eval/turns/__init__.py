"""Conversations about one context: many questions or turns on a cache that is kept (SCBench, LongMemEval, MMDU)."""

from .conversation import Conversation, Turn, turn_score
from .generated import FAMILIES, ConversationBuilder
from .readers import FORMATS, read_conversations
from .runner import Protocol, TurnRecord, run_turns, turn_rows

__all__ = [
    "FAMILIES", "FORMATS", "Conversation", "ConversationBuilder", "Protocol", "Turn", "TurnRecord",
    "read_conversations", "run_turns", "turn_rows", "turn_score",
]  # fmt: skip
