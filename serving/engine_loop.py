"""An engine as its thread drives it, see `EngineClient`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .events import TokenEvent
from .hints.hint import Hint
from .request import Request, RequestOutput
from .snapshot import SystemSnapshot
from .workflow.graph import StepGraph


class HasGraph(Protocol):
    """A serving system, as far as this module uses it."""

    @property
    def graph(self) -> StepGraph: ...


class EngineLoop(Protocol):
    """An engine as its thread drives it. Everything but `wake` is called by that thread alone, between two steps."""

    @property
    def system(self) -> HasGraph: ...

    def submit(self, request: Request) -> int:
        """Takes a request and returns its number, which no other request has.

        Raises:
            ValueError: it cannot be answered; a `ServingError` says which kind of refusal it is.
        """
        ...

    def cancel(self, number: int) -> None:
        """Ends a request; its last event follows in the next step. Unknown and ended numbers are ignored."""
        ...

    def hint(self, hint: Hint) -> None: ...

    def flush(self) -> None:
        """Discards all cached KV, and what runs on it."""
        ...

    def snapshot(self) -> SystemSnapshot:
        """The state of the system, bounded in size and time."""
        ...

    def step(self, patience_s: float) -> Sequence[RequestOutput]:
        """Computes the next batch, or waits up to `patience_s` seconds for something to do; returns what has ended.

        An exception ends the engine: whatever concerns a single request must end that request only.
        """
        ...

    def wake(self) -> None:
        """Makes the step that waits, or else the next one, return without waiting; from any thread, at once."""
        ...

    def take_events(self) -> Sequence[TokenEvent]:
        """The events since the last call, in order; every request gets exactly one with `finished`."""
        ...
