"""Recorded traces are read back, and a replay gives the original's numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tenure.serving import Request
from tenure.serving.simulation.simulator import machine_of, replay, simulate
from tenure.serving.simulation.trace import RecordingScheduler, TraceRecorder, read_trace
from tenure.serving.simulation.workload import Distribution, clients_of


@pytest.fixture
def recorded(small, tmp_path: Path):
    machine = small.machine(4)
    about = {
        "device_bytes": machine.device_bytes,
        "host_bytes": machine.host_bytes,
        "link_bytes_per_s": machine.links.host_bytes_per_s,
        "scheduler": {"max_num_seqs": 1, "max_num_batched_tokens": 256},
    }
    path = tmp_path / "trace.jsonl"
    workload = small.workload(rounds=3, tool_s=Distribution(0.05, "exponential"))
    with TraceRecorder(path, machine.bytes_per_token, machine.page_size, about) as recorder:
        outcome = simulate(machine, workload, "ste_prefetch", 0, recorder=recorder)
    return path, outcome, workload


def test_a_trace_has_all_of_a_run(recorded) -> None:
    path, outcome, workload = recorded
    trace = read_trace(path)
    assert len(trace.calls) == 40 and outcome.calls == 30  # the warm-up's, too
    assert len(trace.workflows) == 1 and len(trace.workflows[0].agents) == 10
    assert sum(end - start for batch, _ in trace.batches for start, end in batch.chunks) == 640 + 30 * 16
    first = next(call for call in trace.calls if call.workflow)
    (client,) = clients_of(workload, 0)
    assert np.array_equal(first.prompt, client.first_call().prompt) and first.fixed_tokens == 64
    assert first.after is None and trace.calls[-1].after is not None
    assert path.read_text().count('"kind":"prompt"') == 10, "a fixed prompt is written once"


def test_a_replay_on_the_fitted_machine_takes_as_long(recorded) -> None:
    """The rates come back from the batches, and each call follows the one it followed."""
    trace = read_trace(recorded[0])
    machine = machine_of(trace)
    again = replay(machine, trace, "ste_prefetch")
    assert again.makespan_s == pytest.approx(trace.makespan_s, rel=0.04)  # the graph is known from the beginning
    slower = replay(machine, trace, "lru")
    assert slower.makespan_s > 1.2 * again.makespan_s and slower.hit_rate == 0.0
    opened = replay(machine, trace, "lru", closed=False)
    assert opened.calls == again.calls == 40


def test_any_driver_can_record(small, tmp_path: Path) -> None:
    """An engine is handed a system whose scheduler records."""
    machine = small.machine(4)
    system, clock = machine.build("lru_reactive")
    with TraceRecorder(tmp_path / "t.jsonl", machine.bytes_per_token, machine.page_size) as recorder:
        recorder.record_stored("a", np.arange(64), 64_000)
        watched = dataclasses.replace(system, scheduler=RecordingScheduler(system.scheduler, recorder))
        watched.scheduler.submit(Request("one", list(range(40)), 2, session="s"))
        while (batch := watched.scheduler.next_batch()) is not None:
            clock.advance_to(clock.now + 0.5)
            watched.scheduler.complete(batch)
        (ended,) = watched.scheduler.take_finished()
    trace = read_trace(tmp_path / "t.jsonl")
    assert ended.num_output_tokens == trace.calls[0].num_output_tokens == 2
    assert [seconds for _, seconds in trace.batches] == [0.5, 0.5]
    assert trace.stored[0][0] == "a" and trace.stored[0][2] == 64_000
    assert replay(machine, trace, "ste").calls == 1


def test_what_is_stored_before_is_there(small, tmp_path: Path) -> None:
    prompt = np.arange(64, dtype=np.int32)
    with TraceRecorder(tmp_path / "t.jsonl", 1000, 16) as recorder:
        recorder.record_stored("a", prompt, 64_000)
        recorder.record_submitted(0.0, Request("one", [*range(64), 7], 1, agent="a", fixed_tokens=64))
        recorder._write("end", id="one", at=1.0, outcome="answered", produced=1)
    assert replay(small.machine(4), read_trace(tmp_path / "t.jsonl"), "lru_reactive").hit_rate == 1.0


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"kind":"trace","version":9}\n')
    with pytest.raises(ValueError, match="does not begin with a line of kind 'trace' and version 1"):
        read_trace(path)
    path.write_text('{"kind":"trace","version":1,\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is not JSON"):
        read_trace(path)
    path.write_text('{"kind":"trace","version":1}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*: the document lacks bytes_per_token, page_size, about"):
        read_trace(path)
    head = {"kind": "trace", "version": 1, "bytes_per_token": 1, "page_size": 1, "about": {"by": "me"}}
    path.write_text(json.dumps(head) + "\n[]\n")
    with pytest.raises(ValueError, match=r"line 2 of .* is no object with a 'kind'"):
        read_trace(path)
    path.write_text(json.dumps(head) + "\n")
    with pytest.raises(ValueError, match=r"does not say on which machine it was recorded .*: name a set-up"):
        machine_of(read_trace(path))
