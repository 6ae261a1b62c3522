"""Conversations about one context: many questions or turns on a cache that is kept (SCBench, LongMemEval, MMDU)."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.eval', not {__name__!r}: a second name would give duplicate classes")

from typing import TYPE_CHECKING, Any

from .conversation import Conversation, Turn, turn_score
from .generated import FAMILIES, ConversationBuilder
from .readers import FORMATS, read_conversations

if TYPE_CHECKING:
    from .runner import Protocol, TurnRecord, run_turns, turn_rows

__all__ = [
    "FAMILIES", "FORMATS", "Conversation", "ConversationBuilder", "Protocol", "Turn", "TurnRecord",
    "read_conversations", "run_turns", "turn_rows", "turn_score",
]  # fmt: skip

_OF_RUNNER = ("Protocol", "TurnRecord", "run_turns", "turn_rows")  # imported on first use, as it needs torch


def __getattr__(name: str) -> Any:
    if name not in _OF_RUNNER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import runner

    value = globals()[name] = getattr(runner, name)
    return value
