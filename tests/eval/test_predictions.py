"""KL to the full cache against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tenure.eval import kl_to_full, top1_agreement


def naive(logits_full: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    p, q = logits_full.double().softmax(-1), logits.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("held", [1, 202, 500, 10000])
def test_kl_is_the_definition_however_many_logits_are_held(held):
    torch.manual_seed(0)
    full, other = 4 * torch.randn(2, 5, 101), 4 * torch.randn(2, 5, 101)
    assert kl_to_full(full, other, held).shape == (2, 5)
    torch.testing.assert_close(kl_to_full(full, other, held), naive(full, other), rtol=1e-12, atol=1e-12)


def test_kl_has_a_direction():
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    expected = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert float(kl_to_full(p.log(), q.log())) == pytest.approx(expected, abs=1e-7)
    assert float(kl_to_full(q.log(), p.log())) != pytest.approx(expected, abs=1e-2)


def test_kl_of_equal_distributions_is_zero_even_when_the_logits_are_shifted():
    logits = torch.randn(3, 50, dtype=torch.float64)
    assert float(kl_to_full(logits, logits + 1000.0).max()) < 1e-12
    assert torch.equal(kl_to_full(logits, logits), torch.zeros(3, dtype=torch.float64))


def test_kl_stays_finite_and_exact_for_extreme_logits():
    full, other = torch.tensor([[0.0, 300.0, -300.0]]), torch.tensor([[300.0, 0.0, -300.0]])
    assert float(kl_to_full(full, other)) == pytest.approx(300.0)
    masked = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert float(kl_to_full(masked, torch.zeros(1, 3))) == pytest.approx(math.log(1.5))
    assert float(kl_to_full(torch.zeros(1, 3), masked)) == math.inf


def test_kl_of_half_precision_logits_is_computed_in_double():
    torch.manual_seed(0)
    full, other = torch.randn(4, 300).bfloat16(), torch.randn(4, 300).bfloat16()
    torch.testing.assert_close(kl_to_full(full, other), naive(full, other), rtol=1e-12, atol=1e-12)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"differ in shape: \(2, 3\) and \(3, 3\)"):
        kl_to_full(torch.zeros(2, 3), torch.zeros(3, 3))


def test_top1_agreement():
    full = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    assert top1_agreement(full, torch.tensor([[0.0, 9.0, 1.0], [0.0, 9.0, 1.0]])).tolist() == [True, False]
