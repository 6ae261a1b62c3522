"""One door for the hints of all formats."""

from __future__ import annotations

import warnings
from typing import Any

from .formats import FORMATS, Sender
from .hint import Hint, session_agent

MAX_WARNED = 1000  # names of unknown fields that are remembered; beyond, nothing is warned about


def hint_formats() -> tuple[str, ...]:
    """The formats that `HintReader.read` knows."""
    return tuple(sorted(FORMATS))


class HintReader:
    """Reads documents into hints and warns once about each unknown field; a server has one reader."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def read(
        self, source: str, document: Any, client: str = "", agent: str | None = None, session: str | None = None
    ) -> Hint:
        """A client's document as a hint.

        Args:
            source: its format, of `hint_formats()`.
            document: the parsed JSON.
            client, agent, session: of the request it came with, as the server knows them; what the document says
                about agent and session goes before.

        Raises:
            ValueError: no such format, or a known field of a wrong type or size.
        """
        if source not in FORMATS:
            raise ValueError(f"unknown hint format {source!r:.60}; known: {', '.join(hint_formats())}")
        unknown: set[str] = set()
        hint = FORMATS[source](document, Sender(client, agent, session), unknown)
        fresh = sorted(unknown - self._warned)[: MAX_WARNED - len(self._warned)]
        if fresh:
            self._warned.update(fresh)
            shown = ", ".join(fresh[:10])
            warnings.warn(f"unknown fields of hints are left out: {shown}", stacklevel=2)
        return hint


def request_fields(hint: Hint) -> dict[str, Any]:
    """The fields of a `Request` that the hint which came with it decides; those it says nothing of are not in it."""
    agent = hint.agent
    if agent is None and hint.session is not None and (hint.actions or hint.fixed_tokens):
        agent = session_agent(hint.session)
    found = {
        "workflow": hint.workflow,
        "agent": agent,
        "session": hint.session,
        "client": hint.client or None,
        "priority": hint.priority,
        "keep": hint.keep,
        "expected_tokens": hint.expected_tokens,
        "fixed_tokens": hint.fixed_tokens,
    }
    return {name: value for name, value in found.items() if value is not None}
