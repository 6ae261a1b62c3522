"""Connections that clients leave open, half-sent or unread take nothing for long."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from tenure.serving.server import ServerConfig, http_server
from tenure.serving.server.event_stream import EventStream
from tenure.serving.server.http_protocol import BoundedProtocol
from tenure.serving.server.http_server import OTHER_FILES, fit_connections

from .conftest import Served

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}


def connect(served: Served, receive_buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    client.settimeout(10)
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(("127.0.0.1", int(served.root.rpartition(":")[2])))
    return client


def chat_bytes(**fields: Any) -> bytes:
    body = json.dumps(CHAT | fields).encode()
    return f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def closes(client: socket.socket) -> bool:
    """Whether the server ends the connection before the time-out; reads what comes until then."""
    try:
        while client.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_a_request_that_is_cut_off_anywhere_leaves_nothing(served):
    for whole in (chat_bytes(), chat_bytes(stream=True, n=2, max_tokens=200)):
        for end in [*range(1, len(whole), 7), len(whole)]:
            with connect(served) as client:
                client.sendall(whole[:end])
                if end % 2:  # also a reset instead of an orderly end
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    served.until(lambda: not served.connections() and not served.server.server_state.tasks)
    served.until(lambda: served.unfinished() == 0)
    assert served.post("/chat/completions", CHAT).status_code == 200
    served.system.tiers.check()


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/chat/completions"])
def test_a_body_that_drips_after_its_answer_ends_the_connection(serve, keys, path):
    served = serve(keys, ServerConfig(body_timeout_s=0.4, keep_alive_s=30, drain_s=5.0))
    stop = threading.Event()
    with connect(served) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n".encode())

        def drip() -> None:
            while not stop.wait(0.05):
                try:
                    client.sendall(b" ")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            assert client.recv(12) in (b"HTTP/1.1 401", b"HTTP/1.1 404")
            assert closes(client)
        finally:
            stop.set()
            dripping.join()
    served.until(lambda: not served.connections())


def test_a_connection_is_kept_when_the_rest_of_a_body_arrives(serve):
    served = serve(config=ServerConfig(body_timeout_s=0.5, drain_s=5.0))
    with connect(served) as client:
        client.sendall(b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n12")
        answer = b""
        while not answer.endswith(b"}}"):
            answer += client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 404")
        client.sendall(b"34")
        time.sleep(0.7)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_whole_answers_that_nobody_takes_end_the_connection(serve):
    served = serve(config=ServerConfig(send_timeout_s=0.3, drain_s=5.0))
    with connect(served, 4096) as client:
        client.settimeout(0.2)
        with suppress(OSError):
            for _ in range(20_000):  # pipelined, until the server reads no more
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        served.until(lambda: not served.connections() and not served.server.server_state.tasks)
    assert served.post("/chat/completions", CHAT).status_code == 200


def test_an_answer_whose_connection_is_being_closed_is_not_kept_for_ever(serve):
    """The answer is complete, and only the system's buffers are full."""
    served = serve(config=ServerConfig(send_timeout_s=0.3, drain_s=5.0))
    with connect(served, 4096) as client:
        many = chat_bytes(n=32, max_tokens=60, logprobs=True, top_logprobs=20, ignore_eos=True)
        served.until(lambda: len(served.connections()) == 1)
        (connection,) = served.connections()
        assert connection.transport.get_write_buffer_limits() == (0, 0), "less than the default would wait for ever"
        client.sendall(many.replace(b"Host: x", b"Host: x\r\nConnection: close"))
        served.until(lambda: served.system.scheduler.metrics.decode_tokens > 0, 60)
        served.until(lambda: not served.connections(), 60)
    assert served.unfinished() == 0


def test_a_slow_reader_gets_all():
    """It takes far longer than the time in which a reader must take a part, and more than the system's buffers hold."""
    size, part, bounds = 16 << 20, 1 << 20, ServerConfig(send_timeout_s=0.3)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    async def run() -> None:
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        listening = await asyncio.get_running_loop().create_server(
            lambda: BoundedProtocol(bounds, config=config, server_state=ServerState(), app_state={}), "127.0.0.1", 0
        )
        async with listening:
            reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(size // part):
                assert not any(await reader.readexactly(part))
                await asyncio.sleep(0.1)
            writer.close()

    asyncio.run(run())


def test_connections_beyond_the_bound_are_closed(serve):
    served = serve(config=ServerConfig(max_connections=20, drain_s=5.0))
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(served)) for _ in range(60)]
        assert all(closes(client) for client in clients[40:]), "at once"
        assert len(served.connections()) == 40
        clients[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert clients[0].recv(65536).startswith(b"HTTP/1.1 503")
    served.until(lambda: not served.connections())
    assert served.post("/chat/completions", CHAT).status_code == 200


def test_many_idle_connections_do_not_stop_answers(served):
    with ExitStack() as stack:
        for number in range(300):
            client = stack.enter_context(connect(served))
            client.sendall(b"GET /health HTTP/1.1\r\nX-Y: "[: number % 30])
        assert served.post("/chat/completions", CHAT).status_code == 200
        assert len(served.connections()) >= 300
    served.until(lambda: not served.connections())


@pytest.mark.parametrize(
    "flood",
    [b"X-Y: z\r\n", b"x" * 1000, b" folded\r\n", b"\r\n", b"\0", "é\r\n".encode()],
    ids=["headers", "a line", "folded", "empty lines", "zeros", "no ASCII"],
)
def test_a_flood_of_headers_ends_the_connection(serve, flood):
    served = serve(config=ServerConfig(head_timeout_s=2.0, keep_alive_s=2, drain_s=5.0))
    sent = 0
    with connect(served) as client:
        try:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: b\r\n")
            while sent < 50 << 20:
                client.sendall(flood * max(1, 65536 // len(flood)))
                sent += 65536
        except ConnectionError:
            pass
        assert sent < 50 << 20 and closes(client)
    served.until(lambda: not served.connections())
    assert served.post("/chat/completions", CHAT).status_code == 200


def test_chunks_that_do_not_end(serve):
    served = serve(config=ServerConfig(max_body_bytes=1000, body_timeout_s=0.5, drain_s=5.0))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for chunk in (b"1\r\n \r\n", b"1;" + b"x" * 5000 + b"\r\n \r\n", b"0\r\n" + b"X-Trailer: y\r\n" * 100):
        with connect(served) as client:
            try:
                client.sendall(head)
                for _ in range(20_000):
                    client.sendall(chunk)
            except ConnectionError:
                pass
            assert closes(client)
    served.until(lambda: not served.connections())


def test_invalid_requests_do_not_fill_the_log(served, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            with connect(served) as client:
                client.sendall(b"\0\0\0\r\n\r\n")
                assert client.recv(12) == b"HTTP/1.1 400"
            httpx.get(f"{served.root}/health", headers={"Connection": "upgrade", "Upgrade": "websocket"})
    assert not caplog.records


def test_a_stream_whose_client_has_gone_before_its_first_event_is_closed():
    closed: list[str] = []

    async def source() -> AsyncGenerator[bytes, None]:
        try:
            yield b"x"
            yield b"y"
        finally:
            closed.append("source")

    async def run() -> None:
        events = source()
        first = await anext(events)

        async def encoded() -> AsyncGenerator[bytes, None]:
            yield first
            async for event in events:
                yield event

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError("nobody is there")

        await EventStream(encoded(), 1.0, {}, events.aclose)({}, receive, send)
        assert closed == ["source"], "at once, not when it is garbage"

    asyncio.run(run())


def test_the_limit_of_open_files_fits_the_connections(monkeypatch, caplog):
    limits = {"now": (256, 100_000)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(now=new))
    config = ServerConfig(max_connections=1000)
    assert fit_connections(config) == config and limits["now"] == (2000 + OTHER_FILES, 100_000)
    limits["now"] = (256, 1024)
    assert fit_connections(config).max_connections == (1024 - OTHER_FILES) // 2 and limits["now"] == (1024, 1024)
    assert "up to 384 connections are served" in caplog.text
    limits["now"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert fit_connections(config) == config and limits["now"] == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(http_server, "resource", None)
    assert fit_connections(config) == config
