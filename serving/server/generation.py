"""The answers to one HTTP request while the engine computes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from ..client import AnswerStream, EngineClient
from ..events import AnswerEvent
from ..request import Request, RequestOutput
from .api_errors import too_many


class ClientLoads:
    """Counts what each client has in progress; used by the event loop alone.

    Args:
        limit: of one client.
        what: is counted, in the plural.
    """

    def __init__(self, limit: int, what: str) -> None:
        self._limit, self._what = limit, what
        self._counts: dict[str, int] = {}

    @contextmanager
    def admitted(self, client: str, count: int) -> Iterator[None]:
        """Counts `count` more until the block is left.

        Raises:
            ApiError: 429, with these the client would have too many.
        """
        others = self._counts.get(client, 0)
        if others + count > self._limit:
            given = f"{count} {self._what} while {others} are in progress"
            raise too_many(f"got {given}; accepted: up to {self._limit} at once")
        self._counts[client] = others + count
        try:
            yield
        finally:
            self._counts[client] -= count
            if not self._counts[client]:
                del self._counts[client]


class ClientTurns:
    """Runs a few works of each client at a time; the others wait. Used by the event loop alone.

    Args:
        limit: of one client.
        loads: of works that run or wait.
    """

    def __init__(self, limit: int, loads: ClientLoads) -> None:
        self._limit, self._loads = limit, loads
        self._turns: dict[str, tuple[asyncio.Semaphore, list[None]]] = {}  # and one item for each work

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Waits for a turn of `client`, which ends with the block.

        Raises:
            ApiError: 429, too many wait.
        """
        with self._loads.admitted(client, 1):
            semaphore, works = self._turns.setdefault(client, (asyncio.Semaphore(self._limit), []))
            works.append(None)
            try:
                async with semaphore:
                    yield
            finally:
                works.pop()
                if not works:
                    del self._turns[client]


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
