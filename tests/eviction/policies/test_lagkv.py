"""LagKV against loops over partitions, on ragged segments."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tenure.eviction import LagKV


def naive(states: torch.Tensor, lag: int) -> list[list[float]]:
    """Scores of each partition but the last of one head's `(n, dim)` states, n a multiple of `lag`."""
    parts = states.split(lag)
    scores = []
    for part, following in pairwise(parts):
        low, high = following.amin(0), following.amax(0)
        scores.append(((part - low) / (high - low)).std(dim=1).softmax(0).tolist())
    return scores


@pytest.mark.parametrize("across", [False, True])
def test_lagkv_equals_loops_on_ragged_segments(hand_view, across):
    torch.manual_seed(0)
    policy, lengths = LagKV(first=2, lag=5, across=across), [24, 17, 11, 1]
    keys, values = torch.randn(2, 2, 24, 6), torch.randn(2, 2, 24, 6)
    view = hand_view(policy, keys, values, lengths=lengths)
    score = policy.score(view)
    for segment, length in enumerate(lengths):
        row, head = divmod(segment, 2)
        got = score[row, head, :length]
        if length < 2 + 2 * 5:
            expected = torch.tensor([1.0, 1.0] + [i / (length - 2) for i in range(length - 2)])[:length]
            torch.testing.assert_close(got, expected)
            continue
        whole = (length - 2) // 5
        inner = slice(2, 2 + whole * 5)
        pairs = zip(naive(keys[row, head, inner], 5), naive(values[row, head, inner], 5), strict=True)
        expected = torch.ones(length)
        for number, (by_key, by_value) in enumerate(pairs):
            part = (torch.tensor(by_key) + torch.tensor(by_value)) / 2
            if not across:
                part = part.argsort().argsort() / 5
            expected[2 + number * 5 : 7 + number * 5] = part
        torch.testing.assert_close(got, expected)
        assert (got < 1).sum() == (whole - 1) * 5


def test_a_channel_that_is_constant_in_a_partition_is_no_trap(hand_view):
    keys = torch.randn(1, 1, 20, 4)
    keys[..., 5:, 2] = 1.0
    policy = LagKV(first=0, lag=5)
    assert policy.score(hand_view(policy, keys)).isfinite().all()
