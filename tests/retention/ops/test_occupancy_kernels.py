"""The Triton kernels of occupancy against the naive form in float64, and what they skip."""

from __future__ import annotations

import pytest
import torch

from tenure.retention import Segments, occupancy
from tenure.retention.ops import naive, occupancy_at
from tenure.retention.ops.occupancy_triton import backward_op, forward_op

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, where a mask hides the value
LAYERS, HEADS = 2, 1


def log_betas(seq_len: int, device: str) -> torch.Tensor:
    """A layer that forgets slowly and one that forgets at once."""
    generator = torch.Generator().manual_seed(seq_len)
    log_beta = -(torch.rand(LAYERS, 2, HEADS, seq_len, generator=generator) ** 6)
    log_beta[1] *= 40
    return log_beta.to(device).requires_grad_()


def chosen(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, index[None, :, None].expand(*values.shape[:3], -1))


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("samples", [None, 19])
def test_kernels_equal_naive(layout, samples, make_segments, device) -> None:
    seq_len = 77
    segments, log_beta = make_segments(layout, seq_len), log_betas(seq_len, device)
    exact = log_beta.detach().double().requires_grad_()
    truth = naive.occupancy(exact, segments)
    if samples is None:
        held = occupancy(log_beta, segments, "triton")
    else:
        generator = torch.Generator().manual_seed(1)
        index = torch.randint(0, seq_len, (2, samples), generator=generator).sort(-1).values.to(device)
        held, truth = occupancy_at(log_beta, index, segments, "triton"), chosen(truth, index)
    torch.testing.assert_close(held.double(), truth, rtol=2e-6, atol=1e-6)
    weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2)).to(device)
    (slope,) = torch.autograd.grad(held, log_beta, weight)
    (true_slope,) = torch.autograd.grad(truth, exact, weight.double())
    assert slope.isfinite().all()
    assert float((slope.double() - true_slope).norm() / true_slope.norm()) < 1e-6
    if samples is None:
        assert not held.transpose(-1, -2)[:, :, :, 0].movedim(0, -1)[segments.document < 0].any()


def test_one_token_and_free_leading_axes(device) -> None:
    log_beta = torch.full((3, 2, 2, 2, 1), -0.5, device=device)
    assert torch.equal(occupancy(log_beta, Segments.whole(2, 1, device), "triton"), torch.ones_like(log_beta))


def test_tiles_below_the_resolution_are_skipped(device) -> None:
    """NaN in a tile that counts spoils the sum; once all its keys are forgotten it is not looked at."""
    log_beta = torch.full((1, 1, 1, 200), -1.0, device=device)
    log_beta[..., :30] = -1000.0
    log_beta[..., 7] = float("nan")
    held = occupancy(log_beta, Segments.whole(1, 200, device), "triton")
    assert held[..., 160:].isfinite().all()
    assert held[..., 160:].max() < 1.6


@pytest.mark.parametrize("samples", [False, True])
def test_backward_stops_where_a_key_is_forgotten(samples, device) -> None:
    """Keys of the first 30 are forgotten at once: what comes a tile later is not looked at for their gradient."""
    log_beta = torch.full((1, 1, 1, 200), -1000.0, device=device)
    log_beta[..., 30:] = -1.0
    log_beta.requires_grad_()
    segments, index = Segments.whole(1, 200, device), torch.arange(200, device=device).view(1, -1)
    held = occupancy_at(log_beta, index, segments, "triton") if samples else occupancy(log_beta, segments, "triton")
    weight = torch.ones_like(held)
    weight[..., 160:] = torch.nan
    (slope,) = torch.autograd.grad(held, log_beta, weight)
    assert slope[..., :30].isfinite().all() and slope[..., 160:199].isnan().all()


def test_ops_are_well_formed(device) -> None:
    segments = Segments.whole(2, 6, device)
    log_beta = log_betas(6, device)
    start, end = segments.bounds
    for index in (None, torch.tensor([[0, 3], [2, 5]], device=device)):
        torch.library.opcheck(forward_op, (log_beta, index, start, end))
        grad = torch.randn_like(forward_op(log_beta.detach(), index, start, end))
        torch.library.opcheck(backward_op, (grad, log_beta.detach(), index, end))


def test_only_fp32_is_accepted(device) -> None:
    log_beta = torch.zeros(1, 1, 1, 4, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="log_beta is float64; accepted: float32"):
        occupancy(log_beta, Segments.whole(1, 4, device), "triton")
