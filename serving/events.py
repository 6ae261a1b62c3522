"""The progress of an answer: as the engine reports it after a step, and as the stream of a request hands it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .request import RequestOutput


@dataclass(frozen=True)
class TokenEvent:
    """The progress of one request in one step of the engine.

    Attributes:
        number: of the request, from the engine's `submit`.
        tokens: ids added to the answer; may be empty in the last event.
        logprobs: one entry a token; None unless the request asked for them.
        finished: the result, in the request's last event and in no other.
        text: what the tokens add to the text, if the engine detokenises (to find stop strings); else None.
    """

    number: int
    tokens: list[int]
    logprobs: Sequence[Any] | None = None
    finished: RequestOutput | None = None
    text: str | None = None


@dataclass
class AnswerEvent:
    """A part of an answer: everything that was computed since the reader took the previous part.

    Attributes:
        tokens: ids, at least one except in the last event.
        logprobs: one entry a token; None unless the request asked for them.
        text: the text they add; None without a detokenizer.
        output: in the last event: the whole answer with finish reason, cached tokens and times.
    """

    tokens: list[int]
    logprobs: list[Any] | None = None
    text: str | None = None
    output: RequestOutput | None = None


class HasText(Protocol):
    """A piece of text, as `sampling.stop.TextDelta` is."""

    @property
    def text(self) -> str: ...


class Detokenizer(Protocol):
    """Turns the tokens of one answer into text, as `sampling.stop.StopChecker` does."""

    def push(self, token: int) -> HasText:
        """The text that is certain once `token` has followed; empty if it depends on later ones."""
        ...

    def finish(self) -> HasText:
        """The rest of the text; no further tokens follow."""
        ...
