"""`tenure bench decode` and `bench prefill`: rows on a tiny model, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tenure.eviction import evict
from tenure.retention import RetentionGates
from tenure.scripts.bench import bench_decode, bench_prefill
from tenure.scripts.bench.bench_decode import DecodePoint, PromptStates, decode_row, kvpress_decoder


@pytest.fixture
def gates(tiny_llama):
    torch.manual_seed(1)
    return RetentionGates.for_model(tiny_llama, gate_width=8, init_std=0.5, initial_bias=2.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decode_row(tiny_llama, gates, dtype):
    prompts = torch.randint(3, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    config = bench_decode.DecodeBenchConfig(runs=1, decode_tokens=2)
    row = decode_row(tiny_llama, gates, prompts, DecodePoint(50, 2, dtype, 1.5), config)
    assert row.name == ("decode/ctx50/b2/fp32" if dtype == "float32" else "decode/ctx50/b2")
    assert row.ours > 0 and row.peer and row.ratio > 0
    assert next(tiny_llama.parameters()).dtype == torch.float32, "the caller's model stays as it is"


@torch.no_grad()
def test_a_converted_prompt_is_that_of_a_real_forward(tiny_llama, gates):
    """Written into an empty cache it gives the entries and the next logits of a prompt that the model read there."""
    ids = torch.randint(3, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    prompt = PromptStates.read(tiny_llama, gates, ids)
    plain = prompt.plain(tiny_llama.config, torch.float32)
    expected = tiny_llama(ids[:, -1:], past_key_values=plain).logits
    with evict(tiny_llama, "retention", 0.5, gates=gates) as session:
        real, written = session.new_cache(), prompt.evicted(session, torch.float32)
        tiny_llama(ids, past_key_values=real)
        assert [one.tolist() for one in real.kept(1)[0]] == [one.tolist() for one in written.kept(1)[0]]
        both = [tiny_llama(ids[:, -1:], past_key_values=cache).logits for cache in (real, written)]
    torch.testing.assert_close(*both)
    assert not torch.allclose(both[0], expected)


def test_prefill_rows_have_the_names_others_read(tiny_llama, gates):
    ids = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(0))
    config = bench_prefill.PrefillBenchConfig(runs=2)
    rows = bench_prefill.time_rows(tiny_llama, gates, ids, config, bench_prefill.score_rows)
    rows += bench_prefill.time_rows(tiny_llama, gates, ids, config, bench_prefill.evict_rows)
    rows.append(bench_prefill.bytes_row(tiny_llama, gates, ids, 0.5))
    assert [row.name for row in rows] == [
        "score/retention/ctx60",
        "score/defensive/ctx60",
        "score/snapkv/ctx60",
        "evict/ctx60",
        "evict/ctx60/defensive",
        "evict/ctx60/snapkv",
        "bytes/overhead",
    ]
    assert all(row.ours > 0 and row.peer and row.ratio == pytest.approx(row.ours / row.peer, rel=0.5) for row in rows)
    assert 1 <= rows[-1].ratio <= 1.08


def test_a_python_without_kvpress_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setattr("tenure.training.assets.resolve_model", lambda name: Path(name))
    config = bench_decode.DecodeBenchConfig(model="no-model", kvpress_python=Path(sys.executable))
    decoder = kvpress_decoder(torch.ones(1, 4, dtype=torch.long), config)
    with pytest.raises(ValueError, match=r"--kvpress-python .* could not run kvpress: ModuleNotFoundError"), decoder:
        pass


@pytest.mark.parametrize("config", [bench_decode.DecodeBenchConfig, bench_prefill.PrefillBenchConfig])
def test_wrong_numbers_are_refused(config):
    with pytest.raises(ValueError, match="--threads"):
        config(threads=0)
    with pytest.raises(ValueError, match=r"--share accepts a number between 0 and 1, got 1\.5"):
        config(share=1.5)
