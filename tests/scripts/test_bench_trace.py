"""`tenure bench trace` on a tiny random model: what is recorded of an engine is what the simulator replays."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tenure.eviction import evict
from tenure.scripts.bench import bench_trace
from tenure.scripts.bench.agent_runs import AgentRunSetting, make_workload
from tenure.scripts.bench.bench_agents import prepared
from tenure.scripts.bench.bench_trace import TraceBenchConfig, costs_of, record, show, validate
from tenure.scripts.output import write_rows
from tenure.serving.prompt_cache import PromptKV
from tenure.serving.simulation.simulator import machine_of, replay
from tenure.serving.simulation.trace import TraceRecorder, read_trace

FIXED, SUFFIX, ANSWER = 48, 16, 4


@pytest.fixture
def session(tiny_llama):
    with evict(tiny_llama, "full") as session:
        yield session


@pytest.fixture
def workload():
    text = torch.randint(3, 128, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    return make_workload("ring", text, 2, FIXED, SUFFIX, ANSWER, 0.0, 0)


def ends(path: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: row for row in rows if row["kind"] == "end"}


@pytest.mark.parametrize("system", ["lru", "lru_reactive", "ste"])
def test_a_replay_asks_and_hits_what_the_engine_did(session, workload, system, tmp_path: Path) -> None:
    """Without a prefetch nothing depends on how fast the machine was: every request finds the same tokens."""
    rate = PromptKV(session).bytes_per_token()
    room = (4 * FIXED + FIXED + SUFFIX + ANSWER) * rate
    setting = AgentRunSetting(system, None, room, 20 * FIXED * rate, 1e9, 1e9, costs_of(100.0, 1e9))
    record(session, workload, setting, prepared(session, workload, None), tmp_path / "run.jsonl")
    trace = read_trace(tmp_path / "run.jsonl")
    assert [call.agent for call in trace.calls] == [call.agent for call in workload.calls]
    assert [tuple(call.prompt) for call in trace.calls] == [workload.prompt(call) for call in workload.calls]
    (spec,) = trace.workflows
    assert len(trace.stored) == 10 and (spec.agents, spec.edges) == (workload.spec.agents, workload.spec.edges)

    with TraceRecorder(tmp_path / "replay.jsonl", rate, trace.page_size) as recorder:
        replay(machine_of(trace), trace, system, recorder=recorder)
    first, second = ends(tmp_path / "run.jsonl"), ends(tmp_path / "replay.jsonl")
    assert first.keys() == second.keys() and len(first) == 20
    for field in ("cached", "loaded", "recomputed", "produced", "outcome"):
        assert {i: each[field] for i, each in first.items()} == {i: each[field] for i, each in second.items()}, field
    cached = sum(each["cached"] for each in first.values())
    assert (cached == 0) == (system == "lru"), "a ring never hits what is least recently used"
    assert [call.prompt.tolist() for call in read_trace(tmp_path / "replay.jsonl").calls] == [
        call.prompt.tolist() for call in trace.calls
    ]


def test_rows_are_measured_predicted_and_shown(session, workload, tmp_path: Path, capsys) -> None:
    systems = ("lru_reactive", "ste_prefetch")
    config = TraceBenchConfig(systems=systems, fixed=FIXED, suffix=SUFFIX, answer=ANSWER, bandwidth=1.0)
    rows = validate(session, workload, prepared(session, workload, None), 500.0, config, tmp_path)
    assert [(row.name, row.policy) for row in rows] == [("ring", "lru_reactive"), ("ring", "ste_prefetch")]
    for row in rows:
        assert row.off < 0.5, "a tiny model on a busy machine; the real one is within 0.15"
    assert rows[0].drift == pytest.approx(1.0, abs=0.05) and rows[0].foretold_s == rows[0].predicted_s
    assert rows[0].stall_s > 2 * rows[1].stall_s and rows[0].predicted_stall_s > 2 * rows[1].predicted_stall_s
    show(rows, config)
    write_rows(rows, str(tmp_path / "rows.json"))
    shown = capsys.readouterr().out
    assert re.search(r"ring +│ ste_prefetch", shown) and "makespan is within 15% of the measured one" in shown
    assert json.loads((tmp_path / "rows.json").read_text())[1]["policy"] == "ste_prefetch"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounds": 0}, "accept 1 or more"),
        ({"systems": ("belady",)}, "got belady; --workflows accepts ring, branching, --systems lru, lru_reactive"),
        ({"workflows": ()}, "got an empty list"),
        ({"pool": 1.5}, "got --pool 1.5 and --bandwidth 60.0; accepted: a share above 0 and up to 1"),
    ],
)
def test_what_cannot_be_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_trace.TraceBenchConfig(**values)
