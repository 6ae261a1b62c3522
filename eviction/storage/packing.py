"""Several tensors in one block of bytes, so that all of them are copied at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ..ops.copy_entries import copy_entries

TensorKind = tuple[torch.dtype, Sequence[int]]  # dtype and shape of a tensor
Allocator = Callable[[int], torch.Tensor]  # allocates so many bytes: uint8 `(nbytes,)`, aligned to 16 bytes or more


def views(block: torch.Tensor, kinds: Mapping[str, TensorKind]) -> dict[str, torch.Tensor]:
    """The tensors of these kinds, in uint8 `block` contiguously and without a gap.

    A tensor whose address is not aligned to its dtype is a copy; keys, values and their states are always aligned.
    """
    tensors, at = {}, 0
    for name, (dtype, shape) in kinds.items():
        end = at + dtype.itemsize * math.prod(shape)
        part = block[at:end].clone() if at % dtype.itemsize else block[at:end]
        tensors[name] = part.view(dtype).view(shape)
        at = end
    return tensors


def pack(kinds: Mapping[str, TensorKind], allocate: Allocator) -> dict[str, torch.Tensor]:
    """Uninitialised tensors of these kinds in one allocated block; see `views`."""
    return views(allocate(sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds.values())), kinds)


def memory_like(tensor: torch.Tensor) -> Allocator:
    """Allocates memory on the device of `tensor`."""
    return lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=tensor.device)


def as_one(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The bytes of contiguously stored tensors, uint8 `(nbytes,)`, a view; None if they are not contiguous."""
    storage = tensors[0].untyped_storage()
    start = end = tensors[0].storage_offset() * tensors[0].itemsize
    for tensor in tensors:
        apart = tensor.untyped_storage().data_ptr() != storage.data_ptr() or tensor.device != tensors[0].device
        if apart or tensor.storage_offset() * tensor.itemsize != end or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    return tensors[0].new_empty(0, dtype=torch.uint8).set_(storage, start, (end - start,), (1,))


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copies each source to its target, of the same kind: as one copy if both are packed; asynchronously on a GPU."""
    block, content = as_one(targets), as_one(sources)
    if block is not None and content is not None:
        block.copy_(content, non_blocking=True)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


def entries_at(buffers: Mapping[str, torch.Tensor], slots: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copies the entries of a layer at `slots`, int64 `(count,)`: by name `(count, ...)`, packed in one block."""
    kinds = {name: (buffer.dtype, (len(slots), *buffer.shape[1:])) for name, buffer in buffers.items()}
    gathered = pack(kinds, memory_like(slots))
    copy_entries(list(buffers.values()), list(gathered.values()), slots, None)
    return gathered
