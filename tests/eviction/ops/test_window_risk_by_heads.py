"""The window's attention one head at a time against the steps of the aggregation on all heads at once."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction.ops import naive
from tenure.eviction.ops.naive import attention_over
from tenure.eviction.ops.window_risk import received_by_heads, window_risk_by_heads


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


def test_keys_in_half_precision_are_scored_in_fp32():
    queries, keys, positions, query_positions, limit, scaling = inputs([[20, 9]], 20)
    where = positions, query_positions, limit, scaling
    queries, keys = queries.bfloat16(), keys.bfloat16()
    worst, mean = window_risk_by_heads(queries, keys, *where, 3)
    expected = naive.window_risk(queries, keys.nan_to_num(0.0), *where, 3, True)
    assert worst is not None and worst.dtype == mean.dtype == torch.float32
    torch.testing.assert_close((worst, mean), expected, atol=1e-6, rtol=1e-5)


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
