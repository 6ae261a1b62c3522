"""Pages gathered into one buffer and scattered from it, bit for bit."""

from __future__ import annotations

import pytest
import torch

from tenure.retention.ops.kernel_choice import interpreting
from tenure.serving.ops.page_copies import gather_pages, scatter_pages, staging_bytes


@pytest.fixture
def layer() -> list[torch.Tensor]:
    """Keys, values, positions and a state of a layer in pages; some keys are NaN."""
    device = "cpu" if interpreting() else "cuda"
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(9, 16, 6, generator=generator).bfloat16()
    key[3] = torch.nan
    value = torch.randn(9, 16, 160, generator=generator).half()  # more than a program copies
    position = torch.randint(0, 99, (9, 16), generator=generator).int()
    return [tensor.to(device) for tensor in (key, value, position, torch.randn(9, 16, generator=generator))]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("ids", [[3], [8, 0, 3, 5], []])
def test_a_round_trip_moves_pages_and_nothing_else(kernels, ids, layer, monkeypatch):
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    device = layer[0].device
    source = torch.tensor(ids, dtype=torch.int32, device=device)
    target = torch.tensor([8 - number for number in ids], dtype=torch.int32, device=device)
    # A slice of a staging buffer with something behind it.
    size = staging_bytes(layer, len(ids))
    staging = torch.full((4 + size + 4,), 7, dtype=torch.uint8, device=device)
    buffer = staging[4 : 4 + size]
    gather_pages(layer, source, buffer)
    assert torch.equal(buffer, torch.cat([bits(one[source.long()]).flatten() for one in layer]))
    assert staging[:4].eq(7).all() and staging[4 + size :].eq(7).all()
    other = [torch.zeros_like(one) for one in layer]
    scatter_pages(buffer, target, other)
    for one, copied in zip(layer, other, strict=True):
        expected = torch.zeros_like(one)
        expected[target.long()] = one[source.long()]
        assert torch.equal(bits(copied), bits(expected))


def test_wrong_inputs_are_named(layer):
    ids = torch.zeros(1, dtype=torch.int32, device=layer[0].device)
    buffer = torch.zeros(8, dtype=torch.uint8, device=layer[0].device)
    with pytest.raises(ValueError, match=r"buffer torch.uint8 \(8,\); accepted: .* torch.uint8 \(192,\)"):
        gather_pages(layer[:1], ids, buffer)
    with pytest.raises(ValueError, match=r"pages \[\(9, 3\)\] of a part of a word"):
        gather_pages([layer[0][:, 0, :3].contiguous()], ids, buffer)
    with pytest.raises(ValueError, match="some with gaps"):
        scatter_pages(buffer, ids, [layer[0][:, 0]])


def test_opcheck(layer, monkeypatch):
    monkeypatch.setenv("TENURE_KERNELS", "reference")
    pages = layer[1:]  # opcheck compares numbers, and NaN is not equal
    ids = torch.tensor([1, 4], dtype=torch.int32, device=layer[0].device)
    buffer = torch.zeros(staging_bytes(pages, 2), dtype=torch.uint8, device=layer[0].device)
    torch.library.opcheck(torch.ops.tenure.gather_pages.default, (pages, ids, buffer))
    torch.library.opcheck(torch.ops.tenure.scatter_pages.default, (buffer, ids, pages))
