"""Runs the application with uvicorn, and stops it: what runs may finish, within a time, and nothing new is accepted."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import uvicorn

from ..client import EngineClient
from ..errors import EngineDead
from .http_protocol import BoundedProtocol
from .server_config import ServerConfig

try:
    import resource
except ImportError:
    resource = None

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
OTHER_FILES = 256  # that are not connections: the model's, those of the disk tier, event loop and threads


def bind(host: str, port: int) -> socket.socket:
    """A socket on the address, which refuses connections until the server runs.

    Args:
        port: 0: any that is free.

    Raises:
        OSError: the address is not this machine's, or in use.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        bound = socket.socket(found[0][0], socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"got the host {host!r}; accepted: a name or address of this machine ({error})") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(found[0][4])
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; give another --host or --port") from None
    return bound


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains the engine when it is stopped.

    The first signal begins to drain; a second Ctrl-C ends all requests at once. The signals are not raised again, so
    that the caller can close the system.

    Args:
        on_hangup: called by SIGHUP, which otherwise ends the process.
    """

    def __init__(
        self, config: uvicorn.Config, client: EngineClient, drain_s: float, on_ready: Callable[[], None],
        on_hangup: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._client, self._drain_s, self._on_ready, self._on_hangup = client, drain_s, on_ready, on_hangup

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drained = asyncio.ensure_future(asyncio.to_thread(self._drain))
        await super().shutdown(sockets)
        await asyncio.to_thread(self._client.close, "the server is shutting down")
        await drained

    def _drain(self) -> None:
        try:
            if not self._client.drain(self._drain_s):
                logger.warning("requests that had not ended after %g s were cancelled", self._drain_s)
        except EngineDead as error:
            logger.error("%s", error)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        on_hangup = self._on_hangup
        if on_hangup is not None and hasattr(signal, "SIGHUP"):
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: on_hangup())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def make_server(
    app: Any, client: EngineClient, config: ServerConfig, on_ready: Callable[[], None] = lambda: None,
    on_hangup: Callable[[], None] | None = None,
) -> DrainingServer:  # fmt: skip
    """The server of an application; `server.run(sockets=[bind(…)])` runs it until it is stopped."""
    protocol: Any = functools.partial(BoundedProtocol, config)
    settings = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, h11_max_incomplete_event_size=config.max_header_bytes,
        timeout_keep_alive=config.keep_alive_s, limit_concurrency=config.max_connections,
        timeout_graceful_shutdown=int(config.drain_s + config.close_s + 1),
        log_level="error",  # its warnings are about what clients send, a line for each
    )  # fmt: skip
    return DrainingServer(settings, client, config.drain_s, on_ready, on_hangup)


def fit_connections(config: ServerConfig) -> ServerConfig:
    """Lets the process open a file for each connection that `config` allows, or lowers their number to what it may.

    Without a file left, neither new connections nor the disk tier would work.
    """
    if resource is None:  # not on Windows
        return config
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * config.max_connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return config
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        fitting = max(1, (allowed - OTHER_FILES) // 2)
        logger.warning("%d files may be open at once: up to %d connections are served", allowed, fitting)
        return replace(config, max_connections=fitting)
    return config


def run_server(
    app: Any, client: EngineClient, listening: socket.socket, config: ServerConfig | None = None,
    on_ready: Callable[[], None] = lambda: None, on_hangup: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Serves until SIGINT or SIGTERM, then drains and closes the client. The limit of open files is raised if need be.

    Args:
        listening: from `bind`; closed at the end.
        on_ready: called when requests are accepted.
        on_hangup: called by SIGHUP, in the main thread.
    """
    config = fit_connections(config or ServerConfig())
    make_server(app, client, config, on_ready, on_hangup).run(sockets=[listening])
