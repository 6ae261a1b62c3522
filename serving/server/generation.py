"""The answers to one HTTP request while the engine computes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

from ..client import AnswerStream, EngineClient
from ..events import AnswerEvent
from ..request import Request, RequestOutput
from .api_errors import too_many


class ClientLoads:
    """The answers of each client that are being computed or wait; used by the event loop alone.

    Args:
        limit: answers of one client.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._answers = limit, dict[str, int]()

    @contextmanager
    def admitted(self, client: str, answers: int) -> Iterator[None]:
        """Counts a client's answers until the block is left.

        Raises:
            ApiError: 429, with these the client would have too many.
        """
        others = self._answers.get(client, 0)
        if others + answers > self._limit:
            raise too_many(
                f"got {answers} answers to compute while {others} are; accepted: up to {self._limit} at once"
            )
        self._answers[client] = others + answers
        try:
            yield
        finally:
            self._answers[client] -= answers
            if not self._answers[client]:
                del self._answers[client]


class Generation:
    """Submits the requests of one HTTP request, one for each choice, and merges their streams.

    The last event of each choice is in `outputs`. All that has not ended when `events` is left is cancelled.

    Attributes:
        requests: by choice.
        outputs: by choice; None until it has ended.
    """

    def __init__(self, client: EngineClient, requests: Sequence[Request], loads: ClientLoads) -> None:
        self.requests = requests
        self.outputs: list[RequestOutput | None] = [None] * len(requests)
        self._client, self._loads = client, loads

    async def events(self, ping_s: float) -> AsyncIterator[tuple[int, AnswerEvent] | None]:
        """Choice and event, in the order of their arrival; None after `ping_s` seconds without one.

        Raises:
            ApiError, ServingError: a request was refused, or has ended without an answer.
        """
        streams: list[AnswerStream] = []
        waiting: dict[asyncio.Task[AnswerEvent], int] = {}
        with self._loads.admitted(self.requests[0].client, len(self.requests)):
            try:
                for request in self.requests:
                    streams.append(self._client.submit(request))
                waiting = {_next_event(stream): choice for choice, stream in enumerate(streams)}
                while waiting:
                    done, _ = await asyncio.wait(waiting, timeout=ping_s, return_when=asyncio.FIRST_COMPLETED)
                    if not done:
                        yield None
                    for task in sorted(done, key=waiting.__getitem__):
                        choice, event = waiting.pop(task), task.result()
                        if event.output is None:
                            waiting[_next_event(streams[choice])] = choice
                        self.outputs[choice] = event.output
                        yield choice, event
            finally:
                for stream in streams:
                    self._client.cancel(stream)
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)


def _next_event(stream: AnswerStream) -> asyncio.Task[AnswerEvent]:
    return asyncio.ensure_future(stream.__anext__())  # pyright: ignore[reportReturnType]
