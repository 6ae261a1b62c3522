"""The Triton kernels of attention after a prompt against the explicit bias in float64, outputs and every gradient."""

from __future__ import annotations

import pytest
import torch

from tenure.retention.ops import biased_attention, gated_attention_after, naive
from tenure.retention.ops.gated_attention_triton import backward_op, forward_op

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, where a mask hides the value
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
FORMS = {
    "decays": (gated_attention_after, naive.gated_attention_after),
    "bias": (biased_attention, naive.biased_attention),
}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(
    lengths: tuple[int, int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    device: str,
    dtype: torch.dtype = torch.float32,
    strength: float = 1.0,
) -> Inputs:
    """Queries of the last tokens, keys and values of all, as models give them, and log β or biases."""
    (q_len, seq_len), generator = lengths, torch.Generator().manual_seed(lengths[1])

    def normal(length: int, count: int, dim: int) -> torch.Tensor:
        x = torch.randn(2, length, count, dim, generator=generator).to(device=device, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    query, key = normal(q_len, heads[0], dims[0]), normal(seq_len, heads[1], dims[0])
    value = normal(seq_len, heads[1], dims[1])
    bias = -strength * torch.rand(2, heads[1], seq_len, generator=generator) ** 3
    return query, key, value, bias.to(device).requires_grad_()


def assert_near_truth(form: str, tensors: Inputs, tolerance: float) -> None:
    ours, twin = FORMS[form]
    exact = tuple(x.detach().double().requires_grad_() for x in tensors)
    output, truth = ours(*tensors, 0.3, kernels="triton"), twin(*exact, 0.3)
    weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(9)).to(output)
    results = [output.detach(), *torch.autograd.grad(output, tensors, weight)]
    references = [truth.detach(), *torch.autograd.grad(truth, exact, weight.double())]
    names = ("output", "query", "key", "value", "bias")
    for name, tensor, x, reference in zip(names, (tensors[0], *tensors), results, references, strict=True):
        assert x.dtype == tensor.dtype and x.shape == reference.shape
        assert x.isfinite().all(), name
        error = float((x.double() - reference).norm() / torch.maximum(reference.norm(), 0.1 * weight.double().norm()))
        assert error < tolerance, (name, error)


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize(
    ("form", "lengths", "heads", "dims", "dtype"),
    [
        ("decays", (1, 34), (2, 1), (8, 8), torch.float32),
        ("decays", (33, 61), (1, 1), (24, 40), torch.float32),  # no tile of queries begins where one of keys does
        ("decays", (18, 53), (2, 1), (32, 32), torch.bfloat16),
        ("bias", (1, 1), (2, 2), (16, 16), torch.float32),
        ("bias", (20, 67), (3, 1), (8, 8), torch.float32),
        ("bias", (37, 37), (1, 1), (8, 8), torch.float32),  # no prompt
        ("bias", (18, 53), (2, 2), (32, 32), torch.float16),
    ],
)
def test_kernels_equal_naive(form, lengths, heads, dims, dtype, device) -> None:
    assert_near_truth(form, inputs(lengths, heads, dims, device, dtype), TOLERANCE[dtype])


def test_a_bias_that_leaves_nothing_of_most_keys(device) -> None:
    """As soft eviction at a low temperature gives it."""
    query, key, value, bias = inputs((9, 45), (1, 1), (16, 16), device, torch.bfloat16)
    hard = torch.where(torch.arange(45, device=device) % 3 == 0, bias.detach(), -1e5)
    assert_near_truth("bias", (query, key, value, hard.requires_grad_()), TOLERANCE[torch.bfloat16])


def test_ops_are_well_formed(device) -> None:
    """Without decays; with them they are those of gated attention."""
    tensors = inputs((3, 7), (1, 1), (8, 8), device)
    start = torch.zeros(2, 7, dtype=torch.int32, device=device)
    bounds = start, torch.full_like(start, 7)
    torch.library.opcheck(forward_op, (*tensors, *bounds, 0.3, False))
    plain = tuple(x.detach() for x in tensors)
    output, lse = forward_op(*plain, *bounds, 0.3, False)
    torch.library.opcheck(backward_op, (torch.randn_like(output), *plain, *bounds, output, lse, 0.3, False, True))


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_what_does_not_belong_together_is_named(kernels, device) -> None:
    query, key, value, bias = inputs((4, 9), (2, 2), (8, 8), device)
    with pytest.raises(ValueError, match="at most as many queries as keys are accepted"):
        gated_attention_after(key, query, value, bias, 0.3, kernels)
    with pytest.raises(ValueError, match=r"and bias \(2, 2, 8\) must agree in"):
        biased_attention(query, key, value, bias[..., 1:], 0.3, kernels)
    with pytest.raises(ValueError, match=r"and log_beta \(2, 1, 9\) must agree in"):
        gated_attention_after(query, key, value, bias[:, :1], 0.3, kernels)


def test_no_queries_give_gradients_of_zero(device) -> None:
    tensors = inputs((0, 5), (1, 1), (8, 8), device)
    output = biased_attention(*tensors, 0.3, "triton")
    assert output.shape == (2, 1, 0, 8)
    for gradient in torch.autograd.grad(output.sum(), tensors[1:]):
        assert gradient.eq(0).all()
