"""Traces of a server: recorded from any driver of a scheduler, as one JSON object a line, and read back for a replay.

docs/reference/config.md describes the format. Each call names the call of its workflow that it followed, and the
seconds since that one's end. A replay is therefore as closed a loop as the original: a faster server gets its next call
sooner.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np

from tenure.checked import NotNegative, Range, read
from tenure.documents import DocumentLimits, json_lines, shown

from ..request import MAX_NAME, MAX_NUMBER, Request, RequestOutput, StorePolicy
from ..scheduler.request_state import ScheduledBatch
from ..scheduler.scheduler import Scheduler
from ..workflow.spec import AgentSpec, EdgeSpec, Name, WorkflowSpec
from .cost_model import BatchShape

TRACE_VERSION = 1
TRACE_LIMITS = DocumentLimits(items=1 << 20, lines_bytes=1 << 30, line_bytes=1 << 24)  # a prompt's tokens are one line
MAX_BYTES = 1 << 50  # of KV: a token's or a prompt's
Tokens = Annotated[int, Range(0, MAX_NUMBER)]


class TraceRecorder:
    """Writes a trace, from any thread. A `RecordingScheduler` calls it for every event of a scheduler.

    Args:
        path: of the file, which is overwritten.
        bytes_per_token, page_size: bytes of KV per computed token, tokens per page.
        about: further facts, as JSON values. `machine_of` reads `device_bytes`, `host_bytes`, `disk_bytes`,
            `link_bytes_per_s`, `disk_bytes_per_s`, `latency_s`, `copy_parts`, `scheduler` (fields of
            `SchedulerConfig`) and `believed`: the tokens/s, bytes/s of the two links, and latency in seconds that the
            server's `LinearCosts` assumed.
    """

    def __init__(self, path: str | Path, bytes_per_token: int, page_size: int, about: dict[str, Any] | None = None):
        self._file: IO[str] = open(path, "w", encoding="utf-8")  # noqa: SIM115  # closed by `close`
        self._lock = threading.RLock()
        self._prompts: dict[bytes, int] = {}
        self._last: dict[str, tuple[str, float]] = {}
        self._labels: set[str] = set()
        self._ids: dict[int, str] = {}  # of the unfinished requests whose label another one had before
        self._write(
            "trace", version=TRACE_VERSION, bytes_per_token=bytes_per_token, page_size=page_size, about=about or {}
        )

    def __enter__(self) -> TraceRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def record_workflow(self, at: float, spec: WorkflowSpec, name: str | None = None) -> None:
        """A workflow was declared, under `name` if that is not None."""
        agents = [{key: value for key, value in vars(agent).items() if value is not None} for agent in spec.agents]
        edges = [[edge.source, edge.target, edge.probability] for edge in spec.edges]
        self._write("workflow", at=at, name=name or spec.name, agents=agents, edges=edges, start=list(spec.start))

    def record_stored(self, agent: str, prompt: Any, nbytes: int) -> None:
        """An agent's fixed prompt, with `nbytes` of KV, is cached before the first call."""
        with self._lock:
            number = self._fixed(np.asarray(prompt, dtype=np.int32).reshape(-1))
            self._write("stored", agent=agent, fixed=number, nbytes=nbytes)

    def record_submitted(self, at: float, request: Request, number: int = 0) -> None:
        """A request was submitted, and has that `number`; a label that is used again is written with it."""
        prompt = np.asarray(request.prompt, dtype=np.int32).reshape(-1)
        fixed = min(request.fixed_tokens, len(prompt))
        group = request.workflow or request.session
        with self._lock:
            before = self._last.get(group) if group is not None else None
            prompt_number = self._fixed(prompt[:fixed]) if fixed else None
            name = request.id
            if name in self._labels:
                name = self._ids[number] = f"{name[: MAX_NAME // 2]}#{number}"
            self._labels.add(name)
        self._write(
            "call", at=at, id=name, agent=request.agent, workflow=request.workflow, session=request.session,
            client=request.client, priority=request.priority, keep=request.store_policy.value, fixed=prompt_number,
            tokens=prompt[fixed:].tolist(), max_new_tokens=request.max_new_tokens,
            after=None if before is None else [before[0], max(0.0, at - before[1])],
        )  # fmt: skip

    def record_batch(self, at: float, batch: ScheduledBatch, seconds: float) -> None:
        """A batch began at `at` and took `seconds`; to be called before `Scheduler.complete`."""
        shape = batch_shape_of(batch)
        self._write(
            "batch", at=at, seconds=seconds, chunks=[list(chunk) for chunk in shape.chunks],
            contexts=list(shape.contexts), steps=shape.steps,
        )  # fmt: skip

    def record_finished(self, output: RequestOutput) -> None:
        request, times = output.request, output.times
        group = request.workflow or request.session
        with self._lock:
            name = self._ids.pop(output.number, request.id)
            if group is not None and times.finished is not None:
                self._last[group] = (name, times.finished)
        self._write(
            "end", at=times.finished, id=name, outcome=output.finish_reason.value, arrived=times.arrived,
            admitted=times.admitted, first_token=times.first_token, produced=output.num_output_tokens,
            stalled_s=output.stalled_s, cached=output.cached_tokens, loaded=output.loaded_tokens,
            recomputed=output.recomputed_tokens,
        )  # fmt: skip

    def _fixed(self, tokens: np.ndarray) -> int:
        """The number of a fixed prompt; its tokens are written the first time."""
        key = tokens.tobytes()
        if key not in self._prompts:
            self._prompts[key] = len(self._prompts)
            self._write("prompt", number=self._prompts[key], tokens=tokens.tolist())
        return self._prompts[key]

    def _write(self, kind: str, **values: Any) -> None:
        line = json.dumps({"kind": kind, **values}, separators=(",", ":"))
        with self._lock:
            self._file.write(line + "\n")


class RecordingScheduler:
    """Wraps a scheduler and records the calls that a driver makes; all other attributes are the scheduler's own.

    `dataclasses.replace(system, scheduler=RecordingScheduler(system.scheduler, recorder))` hands one to an engine.
    """

    def __init__(self, scheduler: Scheduler, recorder: TraceRecorder) -> None:
        self.scheduler, self.recorder = scheduler, recorder
        self._clock = scheduler.tiers.clock
        self._began = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def __len__(self) -> int:
        return len(self.scheduler)

    def submit(self, request: Request) -> int:
        number = self.scheduler.submit(request)
        self.recorder.record_submitted(self._clock(), request, number)
        return number

    def next_batch(self, max_steps: int = 1) -> ScheduledBatch | None:
        batch = self.scheduler.next_batch(max_steps)
        self._began = self._clock()
        return batch

    def complete(self, batch: ScheduledBatch, error: BaseException | None = None) -> None:
        self.recorder.record_batch(self._began, batch, self._clock() - self._began)
        self.scheduler.complete(batch, error)

    def take_finished(self) -> list[RequestOutput]:
        finished = self.scheduler.take_finished()
        for each in finished:
            self.recorder.record_finished(each)
        return finished


def batch_shape_of(batch: ScheduledBatch) -> BatchShape:
    """The sizes of a scheduled batch, for a cost model."""
    chunks = [(item.start, item.end) for item in batch.prefills]
    contexts = [item.state.num_prompt_tokens + item.state.num_output_tokens for item in batch.decodes]
    return BatchShape(chunks, contexts, batch.steps)


@dataclass(frozen=True)
class TracedCall:
    """A request of a trace.

    Attributes:
        at: seconds from the first arrival to its own.
        prompt: int32 `(tokens,)`.
        after: id of the call that it followed, and the seconds between; None: it followed none.
        took_s: seconds from its arrival to its end. stalled_s: of these, waiting for loads.
        on_device: prompt tokens that were on the device at its admission, neither loaded for it nor computed.
    """

    id: str
    at: float
    prompt: np.ndarray
    fixed_tokens: int
    agent: str | None
    workflow: str | None
    session: str | None
    client: str
    priority: float
    store_policy: StorePolicy
    max_new_tokens: int
    after: tuple[str, float] | None
    num_output_tokens: int
    took_s: float
    stalled_s: float = 0.0
    on_device: int = 0


@dataclass
class Trace:
    """The contents of a trace file.

    Attributes:
        calls: answered calls, in order of arrival.
        batches: with the seconds that each took.
        stored: fixed prompts that were cached before the first call: agent, token ids, bytes of KV.
        makespan_s: seconds from the first arrival to the last end.
    """

    bytes_per_token: int
    page_size: int
    about: dict[str, Any]
    workflows: list[WorkflowSpec] = field(default_factory=list)
    calls: list[TracedCall] = field(default_factory=list)
    batches: list[tuple[BatchShape, float]] = field(default_factory=list)
    stored: list[tuple[str, np.ndarray, int]] = field(default_factory=list)

    @property
    def makespan_s(self) -> float:
        return max((call.at + call.took_s for call in self.calls), default=0.0)


def read_trace(path: str | Path) -> Trace:
    """Reads a trace.

    Raises:
        OSError: the file cannot be opened.
        ValueError: not a trace of this version, or a line that lacks a value or has a wrong one; the message has the
            line's number.
    """
    rows = _rows(Path(path))
    head = next(rows, None)
    if not isinstance(head, _Head):
        raise ValueError(f"{path} does not begin with a line of kind 'trace' and version {TRACE_VERSION}")
    trace = Trace(head.bytes_per_token, head.page_size, dict(head.about))
    prompts: dict[int, np.ndarray] = {}
    ends: dict[str, _End] = {}
    asked: list[_Call] = []
    for row in rows:
        if isinstance(row, _Prompt):
            prompts[row.number] = row.tokens
        elif isinstance(row, _End):
            if row.outcome == "answered" and row.at is not None:
                ends[row.id] = row
        elif isinstance(row, _Call):
            asked.append(row)
        elif isinstance(row, _Workflow):
            agents = [AgentSpec(**agent) for agent in row.agents]
            trace.workflows.append(WorkflowSpec(row.name, agents, list(row.edges), list(row.start)))
        elif isinstance(row, _Stored):
            trace.stored.append((row.agent, _known(prompts, row.fixed, path), row.nbytes))
        elif isinstance(row, _Batch):
            shape = BatchShape(tuple((start, end) for start, end in row.chunks), row.contexts, row.steps)
            trace.batches.append((shape, row.seconds))
    answered = [row for row in asked if row.id in ends]
    begin = min((row.at for row in answered), default=0.0)
    trace.calls = [_call(row, ends, prompts, begin, path) for row in answered]
    return trace


@dataclass(frozen=True)
class _Head:
    """The first line."""

    version: int
    bytes_per_token: Annotated[int, Range(1, MAX_BYTES)]
    page_size: Annotated[int, Range(1, MAX_NUMBER)]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class _Prompt:
    """A fixed prompt, int32 `(tokens,)`."""

    number: int
    tokens: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _token_ids(self.tokens))


@dataclass(frozen=True)
class _Workflow:
    """A declared workflow."""

    name: Name
    agents: tuple[Mapping[str, Any], ...]
    edges: tuple[EdgeSpec, ...]
    start: tuple[Name, ...]

    def __post_init__(self) -> None:
        for agent in self.agents:
            read(AgentSpec, agent)


@dataclass(frozen=True)
class _Stored:
    """An agent's fixed prompt that was cached before the first call."""

    agent: Name
    fixed: int
    nbytes: Annotated[int, Range(0, MAX_BYTES)]


@dataclass(frozen=True)
class _Call:
    """A request, with the tokens after its fixed prompt, the call that it followed, and the seconds between."""

    at: NotNegative
    id: Name
    agent: Name | None
    workflow: Name | None
    session: Name | None
    client: str
    priority: Annotated[float, Range(0, 1)]
    keep: Literal["neutral", "discard"]
    fixed: int | None
    tokens: Any
    max_new_tokens: Annotated[int, Range(1, MAX_NUMBER)]
    after: tuple[str, NotNegative] | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _token_ids(self.tokens))


@dataclass(frozen=True)
class _Batch:
    """A batch; chunks of prompts are [start, end)."""

    seconds: NotNegative
    chunks: tuple[tuple[Tokens, Tokens], ...]
    contexts: tuple[Tokens, ...]
    steps: Annotated[int, Range(1, MAX_NUMBER)]

    def __post_init__(self) -> None:
        for start, end in self.chunks:
            if end < start:
                raise ValueError(f"got the chunk [{start}, {end}); accepted: an end that is not before the start")


@dataclass(frozen=True)
class _End:
    """The end of a request."""

    at: NotNegative | None
    id: Name
    outcome: str
    produced: Tokens
    stalled_s: NotNegative = 0.0
    cached: Tokens = 0
    loaded: Tokens = 0


_KINDS: dict[str, type] = {
    "trace": _Head, "prompt": _Prompt, "workflow": _Workflow, "stored": _Stored, "call": _Call, "batch": _Batch,
    "end": _End,
}  # fmt: skip


def _rows(path: Path) -> Iterator[Any]:
    """The lines of the known kinds, checked."""
    for number, row in json_lines(path, TRACE_LIMITS):
        where = f"line {number} of {path}"
        kind = row.get("kind") if isinstance(row, dict) else None
        if not isinstance(kind, str):
            raise ValueError(f"{where} is no object with a 'kind'")
        if kind == "trace" and row.get("version") != TRACE_VERSION:
            raise ValueError(f"{path} does not begin with a line of kind 'trace' and version {TRACE_VERSION}")
        if kind in _KINDS:
            yield read(_KINDS[kind], row, where, unknown=set())


def _token_ids(value: Any) -> np.ndarray:
    """int32 `(tokens,)`; ValueError for anything but a list of token ids."""
    found = np.asarray(value) if isinstance(value, list) and all(type(one) is int for one in value) else None
    if found is None or (len(found) and not (found.dtype.kind == "i" and found.min() >= 0 and found.max() < 2**31)):
        raise ValueError(f"got {shown(value)} as tokens; accepted: a list of token ids from 0 up to {2**31 - 1}")
    return found.astype(np.int32)


def _known(prompts: Mapping[int, np.ndarray], number: int, path: str | Path) -> np.ndarray:
    if number not in prompts or not len(prompts[number]):
        raise ValueError(f"{path} names the fixed prompt {shown(number)}, which no line before has with tokens")
    return prompts[number]


def _call(
    row: _Call, ends: Mapping[str, _End], prompts: Mapping[int, np.ndarray], begin: float, path: str | Path
) -> TracedCall:
    fixed = np.zeros(0, dtype=np.int32) if row.fixed is None else _known(prompts, row.fixed, path)
    prompt, end = np.concatenate((fixed, row.tokens)), ends[row.id]
    if not len(prompt):
        raise ValueError(f"{path} has the call {shown(row.id)} without tokens")
    assert end.at is not None, "only answered calls with an end are among them"
    return TracedCall(
        id=row.id, at=row.at - begin, prompt=prompt, fixed_tokens=len(fixed), agent=row.agent, workflow=row.workflow,
        session=row.session, client=row.client, priority=row.priority, store_policy=StorePolicy(row.keep),
        max_new_tokens=row.max_new_tokens, after=row.after if row.after is not None and row.after[0] in ends else None,
        num_output_tokens=end.produced, took_s=max(0.0, end.at - row.at), stalled_s=end.stalled_s,
        on_device=end.cached - end.loaded,
    )  # fmt: skip
