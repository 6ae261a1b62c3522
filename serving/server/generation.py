"""The answers to one HTTP request while the engine computes them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

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

    async def events(self, ping_s: float) -> AsyncGenerator[tuple[int, AnswerEvent] | None, None]:
        """Choice and event, in the order of their arrival; None after `ping_s` seconds without one.

        Raises:
            ApiError, ServingError: a request was refused, or has ended without an answer.
        """
        streams: list[AnswerStream] = []
        waiting: dict[asyncio.Task[AnswerEvent], int] = {}
        with self._quotas.admitted(self.requests) as admission:
            self.headers = admission.headers
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
                        admission.computed(choice, len(event.tokens), event.output)
                        self.outputs[choice] = event.output
                        yield choice, event
            except ServingError:
                admission.refused()
                raise
            finally:
                for stream in streams:
                    self._client.cancel(stream)
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
                with contextlib.suppress(ServingError):  # an engine that has stopped
                    for hint in self._last_hints:
                        self._client.hint(hint)


def _next_event(stream: AnswerStream) -> asyncio.Task[AnswerEvent]:
    return asyncio.ensure_future(stream.__anext__())  # pyright: ignore[reportReturnType]
