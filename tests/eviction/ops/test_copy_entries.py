"""Entries moved between slots, bit for bit, and what leaves pages and comes back into them."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction.ops.copy_entries import copy_entries
from tenure.eviction.storage.packing import entries_at

pytestmark = pytest.mark.usefixtures("nan_outputs")  # also of what is kept between two kernels


@pytest.fixture
def layer(device: str) -> list[torch.Tensor]:
    """Keys, values, positions and a state of a layer; some keys are NaN."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(90, 6, generator=generator).bfloat16()
    key[3] = torch.nan
    value = torch.randn(90, 300, generator=generator).half()  # more words than a tile has
    position = torch.randint(0, 99, (90,), generator=generator).int()
    return [tensor.to(device) for tensor in (key, value, position, torch.randn(90, generator=generator))]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("odd", [False, True])  # entries that are not whole words of 4 bytes
def test_entries_move_and_nothing_else_does(kernels, odd, layer, device, monkeypatch) -> None:
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    if odd:
        layer[0] = layer[0][:, :5].contiguous()
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(90, generator=generator)
    source, target = order[:40].to(device), order[40:80].int().to(device)
    for source_slots, target_slots in ((source, None), (None, target), (source, target), (source[:0], target[:0])):
        others = [torch.full_like(one, 7) for one in layer]
        copy_entries(layer, others, source_slots, target_slots)
        count = 0 if source_slots is not None and not len(source_slots) else 40
        taken = torch.arange(count, device=device) if source_slots is None else source_slots
        given = torch.arange(count, device=device) if target_slots is None else target_slots.long()
        for one, copied in zip(layer, others, strict=True):
            expected = torch.full_like(one, 7)
            expected[given] = one[taken]
            assert torch.equal(bits(copied), bits(expected))


def test_gathered_entries_are_contiguous(layer, device, monkeypatch) -> None:
    monkeypatch.setenv("TENURE_KERNELS", "triton")
    slots = torch.tensor([80, 3, 17], device=device)
    gathered = entries_at({"key": layer[0], "position": layer[2]}, slots)
    assert gathered["key"].shape == (3, 6) and gathered["key"].is_contiguous()
    assert torch.equal(bits(gathered["key"]), bits(layer[0][slots]))
    assert torch.equal(gathered["position"], layer[2][slots])


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_slots_may_be_every_other_one_of_a_tensor(kernels, layer, device, monkeypatch) -> None:
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    slots = torch.arange(80, device=device)[::2]
    moved = [torch.zeros_like(one) for one in layer]
    copy_entries(layer, moved, slots, slots + 1)
    for one, copied in zip(layer, moved, strict=True):
        assert torch.equal(bits(copied[1:80:2]), bits(one[:80:2])) and not copied[:80:2].any()


def test_wrong_inputs_are_named(layer, device) -> None:
    slots = torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"got slots \[\]; accepted: one or two \(count,\), not none"):
        copy_entries(layer, layer, None, None)
    with pytest.raises(ValueError, match=r"got slots \[\(2,\), \(1,\)\]"):
        copy_entries(layer, layer, slots, slots[:1])
    with pytest.raises(ValueError, match=r"entries torch.bfloat16 \(90, 6\) for torch.float16 \(90, 300\); accepted"):
        copy_entries(layer[:1], layer[1:2], slots, None)
    with pytest.raises(ValueError, match="contiguous ones of one dtype"):
        copy_entries([layer[0][:, :2]], [layer[0][:, :2]], slots, None)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_opcheck(kernels, layer, device, monkeypatch) -> None:
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    sources = layer[1:]  # opcheck compares numbers, and NaN is not equal
    slots = torch.tensor([1, 4], device=device)
    targets = [torch.zeros_like(one) for one in sources]
    for arguments in ((slots, None), (None, slots), (slots, slots + 1)):
        torch.library.opcheck(torch.ops.tenure.copy_entries.default, (sources, targets, *arguments, 2))
