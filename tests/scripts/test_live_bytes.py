"""Bytes counted on the meta device against sums by hand, and the settings of a step on a small shape."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tenure.scripts.bench import bench_memory
from tenure.scripts.bench.live_bytes import LiveBytes

LENGTH = 2048


def test_live_and_peak_are_of_tensors_that_exist_at_a_time() -> None:
    weight = torch.empty(4, 4, device="meta")
    counted = LiveBytes()
    counted.known([weight])
    with counted:
        first = weight @ torch.empty(4, 100, device="meta")
        assert counted.live == 100 * 16 and counted.peak == 2 * 100 * 16
        view = first[:, :50].t()
        del first
        assert counted.live == 100 * 16, "a view keeps its storage"
        del view
        assert counted.live == 0
        mask = torch.tensor([True, False, True, False])
        assert weight[mask].shape == (2, 4) and not bool((weight > 0).any())


def test_the_table_of_a_small_shape(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Each setting acts in the direction that it is for, or not at all where the peak is elsewhere."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    monkeypatch.setitem(bench_memory.SHAPES, "small", small)
    monkeypatch.setattr(bench_memory, "COMMON", bench_memory.COMMON | {"head_dim": 16, "vocab_size": 512})
    found = {}
    for label, settings in bench_memory.CASES:
        found[label] = bench_memory.step_bytes("small", LENGTH, **settings)
    plain, default, masks, chunk, saved, four, eight, soft, gates, again = found.values()
    assert plain > saved >= default > four > eight
    assert masks >= default + LENGTH**2
    assert chunk >= default
    assert soft > max(gates, again)
    with FlopCounterMode(display=False) as counted:  # of matrix products: it does not know this attention
        bench_memory.step_bytes("small", LENGTH, packed=True, recomputes=True)
    products, attention = bench_memory.step_flop("small", LENGTH, documents=16)
    assert counted.get_total_flops() == pytest.approx(products, rel=0.03)
    assert attention == 2 * 2 * 128 * LENGTH * LENGTH / 16 * 5.5
    with patch.object(bench_memory, "step_bytes", lambda *given, **settings: 2e9):
        config = bench_memory.MemoryBenchConfig(("small",), (1024,), tmp_path / "page.md")
        assert bench_memory.main(config) == 0
    assert "| packed, checkpointing (default) | 2 |" in (tmp_path / "page.md").read_text()
    with pytest.raises(ValueError, match="--lengths 1024 and more"):
        bench_memory.MemoryBenchConfig(lengths=(10,))
