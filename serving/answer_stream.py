"""The answer to one request as a stream that the engine's thread fills, and one other thread or task reads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from .errors import Gone, RequestFailed, ServingError
from .events import AnswerEvent, Detokenizer, TokenEvent
from .request import FinishReason, Request, RequestOutput

_END = AnswerEvent([])  # given by `AnswerStream._take` after the last event


class AnswerStream:
    """The answer to one request while it is computed: `for` in a thread, `async for` in asyncio.

    Every `AnswerEvent` has all tokens computed since the previous one was taken, so a slow reader gets fewer and longer
    events, and buffers at most its own answer. The last event has the `RequestOutput`; a request that ended otherwise
    raises after the tokens that were computed: `Gone`, `RequestFailed`, `EngineDead`, or the reason of a refusal
    (`BadRequest`, `TooLarge`, `QueueFull`, `Draining`). Leaving a `with` or `async with` block cancels what has not
    ended. One thread or task reads a stream at a time.

    Attributes:
        request: as it was submitted.
        number: the engine's, once it has taken the request; started: it has sent tokens. Of the engine's thread.
    """

    def __init__(
        self, request: Request, detokenizer: Detokenizer | None, cancel: Callable[[AnswerStream], None]
    ) -> None:  # fmt: skip
        self.request = request
        self._detokenizer, self._cancel = detokenizer, cancel
        self._changed = threading.Condition()  # guards the following
        self._buffered = AnswerEvent([])
        self._output: RequestOutput | None = None
        self._error: ServingError | None = None
        self._exhausted = False  # the last event was taken
        self._waiter: asyncio.Future[None] | None = None
        self.number: int | None = None
        self.started = False

    @property
    def ended(self) -> bool:
        """Whether there will be no further tokens; some may not have been read yet."""
        return self._output is not None or self._error is not None

    # Readers ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> AnswerEvent:
        with self._changed:
            while (event := self._take()) is None:
                self._changed.wait()
        if event is _END:
            raise StopIteration
        return self._detokenized(event)

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> AnswerEvent:
        while True:
            with self._changed:
                event = self._take()
                waiter = self._wait() if event is None else None
            if event is _END:
                raise StopAsyncIteration
            if event is not None:
                return self._detokenized(event)
            assert waiter is not None, "there is nothing to read yet"
            await waiter

    def result(self, timeout_s: float | None = None) -> RequestOutput:
        """Waits for the end of the request and returns the whole answer, whether or not its events were read.

        Raises:
            TimeoutError: it has not ended after `timeout_s` seconds, and continues.
            ServingError: it was not answered.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.ended, timeout_s):
                raise TimeoutError(f"the request {self.request.id!r} has not ended within {timeout_s:g} s")
            if self._error is not None:
                raise self._error
            assert self._output is not None, "it has ended"
            return self._output

    async def aresult(self) -> RequestOutput:
        """As `result`, in asyncio; reads all remaining events."""
        async for _ in self:
            pass
        assert self._output is not None, "a stream that ends without an error has an output"
        return self._output

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel(self)

    async def __aenter__(self) -> AnswerStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cancel(self)

    def _take(self) -> AnswerEvent | None:
        """The next event, `_END` after the last one, or None if there is nothing yet; raises once it has failed."""
        event = self._buffered
        if event.tokens or event.text or (self._output is not None and not self._exhausted):
            self._buffered = AnswerEvent([])
            event.output = self._output
            self._exhausted = self._output is not None
            return event
        if self._error is not None:
            raise self._error
        return _END if self._exhausted else None

    def _wait(self) -> asyncio.Future[None]:
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError(f"another task reads the stream of {self.request.id!r}; accepted: one reader at a time")
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _detokenized(self, event: AnswerEvent) -> AnswerEvent:
        """Runs the detokenizer, in the reader's thread."""
        if self._detokenizer is not None:
            event.text = "".join(self._detokenizer.push(token).text for token in event.tokens)
            if event.output is not None:
                event.text += self._detokenizer.finish().text
        return event

    # The engine's thread ----------------------------------------------------------------------------------------

    def add(self, event: TokenEvent) -> asyncio.Future[None] | None:
        """Takes over a step's event; returns the future of the task that waits for it, if one does."""
        with self._changed:
            buffered = self._buffered
            buffered.tokens += event.tokens
            if event.logprobs is not None:
                buffered.logprobs = (buffered.logprobs or []) + list(event.logprobs)
            if event.text is not None:
                buffered.text = (buffered.text or "") + event.text
            if event.finished is not None:
                self._error = _error_of(event.finished)
                self._output = event.finished if self._error is None else None
            return self._wake()

    def fail(self, error: ServingError) -> asyncio.Future[None] | None:
        """Ends the stream with `error`, after the tokens that are buffered; returns what `add` does."""
        with self._changed:
            self._error = error
            return self._wake()

    def _wake(self) -> asyncio.Future[None] | None:
        self._changed.notify_all()
        waiter, self._waiter = self._waiter, None
        return waiter


def _error_of(output: RequestOutput) -> ServingError | None:
    """The error that ends a stream; None for a request that was answered."""
    kinds = {FinishReason.CANCELLED: Gone, FinishReason.TIMED_OUT: Gone, FinishReason.FAILED: RequestFailed}
    kind = kinds.get(output.finish_reason)
    if kind is None:
        return None
    return kind(f"the request {output.request.id!r} ended: {output.error or output.finish_reason.value}", output)
