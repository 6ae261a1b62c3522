"""Requests and responses on the wire: bounded bodies, disconnects, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from .api_errors import ApiError, bad_request
from .server_config import ServerConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")
Message = MutableMapping[str, Any]  # of ASGI
Receive = Callable[[], Awaitable[Message]]


async def read_bytes(request: Request, config: ServerConfig) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 413, it is too long; 400, it has not arrived in time; 499, the client has gone.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > config.max_body_bytes):
        raise _too_long(declared[:18], config)

    async def read() -> bytes:
        body = bytearray()
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise client_gone()
            body += message.get("body", b"")
            if len(body) > config.max_body_bytes:
                raise _too_long(f"more than {config.max_body_bytes}", config)
            if not message.get("more_body"):
                return bytes(body)

    try:
        return await asyncio.wait_for(read(), config.body_timeout_s)
    except asyncio.TimeoutError:
        raise bad_request(f"got no whole body within {config.body_timeout_s:g} s; accepted: faster ones") from None


def _too_long(given: str, config: ServerConfig) -> ApiError:
    return ApiError(
        413, f"got {given} bytes as the body; accepted: up to {config.max_body_bytes}", code="body_too_large"
    )


def client_gone() -> ApiError:
    """Status 499, which nobody reads but the metrics."""
    return ApiError(499, "the client has gone", code="client_gone")


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone; to be called when the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects.

    Raises:
        ApiError: 499, the client has gone.
    """
    result, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise client_gone()
    finally:
        for task in (result, gone):
            task.cancel()
        await asyncio.gather(result, gone, return_exceptions=True)


class EventStream(Response):
    """A response of server-sent events, which are closed when all are sent, or when the client has gone.

    Args:
        events: encoded; an exception in it ends the connection.
        send_timeout_s: seconds for which a reader may take nothing.
        close: called behind the end of `events`, also where the client had gone before the first of them.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], send_timeout_s: float, headers: dict[str, str],
        close: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        self.status_code, self.background = 200, None
        self._events, self._send_timeout_s, self._close = events, send_timeout_s, close
        self._sending_since: float | None = None  # by the loop's clock, while a message waits for the reader
        self.init_headers(headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Message, receive: Receive, send: Callable[[Message], Awaitable[None]]) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        gone, stuck = asyncio.ensure_future(disconnected(receive)), asyncio.ensure_future(self._nothing_taken())
        try:
            await asyncio.wait({sending, gone, stuck}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and not gone.done():  # what fails since nobody is there is no error
                sending.result()
        finally:
            for task in (sending, gone, stuck):
                task.cancel()
            await asyncio.gather(sending, gone, stuck, return_exceptions=True)
            await self._events.aclose()
            await self._close()  # closing a generator that has not begun does not run its `finally`

    async def _send_all(self, send: Callable[[Message], Awaitable[None]]) -> None:
        now = asyncio.get_running_loop().time

        async def put(message: Message) -> None:
            self._sending_since = now()
            await send(message)
            self._sending_since = None

        await put({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await put({"type": "http.response.body", "body": event, "more_body": True})
        await put({"type": "http.response.body", "body": b""})

    async def _nothing_taken(self) -> None:
        """Returns when a message has waited for the reader for too long: one watch a stream, not a timer an event."""
        loop = asyncio.get_running_loop()
        while True:
            since = loop.time() if self._sending_since is None else self._sending_since
            left = since + self._send_timeout_s - loop.time()
            if left <= 0:
                logger.info("a reader has taken nothing for %g s: its answer is cancelled", self._send_timeout_s)
                return
            await asyncio.sleep(left)
