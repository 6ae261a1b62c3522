"""Capacity losses: the formulas, and what the sampled form estimates."""

from __future__ import annotations

import pytest
import torch

from tenure.retention import Segments, capacity_loss, occupancy
from tenure.retention.capacity import relative_excess, stratified_positions

SHAPE = (3, 2, 2, 200)  # layers, batch, heads, tokens


def gates_output(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -(torch.rand(SHAPE, generator=generator, dtype=torch.float64) ** 6)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_loss_equals_the_formula(scope: str) -> None:
    log_beta, segments, budget = gates_output(), Segments.whole(2, 200), 20.0
    held = occupancy(log_beta, segments)
    terms = []
    for row in range(2):
        for t in range(200):
            heads = held[:, row, :, t].flatten().tolist()
            values = [sum(heads) / len(heads)] if scope == "global" else heads
            terms += [max(0.0, s - budget) / max(1.0, t - budget) for s in values]
    positive = [x for x in terms if x > 0]
    loss = capacity_loss(log_beta, segments, budget, scope).loss  # type: ignore[arg-type]
    assert positive
    assert float(loss) == pytest.approx(sum(positive) / len(positive), rel=1e-9)


def test_global_loss_is_the_published_one_away_from_the_budget() -> None:
    """`max(0, S_g-M_g) / max(1, p_g-M_g)` with sums over L·H heads, wherever p - M >= 1."""
    segments, budget, heads = Segments.whole(2, 200), 20.0, 6
    held = occupancy(gates_output() * 1e-3, segments)  # nearly nothing forgotten, as at the start of training
    index = torch.arange(200).expand(2, 200)
    ours = relative_excess(held, index, segments, torch.tensor(budget), "global")
    position = index.double()
    published = (held.sum((0, 2)) - budget * heads).clamp_min(0) / (position * heads - budget * heads).clamp_min(1)
    torch.testing.assert_close(ours[:, 21:], published[:, 21:])
    assert ours.max() <= 2 < published.max()  # at p = M the published denominator is 1 against a sum over heads


def test_no_excess_is_no_loss_and_no_gradient() -> None:
    log_beta = torch.full(SHAPE, -5.0, requires_grad=True)
    capacity = capacity_loss(log_beta, Segments.whole(2, 200), 10.0)
    capacity.loss.backward()
    assert capacity.loss.item() == 0.0
    assert log_beta.grad is not None and not log_beta.grad.any()


def test_packed_documents_count_for_themselves() -> None:
    """Two documents in a row lose the mean over positions of what each loses alone."""
    position_ids = torch.cat([torch.arange(80), torch.arange(120)])[None]
    packed = Segments.from_inputs(1, 200, position_ids=position_ids)
    log_beta = gates_output()[:, :1]
    together = capacity_loss(log_beta, packed, 15.0)
    held = torch.cat([occupancy(part, Segments.whole(1, part.shape[-1])) for part in log_beta.split([80, 120], -1)], -1)
    torch.testing.assert_close(together.occupancy, held)


def test_budget_may_differ_by_token() -> None:
    segments, log_beta = Segments.whole(2, 200), gates_output()
    same = capacity_loss(log_beta, segments, torch.full((2, 200), 20.0, dtype=torch.float64)).loss
    torch.testing.assert_close(same, capacity_loss(log_beta, segments, 20.0).loss)
    tighter = capacity_loss(log_beta, segments, torch.tensor([[20.0] * 200, [5.0] * 200])).loss
    assert tighter > same


def test_sampled_sums_are_unbiased_with_their_variance_reported(record_property) -> None:
    """The mean of 4000 sampled estimates of the summed excess is the exact sum, within its own standard error."""
    log_beta, segments, samples, draws = gates_output(), Segments.whole(2, 200), 16, 4000
    held = occupancy(log_beta, segments)
    everywhere = torch.arange(200).expand(2, 200)
    exact = relative_excess(held, everywhere, segments, torch.tensor(20.0), "global")
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(draws):
        index = stratified_positions(2, 200, samples, generator)
        estimates.append(float(exact.gather(1, index).sum()) * 200 / samples)
    values = torch.tensor(estimates, dtype=torch.float64)
    error = float(values.std()) / draws**0.5
    record_property("relative_standard_deviation", float(values.std() / values.mean()))
    assert abs(float(values.mean() - exact.sum())) < 4 * error
    assert float(values.std() / values.mean()) < 0.05  # stratification leaves little variance at 16 of 200


def test_every_column_is_drawn_equally_often() -> None:
    index = torch.cat([stratified_positions(50, 37, 5, torch.Generator().manual_seed(i)) for i in range(200)])
    counts = torch.bincount(index.flatten(), minlength=37).double()
    expected = index.numel() / 37
    assert (counts - expected).abs().max() < 5 * expected**0.5
    assert (index.diff(dim=-1) > 0).float().mean() > 0.95


@pytest.mark.parametrize("scope", ["global", "local"])
def test_sampled_loss_and_gradient_average_to_the_exact_ones(scope: str) -> None:
    """The loss is a ratio of two unbiased sums: its mean and its gradient's mean are the exact ones within 2 %."""
    log_beta, segments = gates_output().requires_grad_(), Segments.whole(2, 200)
    exact = capacity_loss(log_beta, segments, 20.0, scope)  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(exact.loss, log_beta)
    generator = torch.Generator().manual_seed(1)
    losses, slopes, draws = 0.0, torch.zeros_like(slope), 400
    for _ in range(draws):
        sampled = capacity_loss(log_beta, segments, 20.0, scope, 16, generator)  # type: ignore[arg-type]
        losses += float(sampled.loss) / draws
        slopes += torch.autograd.grad(sampled.loss, log_beta)[0] / draws
    assert losses == pytest.approx(float(exact.loss), rel=0.02)
    assert float((slopes - slope).norm() / slope.norm()) < 0.1
    assert float((slopes.sum() - slope.sum()).abs() / slope.sum().abs()) < 0.02


def test_wrong_arguments_are_named() -> None:
    log_beta, segments = gates_output(), Segments.whole(2, 200)
    with pytest.raises(ValueError, match="accepted: global, local"):
        capacity_loss(log_beta, segments, 10, "layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be positive"):
        capacity_loss(log_beta, segments, 0)
