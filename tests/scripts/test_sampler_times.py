"""The rows of the sampler's benchmark, and that both sides choose the same greedy tokens."""

from __future__ import annotations

import torch

from tenure.scripts.bench.sampler_times import sampler_rows, transformers_step
from tenure.serving.sampling.params import SamplingParams
from tenure.serving.sampling.sampler import Sampler


def test_rows() -> None:
    rows = sampler_rows(vocab_size=256, batches=(2,), runs=1)
    assert [row.name for row in rows] == [f"sampler/b2/{name}" for name in ("greedy", "temperature+top_p", "all")]
    assert all(row.ours > 0 and row.peer and row.ratio > 0 and row.unit == "µs per row" for row in rows)


def test_both_sides_do_the_same_work() -> None:
    logits, sampler = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)), Sampler(100)
    params = SamplingParams(repetition_penalty=1.5, logit_bias={5: 2.0}, logprobs=2)
    rows = [sampler.new_row(params, [1, 2, 3]) for _ in range(3)]
    assert sampler.sample(logits, rows).tokens == transformers_step(logits, torch.tensor([[1, 2, 3]] * 3), params)
