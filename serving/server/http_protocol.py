"""HTTP on a connection, with a bound on all that a client may leave open: heads, bodies, answers, connections."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .server_config import ServerConfig

MIN_TAKEN_BYTES = 16 << 10  # of an answer that waits, in `send_timeout_s`: else the reader is too slow


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol, which by itself bounds the size of a head and the time between two requests.

    A connection is closed if
    * the head of a request does not arrive in `head_timeout_s`, from the connection or its first byte on;
    * the rest of a body, whose request has been answered without it, does not arrive in `body_timeout_s`;
    * the client takes less than `MIN_TAKEN_BYTES` of what waits for it in `send_timeout_s`, also of an answer that is
      complete, or whose connection is being closed;
    * there are more than twice `max_connections`. Between once and twice as many, requests get status 503.
    """

    def __init__(self, bounds: ServerConfig, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._bounds = bounds
        self._head_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._waiting_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` with the first byte that the system does not take
        if len(self.connections) > 2 * self._bounds.max_connections:
            transport.abort()
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()
        if self._rest_timer is not None and self.conn.our_state is not h11.DONE:  # the body has arrived after all
            self._rest_timer.cancel()
            self._rest_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head_timer, self._rest_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        if self.conn.their_state is h11.SEND_BODY and self._rest_timer is None:
            # uvicorn's own timer starts anew with every byte.
            self._rest_timer = self.loop.call_later(self._bounds.body_timeout_s, self.timeout_keep_alive_handler)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _watch_head(self) -> None:
        """Starts the time of a head that has not arrived, and ends that of one that has."""
        if self.conn.their_state is not h11.IDLE:
            if self._head_timer is not None:
                self._head_timer.cancel()
            self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._bounds.head_timeout_s, self.timeout_keep_alive_handler)

    def _watch_reader(self) -> None:
        self._waiting_bytes = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(self._bounds.send_timeout_s, self._judge_reader)

    def _judge_reader(self) -> None:
        if self._waiting_bytes - self.transport.get_write_buffer_size() < MIN_TAKEN_BYTES:
            self.transport.abort()
        else:
            self._watch_reader()
