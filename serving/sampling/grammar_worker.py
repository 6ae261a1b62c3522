"""The process that compiles grammars of clients: each in a child of its own, with bounds on its time and memory.

Run as a program, with one end of a socket pair as its standard input, by `grammar_compiler.py`. It imports a library
once, and then forks for every grammar, which takes milliseconds; a child that exceeds a bound is ended by the system,
in whatever code it is. It imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BUSY = 4  # seconds by the clock for a second of computing
LENGTH = struct.Struct("<Q")  # precedes every message


def send(connection: socket.socket, message: bytes) -> None:
    """Sends a message."""
    connection.sendall(LENGTH.pack(len(message)) + message)


def receive(connection: socket.socket, max_bytes: int) -> bytes | None:
    """Receives a message; None if the connection has ended, or the message is longer."""
    head = _receive(connection, LENGTH.size)
    if head is None or LENGTH.unpack(head)[0] > max_bytes:
        return None
    return _receive(connection, LENGTH.unpack(head)[0])


def _receive(connection: socket.socket, size: int) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        part = connection.recv(min(size - len(found), 1 << 20))
        if not part:
            return None
        found += part
    return bytes(found)


class Worker:
    """Compiles grammars for one vocabulary.

    Args:
        setup: `library`, and what it needs of the tokenizer: `tokenizer`, `vocab_size` and `end_token_ids`; the bounds
            `compile_s`, `memory_bytes`, `max_bytes` and `max_step_s`.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup = setup
        if setup["library"] == "xgrammar":
            import xgrammar

            info = xgrammar.TokenizerInfo.deserialize_json(setup["tokenizer"])
            self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        else:
            import llguidance

            self._tokenizer = llguidance.LLTokenizer(
                setup["tokenizer"], n_vocab=setup["vocab_size"], eos_token=setup["end_token_ids"]
            )

    def compile(self, source: str) -> bytes:
        """The compiled grammar, of xgrammar serialised, of llguidance nothing.

        Raises:
            ValueError: the source is refused.
        """
        if self._setup["library"] == "xgrammar":
            return self._with_xgrammar(source)
        import llguidance

        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0)
        if not matcher.is_error():
            with self._first_mask():  # it finds further mistakes
                matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return b""

    def _with_xgrammar(self, source: str) -> bytes:
        import xgrammar

        try:
            compiled = self._compiler.compile_structural_tag(source)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(str(error)) from None
        mask = xgrammar.allocate_token_bitmask(1, self._setup["vocab_size"])
        matcher = xgrammar.GrammarMatcher(compiled)
        with self._first_mask():
            matcher.fill_next_token_bitmask(mask)
        return compiled.serialize_json().encode()

    @contextmanager
    def _first_mask(self) -> Iterator[None]:
        """Raises ValueError if the block, which makes the first mask, takes too long."""
        begun, limit = time.thread_time(), self._setup["max_step_s"]
        yield
        if time.thread_time() - begun > limit:
            raise ValueError(f"its first token takes more than {limit:g} s")

    def answer(self, connection: socket.socket) -> None:
        """Compiles what a connection asks for, within the bounds. It is sent JSON with `error`, then the result."""
        setup = self._setup
        # Their signals end the process. On a busy machine a grammar may take longer than it computes.
        signal.setitimer(signal.ITIMER_PROF, setup["compile_s"])
        signal.setitimer(signal.ITIMER_REAL, setup["compile_s"] * BUSY)
        limit = _address_space() + setup["memory_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        source = receive(connection, setup["max_bytes"])
        if source is None:
            return
        try:
            result, error = self.compile(source.decode()), None
        except ValueError as refused:
            result, error = b"", str(refused)
        if len(result) > setup["max_bytes"]:
            result, error = b"", f"the compiled grammar has {len(result)} bytes; accepted: up to {setup['max_bytes']}"
        send(connection, json.dumps({"error": error}).encode())
        send(connection, result)


def _address_space() -> int:
    """Bytes of this process's address space; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1 << 40


def main() -> None:
    """Serves connections until the parent has gone."""
    parent = socket.socket(fileno=os.dup(0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setup = json.loads(receive(parent, 1 << 30) or b"{}")
    sys.path[:] = setup["path"]
    try:
        worker = Worker(setup)
    except Exception as error:
        send(parent, json.dumps({"error": repr(error)}).encode())
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended children leave nothing behind
    send(parent, json.dumps({"error": None}).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(parent, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            try:
                worker.answer(socket.socket(fileno=descriptors[0]))
            finally:
                os._exit(0)
        os.close(descriptors[0])


if __name__ == "__main__":
    main()
