"""The window's worst case and the value term against the policies' own functions in fp64 or fp32."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction.ops import naive
from tenure.eviction.ops.value_norms import value_norms_by_kernel
from tenure.eviction.ops.window_risk import window_risk

pytestmark = pytest.mark.usefixtures("nan_outputs")  # also of what is kept between two kernels


def layer(batch, heads, group, window, dim, n, dtype, lengths, device, missing=0):
    """Queries, keys with NaN behind each head's entries, positions and where the window begins."""
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(batch, window, heads * group, dim, generator=generator).to(dtype).transpose(1, 2) * 2
    key = torch.randn(batch, heads, n, dim, generator=generator).to(dtype)
    tokens = n + 20
    positions = torch.full((batch, heads, n), -1)
    for segment, length in enumerate(lengths or [n] * (batch * heads)):
        row, head = divmod(segment, heads)
        positions[row, head, :length] = torch.randperm(tokens, generator=generator)[:length].sort().values
        key[row, head, length:] = torch.nan
    asked = torch.arange(tokens - window, tokens).repeat(batch, 1)
    asked[0, :missing] = -1
    limit = torch.full((batch,), tokens - window)
    limit[1:] = 3  # a row where next to nothing is older than the window
    return [tensor.to(device) for tensor in (query, key, positions, asked, limit)]


@pytest.mark.parametrize(
    ("batch", "heads", "group", "window", "dim", "n", "dtype", "kernel", "lengths", "missing"),
    [
        (1, 2, 2, 8, 8, 50, torch.float32, 5, None, 0),
        (2, 2, 3, 7, 8, 201, torch.float32, 9, [0, 13, 201, 150], 3),
        (1, 1, 4, 32, 16, 130, torch.bfloat16, 1, None, 0),
        (1, 1, 1, 3, 20, 5, torch.float16, 33, None, 3),
    ],
)
def test_worst_case_and_mean_equal_those_of_the_policies(
    batch, heads, group, window, dim, n, dtype, kernel, lengths, missing, device, triton_kernels
):
    query, key, positions, asked, limit = layer(batch, heads, group, window, dim, n, dtype, lengths, device, missing)
    worst, mean = window_risk(query, key, positions, asked, limit, 0.4, kernel, mean=True)
    alone, none = window_risk(query, key, positions, asked, limit, 0.4, kernel)
    expected = naive.window_risk(query, key.nan_to_num(), positions, asked, limit, 0.4, kernel, True)
    there = positions >= 0
    assert mean is not None and none is None and torch.equal(alone, worst)
    torch.testing.assert_close(worst[there], expected[0][there], atol=1e-7, rtol=3e-6)
    torch.testing.assert_close(mean[there], expected[1][there], atol=1e-7, rtol=3e-6)
    assert not worst[~there].any() and not worst.isnan().any()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_value_norms_equal_those_of_the_policies(dtype, rtol, device, triton_kernels):
    """The twin rounds the product to the values' dtype, the kernel does not."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 167, 2, 20, generator=generator).to(device=device, dtype=dtype).transpose(1, 2)
    weight = torch.randn(6, 20, 300, generator=generator).to(device)
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2)  # a view of the projection, as a model has it
    got = value_norms_by_kernel(values, weight)
    assert got.shape == (2, 2, 167) and got.dtype == torch.float32
    torch.testing.assert_close(got, naive.value_norms(values, weight), atol=0, rtol=rtol)


def test_wrong_inputs_are_named(device):
    query, key, positions, asked, limit = layer(1, 2, 1, 3, 8, 9, torch.float32, None, device)
    with pytest.raises(ValueError, match=r"pooling of 4; accepted: odd widths up to 33"):
        window_risk(query, key, positions, asked, limit, 0.4, 4)
    with pytest.raises(ValueError, match=r"queries torch.float32 and keys torch.float64"):
        window_risk(query, key.double(), positions, asked, limit, 0.4, 5)
    with pytest.raises(ValueError, match=r"positions \(1, 2, 8\)"):
        window_risk(query, key, positions[..., 1:], asked, limit, 0.4, 5)
    with pytest.raises(ValueError, match=r"and a limit \(2,\).*accepted: .* and \(batch,\)"):
        window_risk(query, key, positions, asked, limit.repeat(2), 0.4, 5)
    with pytest.raises(ValueError, match=r"queries \(2, 2, 3, 8\) and keys \(1, 2, 9, 8\)"):
        window_risk(query.repeat(2, 1, 1, 1), key, positions, asked, limit, 0.4, 5)
    with pytest.raises(ValueError, match=r"window risk got 300 numbers a head; accepted: at most 256"):
        window_risk(torch.zeros(1, 2, 3, 300), torch.zeros(1, 2, 9, 300), positions, asked, limit, 0.4, 5)
    with pytest.raises(ValueError, match=r"values torch.float64 .*accepted: .* of torch.float16"):
        value_norms_by_kernel(key.double(), torch.zeros(2, 8, 5, device=device))
    with pytest.raises(ValueError, match=r"W_O \(3, 8, 5\)"):
        value_norms_by_kernel(key, torch.zeros(3, 8, 5, device=device))


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_opcheck(kernels, device, monkeypatch):
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    query, key, positions, asked, limit = layer(1, 2, 2, 3, 8, 9, torch.float32, None, device)
    for mean in (False, True):
        arguments = (query, key, positions, asked, limit, 0.4, 5, mean)
        torch.library.opcheck(torch.ops.tenure.window_risk.default, arguments)
    weight = torch.randn(4, 8, 11, device=device)
    torch.library.opcheck(torch.ops.tenure.value_norms.default, (key, weight))
