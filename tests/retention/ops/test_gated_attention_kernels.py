"""The Triton kernels of gated attention against the naive form in float64, outputs and every gradient."""

from __future__ import annotations

import pytest
import torch

from tenure.retention import Segments, gated_attention
from tenure.retention.ops import naive
from tenure.retention.ops.gated_attention_triton import backward_op, forward_op

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, where a mask hides the value
# Relative errors, in norm: fp32 sums in any order; one rounding of the output, and of weights and slopes inside.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(
    seq_len: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    device: str,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
) -> Inputs:
    """query, key, value, log_beta; the first two as models give them, with heads behind tokens in memory."""
    generator = torch.Generator().manual_seed(seq_len)

    def normal(count: int, dim: int) -> torch.Tensor:
        x = torch.randn(batch, seq_len, count, dim, generator=generator).to(device=device, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    log_beta = -(torch.rand(batch, heads[1], seq_len, generator=generator) ** 3).to(device)
    query, key, value = normal(heads[0], dims[0]), normal(heads[1], dims[0]), normal(heads[1], dims[1])
    return query, key, value.detach().contiguous().requires_grad_(), log_beta.requires_grad_()


def results(tensors: Inputs, segments: Segments, weight: torch.Tensor, implementation: str) -> list[torch.Tensor]:
    """Output and gradients."""
    output = gated_attention(*tensors, 0.3, segments, implementation)  # type: ignore[arg-type]
    return [output.detach(), *torch.autograd.grad(output, tensors, weight)]


def assert_near_truth(tensors: Inputs, segments: Segments, dtype: torch.dtype) -> list[torch.Tensor]:
    query, _, value, _ = tensors
    weight = torch.randn(*query.shape[:-1], value.shape[-1], generator=torch.Generator().manual_seed(9)).to(query)
    ours = results(tensors, segments, weight, "triton")
    exact: Inputs = tuple(x.detach().double().requires_grad_() for x in tensors)  # type: ignore[assignment]
    truth = results(exact, segments, weight.double(), "naive")
    names = ("output", "query", "key", "value", "log_beta")
    for name, tensor, x, reference in zip(names, (query, *tensors), ours, truth, strict=True):
        assert x.dtype == tensor.dtype and x.shape == reference.shape
        assert x.isfinite().all(), name
        # Where a gradient is nearly 0, as of a lone key's query, rounding is of what it is the difference of.
        error = float((x.double() - reference).norm() / torch.maximum(reference.norm(), 0.1 * weight.double().norm()))
        assert error < TOLERANCE[dtype], (name, error)
    return ours


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize(
    ("seq_len", "heads", "dims", "dtype"),
    [
        (1, (2, 2), (16, 16), torch.float32),
        (33, (3, 1), (8, 8), torch.float32),
        (70, (1, 1), (24, 40), torch.float32),
        (37, (4, 2), (32, 32), torch.float16),
        (37, (2, 1), (32, 32), torch.bfloat16),
    ],
)
def test_kernels_equal_naive(seq_len, heads, dims, dtype, make_segments, device) -> None:
    layout = "whole" if seq_len == 1 else "packed"
    assert_near_truth(inputs(seq_len, heads, dims, device, dtype), make_segments(layout, seq_len), dtype)


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("layout", ["whole", "left padding", "right padding"], indirect=True)
def test_padding_is_zero_and_gets_no_gradient(layout, make_segments, device) -> None:
    segments = make_segments(layout, 37)
    ours = assert_near_truth(inputs(37, (2, 2), (8, 8), device), segments, torch.float32)
    padding = segments.document < 0
    for x in ours:
        assert not x.transpose(1, 2)[padding].any()
        assert x.transpose(1, 2)[~padding].any()


@pytest.mark.usefixtures("nan_outputs")
def test_a_row_of_nothing_but_padding(device) -> None:
    document = torch.tensor([[-1] * 20, [-1] * 3 + [0] * 17], device=device)
    segments = Segments(document, (torch.arange(20, device=device) - 3).clamp_min(0) * (document >= 0), ((1, 3, 20),))
    ours = assert_near_truth(inputs(20, (1, 1), (8, 8), device), segments, torch.float32)
    assert not any(x[0].any() for x in ours)


def test_strong_decay_at_long_distances_is_exact_in_bf16(device) -> None:
    """Every third key decays by e^-9 a step, its bias reaches -600: in bf16 that would be off by whole units."""
    query, key, value, log_beta = inputs(71, (1, 1), (16, 16), device, torch.bfloat16, batch=1)
    log_beta = log_beta.detach()
    log_beta[..., ::3] -= 9.0
    log_beta.requires_grad_()
    assert_near_truth((query, key, value, log_beta), Segments.whole(1, 71, device), torch.bfloat16)


def test_the_same_bits_in_every_run(make_segments, device) -> None:
    tensors, segments = inputs(20, (1, 1), (8, 8), device), make_segments("packed", 20)
    weight = torch.randn_like(tensors[0])
    for first, second in zip(*(results(tensors, segments, weight, "triton") for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_no_gradient_of_the_query_where_none_is_wanted(device) -> None:
    """As in a model's first layer; the others are the same."""
    tensors, segments = inputs(20, (1, 1), (8, 8), device, batch=1), Segments.whole(1, 20, device)
    (wanted,) = torch.autograd.grad(gated_attention(*tensors, 0.3, segments, "triton").sum(), tensors[3])
    query, key, value = (x.detach() for x in tensors[:3])
    output = gated_attention(query, key, value, tensors[3], 0.3, segments, "triton")
    assert torch.equal(torch.autograd.grad(output.sum(), tensors[3])[0], wanted)


def test_autocast_decides_the_dtype(device) -> None:
    """Under autocast some models' queries come in fp32 beside values in bf16."""
    query, key, value, log_beta = inputs(20, (1, 1), (8, 8), device, batch=1)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        output = gated_attention(query, key, value.bfloat16(), log_beta, 0.3, implementation="triton")
    assert output.dtype == torch.float32
    expected = naive.gated_attention(query, key, value, log_beta, 0.3, Segments.whole(1, 20, device))
    torch.testing.assert_close(output, expected, rtol=0, atol=3e-2)


def test_ops_are_well_formed(device) -> None:
    tensors, segments = inputs(5, (2, 1), (8, 8), device, batch=1), Segments.whole(1, 5, device)
    start, end = segments.bounds
    torch.library.opcheck(forward_op, (*tensors, start, end, 0.3, True))
    plain = tuple(x.detach() for x in tensors)
    output, lse = forward_op(*plain, start, end, 0.3, True)
    for with_query in (True, False):
        arguments = (torch.randn_like(output), *plain, start, end, output, lse, 0.3, True, with_query)
        torch.library.opcheck(backward_op, arguments)


def test_what_the_kernels_do_not_take_is_named(device) -> None:
    query, key, value, log_beta = inputs(4, (1, 1), (8, 8), device, batch=1)
    double = query.double(), key.double(), value.double(), log_beta
    accepted = "query is float64; accepted: bfloat16, float16, float32 \\(TENURE_KERNELS=reference takes others\\)"
    with pytest.raises(ValueError, match=accepted):
        gated_attention(*double, 0.3, implementation="triton")
    with pytest.raises(ValueError, match="query, key and value are float32, float32, bfloat16; one dtype is accepted"):
        gated_attention(query, key, value.bfloat16(), log_beta, 0.3, implementation="triton")
    with pytest.raises(ValueError, match="a head dimension is 257; up to 256 is accepted"):
        wide = inputs(4, (1, 1), (257, 8), device, batch=1)
        gated_attention(*wide, 0.3, implementation="triton")
