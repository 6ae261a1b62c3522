"""Records traces of any driver of a scheduler, an engine or a simulation: one JSON object a line.

docs/simulator.md describes the format. A call says after which other call of its workflow it came, and how long after
that one's end, so that a replay is as closed a loop as the original was: a faster server is asked sooner.

Traces as they are read: what was asked of a server, and what it did. docs/simulator.md describes the format.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..workflow.spec import AgentSpec, EdgeSpec, WorkflowSpec
from .cost_model import Batch

if TYPE_CHECKING:
    from ..request import Ended, Request
    from ..scheduler.request_state import Work
    from ..scheduler.scheduler import Scheduler


VERSION = 1


class TraceRecorder:
    """Writes a trace. Whoever drives a scheduler drives a `RecordedScheduler` instead, or calls this; from any thread.

    Args:
        path: of the file, which is written anew.
        bytes_per_token: KV of a token that is computed.
        page_size: tokens a page.
        about: what else should be known, in strings, numbers, lists and mappings of these. `machine_of` reads
            `device_bytes`, `host_bytes`, `disk_bytes`, `link_bytes_per_s`, `disk_bytes_per_s`, `latency_s`,
            `copy_parts`, `limits` and `believed`: tokens/s, bytes/s of the two links, and latency in seconds that the
            server was told (`LinearCosts`), for it chose by them.
    """

    def __init__(self, path: str | Path, bytes_per_token: int, page_size: int, about: dict[str, Any] | None = None):
        self._file: IO[str] = open(path, "w", encoding="utf-8")  # noqa: SIM115  # closed by `close`
        self._lock = threading.RLock()
        self._prompts: dict[bytes, int] = {}
        self._last: dict[str, tuple[str, float]] = {}
        self._write("trace", version=VERSION, bytes_per_token=bytes_per_token, page_size=page_size, about=about or {})

    def __enter__(self) -> TraceRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def workflow(self, at: float, spec: WorkflowSpec, name: str | None = None) -> None:
        """A workflow was declared, under `name` if that is another one than its own."""
        agents = [{key: value for key, value in vars(agent).items() if value is not None} for agent in spec.agents]
        edges = [[edge.source, edge.target, edge.probability] for edge in spec.edges]
        self._write("workflow", at=at, name=name or spec.name, agents=agents, edges=edges, start=list(spec.start))

    def stored(self, agent: str, prompt: Any, nbytes: int) -> None:
        """An agent's fixed prompt, whose KV takes so many bytes, is in the tiers before the first call."""
        with self._lock:
            number = self._fixed(np.asarray(prompt, dtype=np.int32).reshape(-1))
            self._write("stored", agent=agent, fixed=number, nbytes=nbytes)

    def submitted(self, at: float, request: Request) -> None:
        """`request` has arrived."""
        prompt = np.asarray(request.prompt, dtype=np.int32).reshape(-1)
        fixed = min(request.fixed_tokens, len(prompt))
        group = request.workflow or request.session
        with self._lock:
            before = self._last.get(group) if group is not None else None
            number = self._fixed(prompt[:fixed]) if fixed else None
        self._write(
            "call",
            at=at,
            id=request.id,
            agent=request.agent,
            workflow=request.workflow,
            session=request.session,
            client=request.client,
            priority=request.priority,
            keep=request.keep.value,
            fixed=number,
            tokens=prompt[fixed:].tolist(),
            max_new_tokens=request.max_new_tokens,
            after=None if before is None else [before[0], max(0.0, at - before[1])],
        )

    def computed(self, at: float, work: Work, seconds: float) -> None:
        """`work` began at `at` and took so many seconds; to be called before the scheduler's `complete`."""
        batch = batch_of(work)
        self._write(
            "batch",
            at=at,
            seconds=seconds,
            chunks=[list(chunk) for chunk in batch.chunks],
            contexts=list(batch.contexts),
            steps=batch.steps,
        )

    def ended(self, ended: Ended) -> None:
        """A request is over."""
        request, times = ended.request, ended.times
        group = request.workflow or request.session
        if group is not None and times.ended is not None:
            with self._lock:
                self._last[group] = (request.id, times.ended)
        self._write(
            "end",
            at=times.ended,
            id=request.id,
            outcome=ended.outcome.value,
            arrived=times.arrived,
            admitted=times.admitted,
            first_token=times.first_token,
            produced=ended.produced,
            stalled_s=ended.stalled_s,
            cached=ended.cached_tokens,
            loaded=ended.loaded_tokens,
            recomputed=ended.recomputed_tokens,
        )

    def _fixed(self, tokens: np.ndarray) -> int:
        """The number of a fixed prompt, which is written once."""
        key = tokens.tobytes()
        if key not in self._prompts:
            self._prompts[key] = len(self._prompts)
            self._write("prompt", number=self._prompts[key], tokens=tokens.tolist())
        return self._prompts[key]

    def _write(self, kind: str, **values: Any) -> None:
        line = json.dumps({"kind": kind, **values}, separators=(",", ":"))
        with self._lock:
            self._file.write(line + "\n")


class RecordedScheduler:
    """A scheduler whose calls are recorded; everything else is the scheduler's own.

    `dataclasses.replace(system, scheduler=RecordedScheduler(system.scheduler, recorder))` gives an engine one.
    """

    def __init__(self, scheduler: Scheduler, recorder: TraceRecorder) -> None:
        self.scheduler, self.recorder = scheduler, recorder
        self._clock = scheduler.tiers.clock
        self._began = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def __len__(self) -> int:
        return len(self.scheduler)

    def submit(self, request: Request) -> None:
        self.scheduler.submit(request)
        self.recorder.submitted(self._clock(), request)

    def next_work(self, max_steps: int = 1) -> Work | None:
        work = self.scheduler.next_work(max_steps)
        self._began = self._clock()
        return work

    def complete(self, work: Work, error: BaseException | None = None) -> None:
        self.recorder.computed(self._began, work, self._clock() - self._began)
        self.scheduler.complete(work, error)

    def take_ended(self) -> list[Ended]:
        ended = self.scheduler.take_ended()
        for each in ended:
            self.recorder.ended(each)
        return ended


def batch_of(work: Work) -> Batch:
    """What a piece of work computes, for a cost model."""
    chunks: Sequence[tuple[int, int]] = [(item.start, item.end) for item in work.prefills]
    contexts = [item.entry.size + item.entry.produced for item in work.decodes]
    return Batch(chunks, contexts, work.steps)


@dataclass(frozen=True)
class TracedCall:
    """A request of a trace.

    Attributes:
        at: seconds since the first one.
        prompt: int32 `(tokens,)`.
        after: the id of the call it followed and the seconds between; None: it came by itself.
        produced: tokens of its answer.
        took_s: from its arrival to its end. stalled_s: of these, waiting for copies.
        on_device: tokens of the prompt that were there when it came up, neither loaded for it nor computed.
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
    keep: str
    max_new_tokens: int
    after: tuple[str, float] | None
    produced: int
    took_s: float
    stalled_s: float = 0.0
    on_device: int = 0


@dataclass
class Trace:
    """A trace that was read.

    Attributes:
        workflows: as declared. calls: in the order of arrival, answered ones only. batches: with their seconds.
        stored: agents' fixed prompts that were there before the first call, with the bytes of their KV.
        makespan_s: from the first arrival to the last end.
    """

    bytes_per_token: int
    page_size: int
    about: dict[str, Any]
    workflows: list[WorkflowSpec] = field(default_factory=list)
    calls: list[TracedCall] = field(default_factory=list)
    batches: list[tuple[Batch, float]] = field(default_factory=list)
    stored: list[tuple[str, np.ndarray, int]] = field(default_factory=list)

    @property
    def makespan_s(self) -> float:
        return max((call.at + call.took_s for call in self.calls), default=0.0)


def read_trace(path: str | Path) -> Trace:
    """Raises ValueError, with the line's number, for what is not a trace of this version."""
    rows = list(_rows(Path(path)))
    if not rows or rows[0].get("kind") != "trace" or rows[0].get("version") != VERSION:
        raise ValueError(f"{path} does not begin with a line of kind 'trace' and version {VERSION}")
    head = rows[0]
    trace = Trace(head["bytes_per_token"], head["page_size"], head["about"])
    prompts = {row["number"]: np.array(row["tokens"], dtype=np.int32) for row in rows if row["kind"] == "prompt"}
    ends = {row["id"]: row for row in rows if row["kind"] == "end" and row["outcome"] == "answered"}
    asked = [row for row in rows if row["kind"] == "call" and row["id"] in ends]
    begin = min((row["at"] for row in asked), default=0.0)
    for row in asked:
        trace.calls.append(_call(row, ends[row["id"]], prompts, begin, ends))
    for row in rows:
        if row["kind"] == "workflow":
            agents = [AgentSpec(**agent) for agent in row["agents"]]
            edges = [EdgeSpec(*edge) for edge in row["edges"]]
            trace.workflows.append(WorkflowSpec(row["name"], agents, edges, row["start"]))
        elif row["kind"] == "stored":
            trace.stored.append((row["agent"], prompts[row["fixed"]], row["nbytes"]))
        elif row["kind"] == "batch":
            chunks = tuple((start, end) for start, end in row["chunks"])
            trace.batches.append((Batch(chunks, tuple(row["contexts"]), row["steps"]), row["seconds"]))
    return trace


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
            if not isinstance(row, dict) or "kind" not in row:
                raise ValueError(f"line {number} of {path} is no object with a 'kind'")
            yield row


def _call(row: dict, end: dict, prompts: dict[int, np.ndarray], begin: float, known: dict) -> TracedCall:
    fixed = prompts[row["fixed"]] if row["fixed"] is not None else np.zeros(0, dtype=np.int32)
    after = row["after"]
    return TracedCall(
        id=row["id"],
        at=row["at"] - begin,
        prompt=np.concatenate((fixed, np.array(row["tokens"], dtype=np.int32))),
        fixed_tokens=len(fixed),
        agent=row["agent"],
        workflow=row["workflow"],
        session=row["session"],
        client=row["client"],
        priority=row["priority"],
        keep=row["keep"],
        max_new_tokens=row["max_new_tokens"],
        after=(after[0], after[1]) if after is not None and after[0] in known else None,
        produced=end["produced"],
        took_s=end["at"] - row["at"],
        stalled_s=end.get("stalled_s", 0.0),
        on_device=end.get("cached", 0) - end.get("loaded", 0),
    )
