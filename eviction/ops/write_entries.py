"""Writes one entry to each segment of a layer on a CPU, by a C kernel.

Every layer of every decoded token does it, and torch takes several times as long to start three copies as to make them.
Without the kernel `SegmentStore.append` makes them in torch.
"""

from __future__ import annotations

import torch

from .c_kernels import COUNT, POINTER, Kernel, find_kernel

ARGUMENTS = (POINTER, POINTER, COUNT, POINTER, POINTER, COUNT, POINTER, POINTER, COUNT, POINTER, POINTER)


def find_write_kernel(device: torch.device) -> Kernel | None:
    """The kernel, or None: on another device, or where C kernels cannot run (see `c_kernels`)."""
    return find_kernel("write_entries", ARGUMENTS, ()) if device.type == "cpu" else None


def write_entries(
    kernel: Kernel, next_slots: torch.Tensor, last_slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    position: torch.Tensor, new_key: torch.Tensor, new_value: torch.Tensor, new_position: torch.Tensor,
) -> None:  # fmt: skip
    """Writes to slot `next_slots[s]` of the buffers the s-th new entry, notes that slot, and goes on to the one after.

    Args:
        kernel: what `find_write_kernel` returned.
        next_slots, last_slots: contiguous int64 `(segments,)`; both are written.
        key, value, position: contiguous `(capacity, head_dim)`, `(capacity, value_dim)`, int32 `(capacity,)`.
        new_key, new_value, new_position: `(…, head_dim)`, `(…, value_dim)` of the same dtypes, int32 `(segments,)`, in
            the order of the segments.
    """
    new_key, new_value, new_position = new_key.contiguous(), new_value.contiguous(), new_position.contiguous()
    count = next_slots.numel()
    key_bytes, value_bytes = new_key.nbytes // count, new_value.nbytes // count
    assert key_bytes == key.stride(0) * key.itemsize and value_bytes == value.stride(0) * value.itemsize
    assert new_key.dtype == key.dtype and new_value.dtype == value.dtype and new_position.numel() == count
    kernel(
        next_slots.data_ptr(), last_slots.data_ptr(), count, key.data_ptr(), new_key.data_ptr(), key_bytes,
        value.data_ptr(), new_value.data_ptr(), value_bytes, position.data_ptr(), new_position.data_ptr(),
    )  # fmt: skip
