"""Records traces of any driver of a scheduler, an engine or a simulation: one JSON object a line.

docs/simulator.md describes the format. A call says after which other call of its workflow it came, and how long after
that one's end, so that a replay is as closed a loop as the original was: a faster server is asked sooner.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..spec import WorkflowSpec
from .costs import Batch

if TYPE_CHECKING:
    from ..scheduling.request import Ended, Request
    from ..scheduling.scheduler import Scheduler
    from ..scheduling.work import Work

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
