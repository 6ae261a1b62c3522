"""Tensors in one block of bytes."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction.storage.packing import as_one, copy_all, memory_like, pack

KINDS = {
    "key": (torch.bfloat16, (2, 3, 4)),
    "none": (torch.float32, (0, 4)),
    "state": (torch.float32, (5,)),
    "text": (torch.uint8, (7,)),
}


def packed(kinds=KINDS) -> list[torch.Tensor]:
    tensors = pack(kinds, memory_like(torch.empty(0)))
    assert {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()} == kinds
    return list(tensors.values())


def test_what_is_packed_is_one():
    tensors = packed()
    block = as_one(tensors)
    assert block is not None and block.dtype == torch.uint8 and block.shape == (2 * 24 + 4 * 5 + 7,)
    block.copy_(torch.arange(len(block)))
    assert tensors[3].tolist() == list(range(68, 75))
    part = as_one(tensors[1:])
    assert part is not None and part.data_ptr() == tensors[2].data_ptr() and len(part) == 27


@pytest.mark.parametrize(
    "apart",
    [
        lambda tensors: tensors[::-1],
        lambda tensors: [tensors[0], tensors[3]],
        lambda tensors: [tensors[0], tensors[2].clone()],
        lambda tensors: [tensors[0].transpose(0, 1), *tensors[1:]],
    ],
)
def test_what_stands_elsewhere_is_not(apart):
    assert as_one(apart(packed())) is None


def test_a_kind_that_cannot_begin_there_has_memory_of_its_own():
    tensors = packed({"text": (torch.uint8, (7,)), "state": (torch.float32, (5,))})
    assert as_one(tensors) is None and as_one(tensors[:1]) is not None


@pytest.mark.parametrize("together", [True, False])
def test_one_copy_of_all_if_both_stand_together(together, monkeypatch):
    sources, targets = packed(), packed()
    generator = torch.Generator().manual_seed(0)
    for one in sources:
        one.copy_(torch.randint(0, 100, one.shape, generator=generator))
    given = sources if together else [one.clone() for one in sources]
    copies, real = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda one, *rest, **how: copies.append(one) or real(one, *rest, **how))
    copy_all(targets, given)
    assert len(copies) == (1 if together else 4)
    assert all(torch.equal(one, other) for one, other in zip(sources, targets, strict=True))
