"""The radix selection against sorting and against the selection of the CPU path."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction.ops import naive
from tenure.eviction.ops.radix_select import select_top

pytestmark = pytest.mark.usefixtures("nan_outputs")  # also of what is kept between two kernels


def competitors(widths: list[int], rows: int, seed: int, levels: int | None, device: str):
    """Scores with candidates missing and protected, positions that differ within a segment, and bounds.

    `levels`: round to so many different scores; None for distinct ones.
    """
    generator = torch.Generator().manual_seed(seed)
    n = sum(widths)
    scores = torch.randn(rows, n, generator=generator)
    if levels:
        scores = (scores * levels / 4).round()  # has zeros of both signs
    chance = torch.rand(rows, n, generator=generator)
    scores = scores.masked_fill(chance < 0.1, -torch.inf).masked_fill(chance > 0.9, torch.inf)
    places = [torch.rand(rows, w, generator=generator).argsort(1) + 3 for w in widths]
    bounds = torch.tensor([0, *widths]).cumsum(0)
    return scores.to(device), torch.cat(places, 1).int().to(device), bounds.int().to(device)


@pytest.mark.parametrize(
    ("widths", "levels", "k"),
    [
        ([5, 0, 31, 7], None, [17, 0, -3]),
        ([9, 9, 9], 2, [3, 13, 40]),  # many ties: positions, then segments decide
        ([2500], 4, [1111]),  # more than a block
        ([1], None, [1]),
        ([0, 0], None, [3]),
    ],
)
def test_selection_equals_the_cpu_path(widths, levels, k, device, triton_kernels):
    scores, positions, bounds = competitors(widths, len(k), len(widths), levels, device)
    wanted = torch.tensor(k, dtype=torch.int32, device=device)
    keep, counts = select_top(scores, positions, wanted, bounds)
    expected, expected_counts = naive.select_top(scores, positions, wanted, bounds)
    assert torch.equal(keep, expected) and torch.equal(counts, expected_counts)
    candidates = (scores > -torch.inf).sum(1)
    assert torch.equal(keep.sum(1), torch.minimum(wanted.clamp(min=0), candidates))


def test_distinct_scores_are_those_of_topk_to_the_bit(device, triton_kernels):
    """Neighbours among the floating-point numbers, negative ones and denormals among them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 900), generator=generator, dtype=torch.int32)
    bits[0, :300] = torch.arange(300, dtype=torch.int32) + torch.tensor(1.0).view(torch.int32)
    bits[0, 300:400] = torch.arange(100, dtype=torch.int32)  # denormals
    scores = bits.view(torch.float32)
    scores = torch.where(scores.isfinite(), scores, 3.0).unique().view(1, -1).to(device)
    n = scores.shape[1]
    positions = torch.arange(n, dtype=torch.int32, device=device).view(1, -1)
    bounds = torch.tensor([0, n], dtype=torch.int32, device=device)
    for k in (1, 250, n - 5):
        keep, counts = select_top(scores, positions, torch.tensor([k], dtype=torch.int32, device=device), bounds)
        expected = torch.zeros_like(keep).scatter_(1, scores.topk(k, dim=1).indices, True)
        assert torch.equal(keep, expected) and counts.tolist() == [[k]]


def test_wrong_inputs_are_named():
    scores, k, bounds = torch.zeros(2, 4), torch.ones(2, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"scores torch.float64.*accepted: torch.float32 scores"):
        select_top(scores.double(), torch.zeros(2, 4, dtype=torch.int32), k, bounds)
    with pytest.raises(ValueError, match=r"positions \(2, 3\).*accepted: \(rows, n\)"):
        select_top(scores, torch.zeros(2, 3, dtype=torch.int32), k, bounds)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_opcheck(kernels, device, monkeypatch):
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    scores, positions, bounds = competitors([4, 6], 2, 0, None, device)
    k = torch.tensor([3, 4], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.tenure.select_top.default, (scores, positions, k, bounds))
