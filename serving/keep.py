"""What becomes of what a request has computed."""

from __future__ import annotations

from enum import Enum


class Keep(Enum):
    """Of a request's suffix and answer."""

    NEUTRAL = "neutral"  # stored, for whoever continues the conversation
    DISCARD = "discard"  # not stored
