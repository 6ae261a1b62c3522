"""The answers to one HTTP request while the engine computes them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ..answer_stream import AnswerStream
from ..client import EngineClient
from ..errors import ServingError
from ..events import AnswerEvent
from ..hints.hint import Hint
from ..request import Request, RequestOutput
from .quotas import Quotas


class Generation:
    """Submits the requests of one HTTP request, one for each choice, and merges their streams.

    The last event of each choice is in `outputs`. All that has not ended when `events` is left is cancelled.

    Args:
        last_hints: passed on when all have ended, however they did.
    Attributes:
        requests: by choice.
        outputs: by choice; None until it has ended.
        headers: of the response, about the client's quotas; known after the first event.
    """

    def __init__(
        self, client: EngineClient, requests: Sequence[Request], quotas: Quotas, last_hints: Sequence[Hint] = ()
    ) -> None:
        self.requests = requests
        self.outputs: list[RequestOutput | None] = [None] * len(requests)
        self.headers: dict[str, str] = {}
        self._client, self._quotas, self._last_hints = client, quotas, last_hints
        self._last_event_s = 0.0  # by the loop's clock

    async def events(self, ping_s: float) -> AsyncGenerator[tuple[int, AnswerEvent] | None, None]:
        """Choice and event, in the order of their arrival; None after `ping_s` seconds without one.

        Raises:
            ApiError, ServingError: a request was refused, or has ended without an answer.
        """
        streams: list[AnswerStream] = []
        reading: list[asyncio.Task[None]] = []
        # One event at a time: what comes while nobody takes it is one event of its stream later.
        queue: asyncio.Queue[tuple[int, AnswerEvent | Exception] | None] = asyncio.Queue(maxsize=1)
        with self._quotas.admitted(self.requests) as admission:
            self.headers = admission.headers
            try:
                for request in self.requests:
                    streams.append(self._client.submit(request))
                reading = [asyncio.ensure_future(_read(*each, queue)) for each in enumerate(streams)]
                reading.append(asyncio.ensure_future(self._ping(ping_s, queue)))
                while any(output is None for output in self.outputs):
                    found = await queue.get()
                    self._last_event_s = asyncio.get_running_loop().time()
                    if found is None:
                        yield None
                        continue
                    choice, event = found
                    if isinstance(event, Exception):
                        raise event
                    admission.computed(choice, len(event.tokens), event.output)
                    self.outputs[choice] = event.output
                    yield choice, event
            except ServingError:
                admission.refused()
                raise
            finally:
                for stream in streams:
                    self._client.cancel(stream)
                for task in reading:
                    task.cancel()
                await asyncio.gather(*reading, return_exceptions=True)
                with contextlib.suppress(ServingError):  # an engine that has stopped
                    for hint in self._last_hints:
                        self._client.hint(hint)

    async def _ping(self, ping_s: float, queue: asyncio.Queue[Any]) -> None:
        """Puts None into the queue where nothing has come for `ping_s` seconds."""
        loop = asyncio.get_running_loop()
        self._last_event_s = loop.time()
        while True:
            await asyncio.sleep(max(0.0, self._last_event_s + ping_s - loop.time()))
            if loop.time() >= self._last_event_s + ping_s:
                await queue.put(None)
                self._last_event_s = loop.time()


async def _read(choice: int, stream: AnswerStream, queue: asyncio.Queue[Any]) -> None:
    """Puts the events of a choice into the queue, or the error that ends them."""
    try:
        async for event in stream:
            await queue.put((choice, event))
    except Exception as error:
        await queue.put((choice, error))
