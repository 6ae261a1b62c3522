"""Tensors that stand one behind the other in one block of bytes, so that a copy of all of them is one copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

Kind = tuple[torch.dtype, Sequence[int]]  # type and shape of a tensor
Memory = Callable[[int], torch.Tensor]  # gives so many bytes, uint8 `(nbytes,)`, aligned to 16 or more


def views(block: torch.Tensor, kinds: Mapping[str, Kind]) -> dict[str, torch.Tensor]:
    """The tensors of these kinds that stand in uint8 `block` one behind the other, without a gap.

    One that begins at an address that its dtype cannot is a copy; keys, values and their states never do.
    """
    tensors, at = {}, 0
    for name, (dtype, shape) in kinds.items():
        end = at + dtype.itemsize * math.prod(shape)
        part = block[at:end].clone() if at % dtype.itemsize else block[at:end]
        tensors[name] = part.view(dtype).view(shape)
        at = end
    return tensors


def pack(kinds: Mapping[str, Kind], memory: Memory) -> dict[str, torch.Tensor]:
    """Uninitialised tensors of these kinds in one block of `memory`; see `views`."""
    return views(memory(sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds.values())), kinds)


def beside(tensor: torch.Tensor) -> Memory:
    """Memory on the device of `tensor`."""
    return lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=tensor.device)


def as_one(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The bytes of tensors that stand one behind the other, uint8 `(nbytes,)`, a view; None if they do not."""
    storage = tensors[0].untyped_storage()
    start = end = tensors[0].storage_offset() * tensors[0].itemsize
    for tensor in tensors:
        apart = tensor.untyped_storage().data_ptr() != storage.data_ptr() or tensor.device != tensors[0].device
        if apart or tensor.storage_offset() * tensor.itemsize != end or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    return tensors[0].new_empty(0, dtype=torch.uint8).set_(storage, start, (end - start,), (1,))


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copies each source to its target, of the same kind: in one copy if both stand together, queued on a GPU."""
    block, content = as_one(targets), as_one(sources)
    if block is not None and content is not None:
        block.copy_(content, non_blocking=True)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
