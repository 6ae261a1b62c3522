"""Seconds of a batch by operations and bytes, and rates fitted to measured ones."""

from __future__ import annotations

import random

import pytest

from tenure.serving import Tier
from tenure.serving.simulation.cost_model import (
    BatchShape,
    FittedCosts,
    Links,
    RooflineCosts,
    fit_costs,
    get_card,
    get_model_spec,
)


def costs(name: str = "llama-3.1-8b", on: str = "a10g", link: float = 2e9) -> RooflineCosts:
    return RooflineCosts(get_card(on), get_model_spec(name), Links(link))


def test_the_numbers_of_the_papers_set_ups() -> None:
    """KV per token, pools at 0.88 of the memory, and a load of 8192 tokens, as the papers state or imply them."""
    llama, qwen = costs(), costs("qwen2.5-32b", "h100", 64e9)
    assert (llama.model.kv_bytes_per_token, qwen.model.kv_bytes_per_token) == (128 * 1024, 256 * 1024)
    assert llama.pool_bytes(0.88) / (128 * 1024) == pytest.approx(38_000, rel=0.02)
    assert qwen.pool_bytes(0.88) / (256 * 1024) == pytest.approx(19_000, rel=0.03)
    assert llama.reload_s(8192 * 128 * 1024, Tier.DEVICE) == pytest.approx(0.537, rel=1e-3)
    assert qwen.reload_s(8192 * 256 * 1024, Tier.DEVICE) == pytest.approx(0.034, rel=0.02)
    assert llama.reload_s(1, Tier.HOST) == float("inf")


def test_a_prefill_is_bound_by_operations_and_a_decode_by_bytes() -> None:
    llama = costs()
    body, head = 2 * (8.03e9 - 2 * 128256 * 4096), 2 * 128256 * 4096
    operations = 8192 * body + head + 4 * 32 * 4096 * 8192**2 / 2
    assert llama.recompute_s(0, 8192) == pytest.approx(operations / (70e12 * 0.6))
    moved = 2 * (8.03e9 - 128256 * 4096) + 8192 * 128 * 1024
    assert llama.batch_s(BatchShape(contexts=(8192,))) == pytest.approx(moved / (600e9 * 0.77))


def test_chunks_and_steps_add_up() -> None:
    """A prompt in chunks computes what it computes in one go; many steps take what they take one by one."""
    llama = costs()
    whole, parts = llama.recompute_s(0, 8192), sum(llama.recompute_s(a, a + 2048) for a in range(0, 8192, 2048))
    assert whole < parts < 1.001 * whole  # an output for the last token of every chunk
    many = llama.batch_s(BatchShape(contexts=(1000, 50), steps=100))
    assert many == pytest.approx(sum(llama.batch_s(BatchShape(contexts=(1000 + n, 50 + n))) for n in range(100)))
    together = llama.batch_s(BatchShape(((0, 256),), (8192,) * 8))
    assert together < llama.recompute_s(0, 256) + llama.batch_s(BatchShape(contexts=(8192,) * 8))


def test_rates_are_found_again() -> None:
    draws, true = random.Random(0), FittedCosts(0.02, 3e-4, 2e-8, 5e-3, Links(1e9))
    measured = []
    for _ in range(60):
        chunks = [(start, start + draws.randrange(1, 512)) for start in draws.sample(range(2000), draws.randrange(3))]
        batch = BatchShape(chunks, [draws.randrange(4000) for _ in range(draws.randrange(1, 4))], draws.randrange(1, 5))
        measured.append((batch, true.batch_s(batch) * draws.uniform(0.98, 1.02)))
    found = fit_costs(measured, true.links)
    for batch, seconds in measured:
        assert found.batch_s(batch) == pytest.approx(seconds, rel=0.1)
    flat = fit_costs([(BatchShape(contexts=(n,)), 0.5 - 1e-5 * n) for n in range(0, 1000, 50)], true.links)
    assert flat.pair_s == 0.0, "no rate below 0"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="got 3 measured batches; accepted: 8 or more"):
        fit_costs([(BatchShape(), 1.0)] * 3, Links(1.0))
    with pytest.raises(ValueError, match=r"compute_share=0, .* accepted: shares above 0"):
        RooflineCosts(get_card("h100"), get_model_spec("qwen2.5-32b"), Links(1.0), compute_share=0)
    with pytest.raises(ValueError, match=r"Qwen2.5-32B does not fit in 88% of A10G"):
        costs("qwen2.5-32b").pool_bytes(0.88)
    with pytest.raises(ValueError, match="unknown card 'h900'; known: h100, a10g"):
        get_card("h900")
    with pytest.raises(ValueError, match="accepted: a number of 0 or more"):
        Links(-1.0)
