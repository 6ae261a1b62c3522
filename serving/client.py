"""The engine behind one thread: `EngineClient` takes requests from any thread and from asyncio, and streams answers.

The engine's thread owns model, scheduler and step graph. Callers put messages into an inbox and read from streams; they
never take the engine's lock and never wait for a step. Each event loop is woken at most once a step, whatever the
number of its streams.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Annotated, Any

from tenure.checked import Count, NotNegative, Positive, Range, verify

from .answer_stream import AnswerStream
from .engine_loop import EngineLoop
from .errors import BadRequest, Draining, EngineDead, Gone, QueueFull, RequestFailed, ServingError
from .events import Detokenizer
from .hints.hint import Hint
from .request import Request
from .snapshot import SystemSnapshot
from .workflow.spec import WorkflowSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineClientConfig:
    """Bounds of an `EngineClient`.

    Attributes:
        idle_wait_s: seconds that an idle engine waits at a time; the age of the last step stays below it while idle.
        max_unfinished: requests that have been submitted and have not ended; `submit` refuses more.
        snapshot_interval_s: seconds for which a snapshot is given to everybody who asks for one.
        max_messages: messages that the engine's thread has not taken yet; more are refused, except cancellations.
    """

    idle_wait_s: Positive = 0.5
    max_unfinished: Count = 20_000
    max_messages: Annotated[int, Range(1)] = 50_000
    snapshot_interval_s: NotNegative = 0.5

    def __post_init__(self) -> None:
        verify(self)


@dataclass(frozen=True)
class EngineHealth:
    """The state of an engine at one moment.

    Attributes:
        alive: its thread runs.
        accepting: new requests are taken.
        num_waiting: requests without a token so far: queued, loading, or in prefill.
        num_running: requests of which some tokens have been computed.
        last_step_age_s: seconds since the last step ended; grows while one step takes long.
        error: why the thread died; None if it did not.
    """

    alive: bool
    accepting: bool
    num_waiting: int
    num_running: int
    last_step_age_s: float
    error: str | None


@dataclass
class _Message:
    """A call for the engine's thread, and where its result is awaited; submissions report to their streams."""

    call: Callable[[], Any]
    result: Future[Any] | None = None


class EngineClient:
    """Runs an engine in a thread of its own, and is the only one to call it until `close`.

    All methods may be called from any thread and from coroutines. None of them waits for the engine, except `drain` and
    `close` (in asyncio: `await asyncio.to_thread(client.drain, 30.0)`). Messages take effect between two steps, in the
    order in which they were sent: a request may name a workflow that was added just before.

    `add_workflow`, `replace_workflow`, `remove_workflow`, `hint` and `flush` return a future with their result or
    error, which need not be awaited (in asyncio: `asyncio.wrap_future`); errors are logged, too. After the engine's
    thread has died by an exception every method except `health` and `close` raises `EngineDead`.

    Args:
        engine: no other thread may call it, or change its graph, until `close` has returned. The client closes neither
            the engine nor its system.
    """

    def __init__(self, engine: EngineLoop, config: EngineClientConfig | None = None) -> None:
        self.config = config or EngineClientConfig()
        self._engine = engine
        self._lock = threading.Lock()  # guards inbox, unfinished streams and refusal; never held during a call
        self._idle = threading.Condition(self._lock)
        self._inbox: deque[_Message] = deque()
        self._unfinished: dict[AnswerStream, None] = {}
        self._refusal: str | None = None  # why no new requests are taken
        self._dead: EngineDead | None = None
        self._closed = False  # the thread takes no further messages
        self._snapshot: tuple[Future[Any] | None, float] = None, 0.0  # the last one, and when it was asked for
        # Of the engine's thread, the counters read by others:
        self._streams: dict[int, AnswerStream] = {}
        self._woken: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        self._num_started = 0
        self._last_step_s = time.monotonic()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="tenure-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, detokenizer: Detokenizer | None = None) -> AnswerStream:
        """Hands a request to the engine and returns its stream at once; a refusal by the engine is raised there.

        Args:
            detokenizer: of this answer alone, e.g. a `StopChecker`; it runs in the reader's thread.

        Raises:
            Draining: no new requests are taken.
            QueueFull: too many requests have not ended.
            EngineDead: the engine's thread has died.
        """
        stream = AnswerStream(request, detokenizer, self.cancel)
        with self._lock:
            self._require_alive()
            if self._refusal is not None:
                raise Draining(f"got the request {request.id!r}, but no new ones are accepted: {self._refusal}")
            if len(self._unfinished) >= self.config.max_unfinished:
                raise QueueFull(
                    f"got the request {request.id!r} while {len(self._unfinished)} have not ended; accepted: up to "
                    f"{self.config.max_unfinished}"
                )
            self._unfinished[stream] = None
            first = self._post(_Message(lambda: self._accept(stream)))
        if first:
            self._engine.wake()
        return stream

    def submit_choices(self, request: Request, detokenizers: Sequence[Detokenizer] = ()) -> list[AnswerStream]:
        """Hands over a request for each of the `n` answers of `request.sampling`, and returns their streams in order.

        The prompt is computed once: the others find its whole pages in the cache. All are taken, or none.

        Args:
            detokenizers: one for each answer; or none at all.

        Raises:
            ValueError: another number of detokenizers. As `submit`.
        """
        n = request.sampling.n
        if len(detokenizers) not in (0, n):
            raise ValueError(f"got {len(detokenizers)} detokenizers for n={n}; accepted: one for each answer, or none")
        streams: list[AnswerStream] = []
        try:
            for i, detokenizer in enumerate(detokenizers or [None] * n):
                streams.append(self.submit(replace(request, sampling=request.sampling.for_choice(i)), detokenizer))
        except ServingError:
            for stream in streams:
                self.cancel(stream)
            raise
        return streams

    def cancel(self, stream: AnswerStream) -> None:
        """Ends a request, whose stream then raises `Gone`; no effect on one that has ended."""
        with self._lock:
            if stream not in self._unfinished:
                return
            first = self._post(_Message(lambda: self._cancel(stream)))
        if first:
            self._engine.wake()

    # Graph, hints and cache -------------------------------------------------------------------------------------

    def add_workflow(self, spec: WorkflowSpec | str, name: str | None = None, client: str = "") -> Future[None]:
        """Adds a workflow to the step graph, see `StepGraph.add_workflow`."""

        def add() -> None:
            self._engine.system.graph.add_workflow(spec, name, client)

        return self._call(add)

    def replace_workflow(self, spec: WorkflowSpec, name: str | None = None, client: str = "") -> Future[bool]:
        """Adds a workflow, or changes the one of that name, see `StepGraph.replace_workflow`."""
        return self._call(lambda: self._engine.system.graph.replace_workflow(spec, name, client))

    def remove_workflow(self, name: str) -> Future[None]:
        """Removes a workflow from the step graph."""
        return self._call(lambda: self._engine.system.graph.remove_workflow(name))

    def hint(self, hint: Hint) -> Future[None]:
        """Passes on a client's hint; it influences what is cached and prefetched, never an answer."""
        return self._call(lambda: self._engine.hint(hint))

    def flush(self) -> Future[None]:
        """Discards all cached KV, e.g. after the weights have changed."""
        return self._call(self._engine.flush)

    # State ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Future[SystemSnapshot]:
        """The state of the system between two steps, taken by the engine's thread.

        Taken once in `snapshot_interval_s`, and once after whatever is in progress, however many ask: the future is
        shared, so nobody may cancel it.

        Raises:
            EngineDead, Draining, QueueFull: see `EngineClient`.
        """
        now = time.monotonic()
        with self._lock:
            self._require_alive()
            last, taken_s = self._snapshot
            if last is not None and (not last.done() or now - taken_s < self.config.snapshot_interval_s):
                return last
        future = self._call(self._engine.snapshot)
        self._snapshot = future, now
        return future

    def health(self) -> EngineHealth:
        with self._lock:
            unfinished, dead, refusal = len(self._unfinished), self._dead, self._refusal
        started = min(self._num_started, unfinished)
        alive = self._thread.is_alive() and dead is None
        return EngineHealth(
            alive=alive, accepting=alive and refusal is None, num_waiting=unfinished - started, num_running=started,
            last_step_age_s=max(0.0, time.monotonic() - self._last_step_s),
            error=None if dead is None else str(dead),
        )  # fmt: skip

    def drain(self, timeout_s: float) -> bool:
        """Refuses new requests with `Draining`, and waits until all that were taken have ended.

        After `timeout_s` seconds the rest is cancelled. Hints and workflows are still taken.

        Returns:
            Whether all of them ended by themselves.

        Raises:
            ValueError: a negative time. RuntimeError: called by the engine's thread, e.g. by a callback of a future.
            EngineDead: the engine's thread has died.
        """
        if not timeout_s >= 0:
            raise ValueError(f"got timeout_s={timeout_s!r} to drain; accepted: seconds from 0 up")
        if threading.current_thread() is self._thread:
            raise RuntimeError("got a drain by the engine's thread, which it waits for; accepted: another thread")
        self._refuse("the engine is draining")
        with self._lock:
            self._require_alive()
            in_time = self._idle.wait_for(lambda: not self._unfinished, timeout_s)
            late = list(self._unfinished)
        for stream in late:
            self.cancel(stream)
        with self._lock:
            self._idle.wait_for(lambda: not self._unfinished)
            self._require_alive()
        return in_time

    def close(self, reason: str = "the engine was closed") -> None:
        """Ends all requests with `Gone`, refuses new ones with `Draining`, and waits for the end of the thread.

        The step in progress is completed first. No effect the second time, or after the thread has died.
        """
        self._refuse(reason)
        with self._lock:
            self._post(_Message(self._stop))
        self._engine.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _refuse(self, reason: str) -> None:
        with self._lock:
            self._refusal = self._refusal or reason

    # Messages ---------------------------------------------------------------------------------------------------

    def _call(self, call: Callable[[], Any]) -> Future[Any]:
        result: Future[Any] = Future()
        with self._lock:
            self._require_alive()
            if self._closed:
                raise Draining(f"got a message, but none are accepted: {self._refusal}")
            if len(self._inbox) >= self.config.max_messages:
                raise QueueFull(
                    f"got a message while {len(self._inbox)} wait for the engine; accepted: up to "
                    f"{self.config.max_messages}"
                )
            first = self._post(_Message(call, result))
        if first:
            self._engine.wake()
        return result

    def _post(self, message: _Message) -> bool:
        """Queues a message, under the lock; whether the engine has to be woken for it."""
        self._inbox.append(message)
        return len(self._inbox) == 1

    def _require_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(str(self._dead)) from self._dead.__cause__

    # The engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_messages()
                self._step(0.0 if self._inbox or self._stopping else self.config.idle_wait_s)
            self._end_all()
        except BaseException as error:
            logger.exception("the engine's thread has died")
            dead = EngineDead(f"the engine's thread has died: {type(error).__name__}: {error}")
            dead.__cause__ = error
            self._die(dead)

    def _step(self, patience_s: float) -> None:
        self._engine.step(patience_s)
        for event in self._engine.take_events():
            stream = self._streams.get(event.number)
            if stream is None:
                continue  # submitted by others, before the client took over
            if event.tokens and not stream.started:
                stream.started = True
                self._num_started += 1
            self._collect(stream.add(event))
            if event.finished is not None:
                self._forget(stream)
        self._wake_loops()
        self._last_step_s = time.monotonic()

    def _take_messages(self) -> None:
        """Carries out the messages that have arrived; those that arrive meanwhile follow after the next step."""
        for _ in range(len(self._inbox)):
            with self._lock:
                message = self._inbox.popleft()
            result = message.result
            if result is not None and not result.set_running_or_notify_cancel():
                continue  # its sender has cancelled it
            try:
                value = message.call()
            except Exception as error:
                logger.warning("a message to the engine was refused: %s", error)
                if result is not None:
                    result.set_exception(error)
            else:
                if result is not None:
                    result.set_result(value)
        self._wake_loops()

    def _accept(self, stream: AnswerStream) -> None:
        try:
            number = self._engine.submit(stream.request)
        except Exception as error:
            self._collect(stream.fail(_refusal_of(stream.request, error)))
            self._forget(stream)
        else:
            stream.number = number
            self._streams[number] = stream

    def _cancel(self, stream: AnswerStream) -> None:
        if stream.number in self._streams:
            self._engine.cancel(stream.number)

    def _stop(self) -> None:
        self._stopping = True

    def _end_all(self) -> None:
        """Cancels what has not ended, and reports it by a step that does not wait."""
        for number in list(self._streams):
            self._engine.cancel(number)
        self._step(0.0)
        self._refuse_messages(Draining(f"got a message, but none are accepted: {self._refusal}"))
        self._fail_all(Gone(f"the request has ended: {self._refusal}"))

    def _die(self, dead: EngineDead) -> None:
        self._dead = dead
        self._refuse_messages(dead)
        self._fail_all(dead)

    def _refuse_messages(self, error: ServingError) -> None:
        with self._lock:
            self._closed = True
            messages, self._inbox = self._inbox, deque()
        for message in messages:
            if message.result is not None and message.result.set_running_or_notify_cancel():
                message.result.set_exception(error)

    def _fail_all(self, error: ServingError) -> None:
        with self._lock:
            streams = list(self._unfinished)
        for stream in streams:
            self._collect(stream.fail(error))
            self._forget(stream)
        self._wake_loops()

    def _forget(self, stream: AnswerStream) -> None:
        if stream.number is not None:
            del self._streams[stream.number]
        self._num_started -= stream.started
        with self._lock:
            del self._unfinished[stream]
            if not self._unfinished:
                self._idle.notify_all()

    def _collect(self, waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None:
            self._woken.setdefault(waiter.get_loop(), []).append(waiter)

    def _wake_loops(self) -> None:
        woken, self._woken = self._woken, {}
        for loop, waiters in woken.items():
            try:
                loop.call_soon_threadsafe(_resolve, waiters)
            except RuntimeError:  # the loop was closed, and its tasks are gone
                logger.debug("the event loop of %d streams was closed", len(waiters))


def _resolve(waiters: Sequence[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():  # its task may have been cancelled
            waiter.set_result(None)


def _refusal_of(request: Request, error: Exception) -> ServingError:
    """The error of the stream of a request that the engine has not taken."""
    if isinstance(error, ServingError):
        return error
    kind, reason = (BadRequest, str(error)) if isinstance(error, ValueError) else (RequestFailed, repr(error))
    refusal = kind(f"the request {request.id!r} was refused: {reason}")
    refusal.__cause__ = error
    return refusal
