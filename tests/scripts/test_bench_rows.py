"""`tenure bench decode` and `bench prefill`: rows on a tiny model, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tenure.eviction import evict
from tenure.retention import RetentionGates
from tenure.scripts.bench import bench_decode, bench_prefill
from tenure.scripts.bench.bench_decode import DecodePoint, PromptStates, decode_rows, kvpress_decoder, split_prompts


@pytest.fixture
def gates(tiny_llama):
    torch.manual_seed(1)
    return RetentionGates.for_model(tiny_llama, gate_width=8, init_std=0.5, initial_bias=2.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_rows(tiny_llama, gates, monkeypatch, dtype):
    monkeypatch.setattr(bench_decode, "READ_BYTES", 2**20)
    ids = torch.randint(3, 128, (2, 50), generator=torch.Generator().manual_seed(0))
    config = bench_decode.DecodeBenchConfig(runs=3, decode_tokens=2)
    prompt = PromptStates.read(tiny_llama, gates, ids)
    plain, floor = decode_rows(tiny_llama, gates, prompt, DecodePoint(50, 2, dtype, 1.5), config)
    name = "decode/ctx50/b2/fp32" if dtype == "float32" else "decode/ctx50/b2"
    assert (plain.name, floor.name) == (name, f"{name}/of_floor")
    assert plain.target == ">= 1.5 times the speed" and floor.target == ">= 0.9 of the floor's speed"
    for row in (plain, floor):
        assert row.ours > 0 and row.peer and row.ratio > 0 and row.n == 3
    assert plain.ours == floor.ours, "both rows are of one run"
    assert next(tiny_llama.parameters()).dtype == torch.float32, "the caller's model stays as it is"


def test_the_floor_is_a_step_from_an_empty_cache_and_reading_what_is_kept(tiny_llama, gates, monkeypatch):
    """Ours takes 3 s, the full cache 8 s, an empty one 2 s; 2^14 bytes are read in 1 s, what is kept twice."""
    monkeypatch.setattr(bench_decode, "READ_BYTES", 2**14)
    taken = {"ours": 3.0, "peer": 8.0, "empty": 2.0, "read": 1.0}
    monkeypatch.setattr(bench_decode, "alternate", lambda sides, runs: {side: [taken[side]] * runs for side in sides})
    ids = torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(0))
    config = bench_decode.DecodeBenchConfig(share=0.25, runs=2, decode_tokens=2)
    prompt = PromptStates.read(tiny_llama, gates, ids)
    plain, floor = decode_rows(tiny_llama, gates, prompt.batched(4), DecodePoint(64, 4, "float32"), config)
    layers, heads, dim = (len(prompt.keys), *prompt.keys[0].shape[1::2])
    kept = 4 * layers * heads * 16 * 2 * dim * 4  # rows, layers, heads, entries, key and value, numbers, bytes
    assert plain.ratio == pytest.approx(8 / 3) and plain.target == ""
    assert floor.peer == pytest.approx(4 * 2 / (2 + 2 * kept / 2**14))
    assert floor.ratio == pytest.approx((2 + 2 * kept / 2**14) / 3)


def test_prompts_are_split_and_one_is_copied():
    tokens = torch.arange(12)
    assert split_prompts(tokens, 4, 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert split_prompts(tokens, 12, 4).tolist() == [list(range(12))]
    states = [torch.arange(12.0).view(1, 1, 12, 1)]
    copies = PromptStates(tokens.view(1, 12), states, states, [states[0].squeeze(3)]).batched(3)
    assert (
        copies.ids.shape == (3, 12) and copies.keys[0].shape == (3, 1, 12, 1) and copies.log_beta[0].shape == (3, 1, 12)
    )
    assert copies.batched(2).ids.shape == (2, 12)


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
        "score/criticalkv/ctx60",
        "evict/ctx60",
        "evict/ctx60/defensive",
        "evict/ctx60/snapkv",
        "bytes/overhead",
    ]
    assert all(row.ours > 0 and row.peer and row.ratio > 0 for row in rows)
    assert [row.target for row in rows[1:5]] == ["<= 0.05 of the prefill"] * 3 + ["<= 0.03 of the prefill"]
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
    if config is bench_decode.DecodeBenchConfig:
        with pytest.raises(ValueError, match="--contexts accepts 1024, 4096, 16384, got 1024 2048"):
            config(contexts=(1024, 2048))
    with pytest.raises(ValueError, match=r"--share accepts a number between 0 and 1, got 1\.5"):
        config(share=1.5)
