"""`tenure bench engine` on a tiny random model: its rows, what its counts see, and what it refuses."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from tenure.eviction import evict
from tenure.retention import RetentionGates
from tenure.scripts.bench import engine_counts, engine_speed
from tenure.scripts.bench.bench_engine import ROWS, EngineBenchConfig, measure
from tenure.scripts.bench.engine_runs import QUICK, EngineBench

NAMES = [
    "decode/b4/ctx24/vs_generate",
    "decode/b4/ctx256/kept20/vs_generate",
    "join/b4/ctx256",
    "memory/held_vs_counted",
    "memory/held_vs_counted/compressed",
    "prefill/8x16/vs_one_by_one",
    "fanout/4x128/computed_vs_needed",
    "fanout/4x128/computed_vs_needed/compressed",
    "retry/computed_vs_needed",
    "overcommit/1024/vs_32",
    "conversation/compressed/computed_vs_plain",
    "submit/event_loop/p99",
]


@pytest.fixture
def gates(tiny_llama):
    torch.manual_seed(1)
    return RetentionGates.for_model(tiny_llama, gate_width=8, init_std=0.5, initial_bias=2.0)


@pytest.fixture
def bench(tiny_llama, gates):
    with evict(tiny_llama, "full", gates=gates, observe=["retention"]) as session:
        yield EngineBench(session, tiny_llama, QUICK, 1, 0)


def test_the_rows_have_the_names_others_read(tiny_llama, gates):
    before = tiny_llama.config.max_position_embeddings
    rows = measure(tiny_llama, gates, EngineBenchConfig(runs=1, quick=True))
    assert [row.name for row in rows] == NAMES
    assert all(row.ours > 0 and row.target and row.n for row in rows if row.name != "join/b4/ctx256")
    ratios = {row.name: row.ratio for row in rows}
    assert ratios["fanout/4x128/computed_vs_needed"] == 1.0, "the common prompt is computed once"
    assert ratios["fanout/4x128/computed_vs_needed/compressed"] == 1.0
    assert ratios["retry/computed_vs_needed"] <= 1.1
    assert ratios["conversation/compressed/computed_vs_plain"] <= 1.1
    assert tiny_llama.config.max_position_embeddings == before


def test_a_row_alone_is_measured(tiny_llama, gates):
    (row,) = measure(tiny_llama, gates, EngineBenchConfig(runs=1, quick=True, only=("retry",), seed=3))
    assert row.name == "retry/computed_vs_needed" and row.ours >= row.peer == QUICK.retried  # pyright: ignore


def test_memory_that_nobody_counts_is_seen(bench, monkeypatch):
    """A copy of a prompt's KV that is kept beside the pool shows in the row."""
    bench.sizes = replace(QUICK, context=448)
    plain, compressed = engine_counts.memory_rows(bench)
    assert 0 < plain.ratio < 1.2 and compressed.peer < plain.peer  # pyright: ignore[reportOperatorIssue]
    copies = []

    def step(engine):
        copies.append(engine.pages.read(engine.pages.allocate(8).numbers))
        return real(engine)

    real = engine_counts.step
    monkeypatch.setattr(engine_counts, "step", step)
    wasted, _ = engine_counts.memory_rows(bench)
    assert wasted.ratio > plain.ratio + 0.05


def test_the_peer_decodes_from_the_same_context(tiny_llama, monkeypatch):
    """`generate` goes on from a cache of the prompt's length, again in the next run, and gives every token."""
    lengths, real = [], tiny_llama.model.forward

    def forward(*args, **kwargs):
        lengths.append(kwargs["past_key_values"].get_seq_length() + kwargs["input_ids"].shape[1])
        return real(*args, **kwargs)

    monkeypatch.setattr(tiny_llama.model, "forward", forward)
    peer = engine_speed.Generating(tiny_llama, [[3] * 32, [4] * 32], 3, filled=True)
    for _ in range(2):
        assert peer.speed(time.perf_counter) > 0
    assert lengths == [33, 34, 35] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threads": 0}, "got --threads 0 --runs 5; accepted: 1 or more"),
        ({"kept": 1.0}, "got --kept 1.0; accepted: a number between 0 and 1"),
        ({"only": ("decoding",)}, "got --only decoding; accepted: decode, join, memory"),
        ({"cpu_time": True, "threads": 2}, "got --cpu-time with --threads 2; accepted: --threads 1"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EngineBenchConfig(**values)


def test_all_rows_are_measured_by_default():
    assert EngineBenchConfig().only == tuple(ROWS)
