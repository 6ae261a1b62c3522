"""The window's attention one head at a time against the steps of the aggregation on all heads at once."""

from __future__ import annotations

import shutil

import pytest
import torch

from tenure.eviction.ops import naive
from tenure.eviction.ops.naive import attention_over
from tenure.eviction.ops.window_risk_by_heads import find_risk_kernel, received_by_heads, window_risk_by_heads

compiled = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(params=["auto", pytest.param("reference", id="torch")])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C kernel where a compiler is, and the form in torch."""
    monkeypatch.setenv("TENURE_KERNELS", request.param)
    return request.param


def inputs(lengths: list[list[int]], n: int, window: int = 4, group: int = 3, missing: int = 0):
    """Heads of so many entries, the last of the tokens seen; the first `missing` queries of row 0 do not exist."""
    generator = torch.Generator().manual_seed(n)
    batch, heads = len(lengths), len(lengths[0])
    positions = torch.full((batch, heads, n), -1)
    for row, counts in enumerate(lengths):
        for head, count in enumerate(counts):
            chosen = torch.randperm(60, generator=generator)[:count].sort().values
            positions[row, head, :count] = chosen
            if count > 2:
                positions[row, head, count - 2 : count] = torch.tensor([61, 63])  # some of the window's own
    queries = torch.randn(batch, heads * group, window, 8, generator=generator)
    keys = torch.randn(batch, heads, n, 8, generator=generator)
    keys[positions < 0] = torch.nan
    query_positions = torch.arange(64 - window, 64).repeat(batch, 1)
    query_positions[0, :missing] = -1
    return queries, keys, positions, query_positions, torch.full((batch,), 64 - window), 0.4


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize(
    ("lengths", "n", "missing"),
    [
        ([[40, 40], [40, 40]], 40, 0),
        ([[40, 7], [0, 23]], 40, 0),
        ([[3, 1], [2, 5]], 5, 2),
        ([[12, 9], [4, 11]], 12, 4),  # no query at all in row 0
    ],
)
@pytest.mark.usefixtures("kernels")
def test_one_head_at_a_time_is_all_at_once(lengths, n, missing, kernel):
    given = inputs(lengths, n, missing=missing)
    safe = (given[0], given[1].nan_to_num(0.0), *given[2:])
    worst, mean = naive.window_risk(*safe, kernel, True)
    ours, our_mean = window_risk_by_heads(*given, kernel)
    torch.testing.assert_close(ours, worst, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(our_mean, mean, atol=1e-6, rtol=1e-5)
    assert bool((mean > 0).any())
    alone = window_risk_by_heads(*given, None)
    assert alone[0] is None and torch.equal(alone[1], our_mean)


@pytest.mark.usefixtures("kernels")
def test_keys_in_half_precision_are_scored_in_fp32():
    queries, keys, positions, query_positions, limit, scaling = inputs([[20, 9]], 20)
    where = positions, query_positions, limit, scaling
    queries, keys = queries.bfloat16(), keys.bfloat16()
    worst, mean = window_risk_by_heads(queries, keys, *where, 3)
    expected = naive.window_risk(queries, keys.nan_to_num(0.0), *where, 3, True)
    assert worst is not None and worst.dtype == mean.dtype == torch.float32
    torch.testing.assert_close((worst, mean), expected, atol=1e-6, rtol=1e-5)


@compiled
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "n", "window", "kernel"), [(64, 400, 32, 5), (80, 129, 7, 3), (128, 37, 16, 33)])
def test_the_c_kernel_is_the_form_in_torch(dim, n, window, kernel, dtype, threads, monkeypatch):
    generator = torch.Generator().manual_seed(n)
    queries = torch.randn(2, 6, window, dim, generator=generator).to(dtype)
    padded = torch.randn(2, n + 9, 3, dim, generator=generator).to(dtype)
    keys = padded[:, 5 : 5 + n].transpose(1, 2)  # as a view of a storage
    positions = torch.arange(n).repeat(2, 3, 1)
    positions[1, :, n // 2 :] = -1
    positions[1, 2, n // 3 :] = -1
    query_positions = torch.stack([torch.arange(n - window, n), torch.arange(n // 2 - window, n // 2)])
    query_positions[1, :2] = -1
    limit = query_positions.amax(1) + 1 - window
    given = queries, keys, positions, query_positions, limit, dim**-0.5
    found = find_risk_kernel(queries, keys)
    assert found is not None and (found[1] == torch.bfloat16) == (dtype == torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = window_risk_by_heads(*given, kernel)
        monkeypatch.setenv("TENURE_KERNELS", "reference")
        assert find_risk_kernel(queries, keys) is None
        torch.testing.assert_close(ours, window_risk_by_heads(*given, kernel), atol=1e-7, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


@compiled
def test_the_c_kernel_shows_what_is_not_finite():
    queries, keys, positions, query_positions, limit, scaling = inputs([[20, 9]], 20)
    keys[0, 0, 3] = torch.nan
    worst, mean = window_risk_by_heads(queries, keys, positions, query_positions, limit, scaling, 3)
    for one in (worst, mean):
        assert one is not None
        assert bool(one[0, 0, :18].isnan().all()) and bool(one[0, 1, :7].isfinite().all())


@pytest.mark.parametrize("held", [1, 200, 10**6])
@pytest.mark.parametrize(
    ("lengths", "window", "missing"),
    [([[40, 40], [40, 40]], 4, 0), ([[40, 7], [0, 23]], 64, 0), ([[3, 1], [2, 40]], 64, 5), ([[12, 9], [4, 11]], 9, 9)],
)
def test_attention_received_in_pieces_is_that_of_all_at_once(lengths, window, missing, held):
    queries, keys, positions, query_positions, _, scaling = inputs(lengths, 40, window=window, missing=missing)
    attention = attention_over(keys.nan_to_num(0.0), positions, queries, query_positions, scaling)
    received = received_by_heads(queries, keys, positions, query_positions, scaling, held)
    torch.testing.assert_close(received, attention.sum(3).mean(2), atol=1e-6, rtol=1e-5)
    assert bool((received > 0).any())
