"""Compiles the constraints of requests: off the event loop, and so that each client waits for its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from ..sampling.constraint import Constraint
from ..sampling.grammar_compiler import CompiledConstraint, GrammarCompiler, GrammarRefused
from .api_errors import bad_request
from .quotas import ClientLoads


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


class ConstraintMasks:
    """The compiled constraints of a server; used by the event loop alone.

    Args:
        compiler: of the model; None: constraints are refused.
    """

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler if compiler is not None and compiler.available else None
        if self._compiler is not None:
            config = self._compiler.config
            self._turns = ClientTurns(config.max_client_compiles, ClientLoads(config.max_client_waiting, "grammars"))
            self._threads = ThreadPoolExecutor(config.max_compiles, "tenure-grammars")

    async def compiled(self, constraint: Constraint, field: str | None, client: str) -> CompiledConstraint:
        """A client's constraint, from its cache or compiled.

        Args:
            field: of the body, for errors.

        Raises:
            ApiError: 400, it cannot be enforced, or there is no library; 429, too many of the client wait.
        """
        if self._compiler is None:
            raise bad_request(
                f"{field or 'a constraint'} is not supported by this server, which has neither xgrammar nor llguidance",
                field, "unsupported_parameter",
            )  # fmt: skip
        found = self._compiler.cached(constraint, client)
        if found is not None:
            return found
        async with self._turns.turn(client):
            try:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._threads, self._compiler.compile, constraint, client)
            except GrammarRefused as error:
                raise bad_request(str(error), field) from None
