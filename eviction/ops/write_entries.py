"""Writes one entry to each segment of a layer on a CPU, by a C kernel.

Every layer of every decoded token does it, and torch takes several times as long to start three copies as to make them.
Without the kernel `SegmentStore.append` makes them in torch.
"""

from __future__ import annotations

import torch

from .c_kernels import COUNT, POINTER, Kernel, find_kernel

ARGUMENTS = (POINTER, POINTER, COUNT, POINTER, COUNT, POINTER, COUNT, POINTER, *[POINTER] * 3)


class EntryWriter:
    """Appends to the segments of one layer, entry after entry.

    What does not change between tokens is looked up once: between two layers the processor's caches are filled with
    weights, so that whatever Python does there is slow.

    Attributes:
        next_slots: int64 `(segments,)`, the slot of each segment that is written next.
        last_slots: those that were written last; arbitrary before the first entry.
    """

    @classmethod
    def find(
        cls, next_slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor
    ) -> EntryWriter | None:
        """A writer to these buffers, or None: on another device, or where C kernels cannot run (see `c_kernels`).

        Args:
            next_slots: contiguous; becomes the attribute, and is written.
            key, value, position: contiguous `(capacity, head_dim)`, `(capacity, value_dim)`, int32 `(capacity,)`.
        """
        if key.device.type != "cpu":
            return None
        kernel = find_kernel("write_entries", ARGUMENTS, ())
        return None if kernel is None else cls(kernel, next_slots, key, value, position)

    def __init__(
        self, kernel: Kernel, next_slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor
    ) -> None:
        self.next_slots, self.last_slots = next_slots, torch.empty_like(next_slots)
        self._buffers = key, value, position  # the addresses are theirs
        self._kernel = kernel
        self._count = next_slots.numel()
        self._key_bytes, self._value_bytes = key.stride(0) * key.itemsize, value.stride(0) * value.itemsize
        self._places = (
            next_slots.data_ptr(), self.last_slots.data_ptr(), self._count, key.data_ptr(), self._key_bytes,
            value.data_ptr(), self._value_bytes, position.data_ptr(),
        )  # fmt: skip

    def write(self, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor) -> None:
        """Appends an entry to each segment.

        Args:
            key, value: `(…, head_dim)` and `(…, value_dim)` in the order of the segments, the buffers' dtypes.
            position: contiguous int32 `(segments,)`.
        """
        key, value = key.contiguous(), value.contiguous()
        assert key.nbytes == self._count * self._key_bytes and value.nbytes == self._count * self._value_bytes
        self._kernel(*self._places, key.data_ptr(), value.data_ptr(), position.data_ptr())
