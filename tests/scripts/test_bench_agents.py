"""`tenure bench agents` on a tiny random model: its rows, its table, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tenure.eviction import evict
from tenure.retention import RetentionGates
from tenure.scripts.bench.agent_runs import make_workload
from tenure.scripts.bench.bench_agents import AgentsBenchConfig, compare, write
from tenure.serving.simulation.results import SimulationRow

FIXED, SUFFIX, ANSWER = 48, 16, 4


@pytest.fixture
def session(tiny_llama):
    torch.manual_seed(1)
    gates = RetentionGates.for_model(tiny_llama, gate_width=8, init_std=0.5, initial_bias=2.0)
    with evict(tiny_llama, "full", gates=gates, observe=["retention"]) as session:
        yield session


def test_rows_of_systems_with_and_without_compression(session, tmp_path: Path, capsys) -> None:
    """A ring of ten with room for half of the prompts: LRU hits nothing; at a quarter of their KV all of them fit."""
    text = torch.randint(3, 128, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    turns = [make_workload("ring", text, 2, FIXED, SUFFIX, ANSWER, 0.0, turn) for turn in range(2)]
    systems = ("lru", "lru_reactive", "ste_prefetch")
    config = AgentsBenchConfig(systems=systems, fixed=FIXED, suffix=SUFFIX, answer=ANSWER, bandwidth=20.0, runs=2)
    rows = {row["policy"]: row for row in compare(session, turns, 0.5, config)}
    assert list(rows) == [*systems, *(f"{system}+25%" for system in systems)]
    assert rows["lru_reactive"]["ratio"] == 1.0 and rows["lru"]["bytes_moved"] == 0
    assert rows["lru"]["hit_rate"] == rows["lru_reactive"]["hit_rate"] == 0.0
    assert rows["lru_reactive"]["bytes_moved"] > 0 and rows["lru_reactive"]["stall_s"] > 0
    assert rows["lru_reactive+25%"]["hit_rate"] > 0.5 and rows["lru_reactive+25%"]["bytes_moved"] == 0
    assert rows["lru+25%"]["agents_fit"] >= 10 > rows["lru"]["agents_fit"]
    assert all(row["ttft_p50_s"] <= row["ttft_p99_s"] < row["makespan_s"] for row in rows.values())
    assert "ring, pool 50% of the prompts" in capsys.readouterr().out
    write(list(rows.values()), tmp_path / "new" / "rows.json")
    written = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert [set(row) for row in written] == [{field.name for field in fields(SimulationRow)}] * 6
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"runs": 0}, "accept 1 or more"),
        ({"systems": ("fifo",)}, "got fifo; --workflows accepts ring, branching, --systems lru, "),
        ({"keep": (0.0,)}, r"--keep accepts numbers above 0 and up to 1, got \(0.0,\)"),
        ({"wrong": (2.0,)}, "--wrong accepts numbers from 0 to 1"),
        ({"bandwidth": 0.0}, "--bandwidth accepts MB/s above 0, got 0.0"),
    ],
)
def test_what_cannot_be_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AgentsBenchConfig(**values)
