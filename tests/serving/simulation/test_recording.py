"""The lines that a recorder writes, and the replay of calls that follow each other."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from tenure.serving import AgentSpec, EdgeSpec, Request, StorePolicy, Tier, WorkflowSpec
from tenure.serving.simulation.simulator import machine_of, replay, simulate
from tenure.serving.simulation.trace import RecordingScheduler, TraceRecorder, read_trace
from tenure.serving.simulation.workload import Distribution


def lines(path: Path, kind: str) -> list[dict]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == kind]


def serve(small, requests: list[Request], path: Path, batch_s: float = 0.5, gap_s: float = 0.25, **about) -> None:
    """Each request when the one before is over and `gap_s` have passed; every piece of batch takes `batch_s`."""
    machine = small.machine(4)
    system, clock = machine.build("lru_reactive")
    with TraceRecorder(path, machine.bytes_per_token, machine.page_size, about) as recorder:
        scheduler = RecordingScheduler(system.scheduler, recorder)
        for request in requests:
            scheduler.submit(request)
            while len(scheduler):
                batch = scheduler.next_batch()
                assert batch is not None, "one request at a time never waits for copies here"
                clock.advance_to(clock.now + batch_s)
                scheduler.complete(batch)
            scheduler.take_finished()
            clock.advance_to(clock.now + gap_s)


def test_calls_of_a_workflow_or_session_follow_each_other_and_others_do_not(small, tmp_path: Path) -> None:
    prompt = list(range(20))
    requests = [
        Request("a", prompt, 1, session="one"),
        Request("b", prompt, 2, session="two"),
        Request("c", prompt, 1, session="one", store_policy=StorePolicy.DISCARD, priority=0.75, client="me"),
        Request("d", prompt, 1),
    ]
    serve(small, requests, tmp_path / "t.jsonl")
    calls = {row["id"]: row for row in lines(tmp_path / "t.jsonl", "call")}
    assert [calls[name]["after"] for name in "abd"] == [None, None, None]
    # b: 0.25 s after the end of a, then two pieces of batch; c: another 0.25 s later
    assert calls["c"]["after"] == ["a", pytest.approx(0.25 + 2 * 0.5 + 0.25)]
    assert (calls["c"]["keep"], calls["c"]["priority"], calls["c"]["client"]) == ("discard", 0.75, "me")
    assert [call.after for call in read_trace(tmp_path / "t.jsonl").calls if call.id == "c"] == [("a", 1.5)]


def test_a_replay_keeps_the_gaps_and_not_the_times(small, tmp_path: Path) -> None:
    """On a machine that is ten times as fast, a session of three calls takes a tenth of its computing and all gaps."""
    requests = [Request(f"r{n}", list(range(32)), 4, session="s") for n in range(3)]
    serve(small, requests, tmp_path / "t.jsonl")
    trace = read_trace(tmp_path / "t.jsonl")
    assert trace.makespan_s == pytest.approx(3 * 4 * 0.5 + 2 * 0.25)
    fast = small.machine(4)
    prefill, token = fast.costs.recompute_s(0, 32), 0.005
    outcome = replay(fast, trace, "lru")
    again = 2 * (fast.costs.recompute_s(16, 32) + 3 * token)  # of the prompt's two pages the last is computed anew
    assert outcome.makespan_s == pytest.approx(prefill + 3 * token + again + 2 * 0.25)
    opened = replay(fast, trace, "lru", closed=False)
    assert opened.makespan_s > 2 * (4 * 0.5 + 0.25), "as they came then"


def test_labels_that_are_used_again_are_told_apart(small, tmp_path: Path) -> None:
    machine = small.machine(4)
    system, clock = machine.build("lru")
    path = tmp_path / "t.jsonl"
    with TraceRecorder(path, 1000, 16) as recorder:
        scheduler = RecordingScheduler(system.scheduler, recorder)
        for first in (1, 2):
            scheduler.submit(Request("r", [first] * 20, 1, session="s"))
            batch = scheduler.next_batch()
            clock.advance_to(clock() + 1.0)
            scheduler.complete(batch)  # pyright: ignore[reportArgumentType]
            scheduler.take_finished()
    one, other = read_trace(path).calls
    assert (one.id, other.id, other.after) == ("r", "r#2", ("r", 0.0))
    assert (one.prompt[0], other.prompt[0]) == (1, 2)


def test_answers_that_failed_are_left_out_and_their_followers_come_by_themselves(small, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with TraceRecorder(path, 1000, 16) as recorder:
        for number, outcome in enumerate(("cancelled", "answered")):
            recorder.record_submitted(float(number), Request(f"r{number}", [1, 2, 3], 2, session="s"))
            recorder._last["s"] = (f"r{number}", float(number) + 0.5)
            recorder._write("end", id=f"r{number}", at=number + 0.5, outcome=outcome, produced=2, stalled_s=0.25)
    (call,) = read_trace(path).calls
    assert call.id == "r1" and call.after is None and call.at == 0.0
    assert call.stalled_s == 0.25 and call.took_s == 0.5


def test_workflows_are_written_as_they_were_declared(tmp_path: Path) -> None:
    agents = [AgentSpec("a", call_s=2.0), AgentSpec("b", join="and", pause_s=1.0, pause_spread_s=0.5)]
    spec = WorkflowSpec("report", agents, [EdgeSpec("a", "b", 0.5)], ["a"])
    with TraceRecorder(tmp_path / "t.jsonl", 1000, 16) as recorder:
        recorder.record_workflow(1.5, spec)
        recorder.record_workflow(2.5, spec, "report/2")
    first, second = read_trace(tmp_path / "t.jsonl").workflows
    assert (first, second.name) == (spec, "report/2")
    assert [row["at"] for row in lines(tmp_path / "t.jsonl", "workflow")] == [1.5, 2.5]


def test_threads_may_record_at_once(tmp_path: Path) -> None:
    """No line is torn, and a fixed prompt that all of them bring is written once, before the first that names it."""
    path = tmp_path / "t.jsonl"
    with TraceRecorder(path, 1000, 16) as recorder:

        def client(name: str) -> None:
            for number in range(50):
                prompt = np.arange(200 + number)
                recorder.record_submitted(0.0, Request(f"{name}{number}", prompt, 1, agent="a", fixed_tokens=160))

        threads = [threading.Thread(target=client, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("call") == 200 and kinds.count("prompt") == 1
    assert kinds.index("prompt") < kinds.index("call")
    assert all(row["fixed"] == 0 and len(row["tokens"]) >= 40 for row in rows if row["kind"] == "call")


def test_a_fitted_machine_needs_enough_batches_and_keeps_what_about_says(small, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    serve(small, [Request("a", list(range(20)), 3)], few, device_bytes=10**6)
    with pytest.raises(ValueError, match="got 3 measured batches; accepted: 8 or more"):
        machine_of(read_trace(few))
    about = {"device_bytes": 10**6, "host_bytes": 10**7, "link_bytes_per_s": 5e6, "latency_s": 0.001, "copy_parts": 7,
             "limits": {"running": 3}}  # fmt: skip
    serve(small, [Request("a", list(range(20)), 20)], tmp_path / "t.jsonl", **about)
    machine = machine_of(read_trace(tmp_path / "t.jsonl"))
    assert (machine.device_bytes, machine.host_bytes) == (10**6, 10**7)
    assert (machine.copy_parts, machine.scheduler.max_num_seqs) == (7, 3)
    assert machine.links.reload_s(5_000_000, Tier.DEVICE) == pytest.approx(1.001)
    assert machine.costs.recompute_s(0, 20) == pytest.approx(0.5, rel=0.01)


def test_recording_changes_nothing(small, tmp_path: Path) -> None:
    workload = small.workload(workflows=2, agents=4, rounds=3, tool_s=Distribution(0.1, "exponential"))
    plain = simulate(small.machine(3, running=2), workload, "expected_time")
    with TraceRecorder(tmp_path / "t.jsonl", 1000, 16) as recorder:
        recorded = simulate(small.machine(3, running=2), workload, "expected_time", recorder=recorder)
    assert plain.makespan_s == recorded.makespan_s and plain.events == recorded.events
