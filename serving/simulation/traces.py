"""Traces as they are read: what was asked of a server, and what it did. docs/simulator.md describes the format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..spec import AgentSpec, EdgeSpec, WorkflowSpec
from .costs import Batch
from .recording import VERSION


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
