"""Attention of one query per head over ragged segments on a CPU, by a C kernel.

SDPA needs a call per segment, and its products with the few queries of a group take several times as long as reading
keys and values from memory. The kernel computes all segments of a layer in one call and reads them once, close to the
memory's bandwidth. Twin: `naive.segment_attention`.
"""

from __future__ import annotations

from functools import cache

import torch

from . import c_kernels
from .c_kernels import COUNT, FLOAT, POINTER, THREADS, Kernel

DTYPES = (torch.float32, torch.bfloat16)
DIM_MULTIPLE = 8  # of the head dimensions that the kernel takes
ARGUMENTS = (*[POINTER] * 5, COUNT, FLOAT, THREADS, POINTER)


def find_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """The kernel for these arguments of `segment_attention`, or None.

    None where C kernels cannot run (see `c_kernels`), on another device, for another dtype or head dimension, and for a
    query whose gradient is recorded.
    """
    if key.device.type != "cpu" or query.requires_grad:
        return None
    macros = _macros(key.dtype, query.shape[2], key.shape[1], value.shape[1])
    return c_kernels.find_kernel("segment_attention", ARGUMENTS, macros) if macros else None


@cache  # asked in every layer of every token
def _macros(dtype: torch.dtype, group: int, head_dim: int, value_dim: int) -> tuple[str, ...]:
    """Those that the kernel is compiled with; none if it does not take such tensors."""
    if dtype not in DTYPES or head_dim % DIM_MULTIPLE or value_dim % DIM_MULTIPLE:
        return ()
    macros = f"GROUP={group}", f"KEY_DIM={head_dim}", f"VALUE_DIM={value_dim}"
    return (*macros, "BF16") if dtype == torch.bfloat16 else macros


def segment_attention(
    kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor,
    ends: torch.Tensor, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """Softmax attention of every segment's queries over its entries; products and sums are in fp32.

    Args:
        kernel: what `find_kernel` returned for these tensors.
        query: `(batch, num_kv_heads, group, head_dim)`: one query per head, those that share a key/value head together.
        key, value: `(capacity, head_dim)` and `(capacity, value_dim)`, contiguous, the query's dtype.
        starts, ends: contiguous int64 `(batch * num_kv_heads,)`: segment s is the entries `[starts[s], ends[s])`.
        scaling: factor of the logits.

    Returns:
        `(batch, num_kv_heads, group, value_dim)`; zeros for an empty segment.
    """
    assert key.is_contiguous() and value.is_contiguous() and query.dtype == key.dtype, "entries are rows of the storage"
    query = query.contiguous()
    out = query.new_empty(*query.shape[:3], value.shape[1])
    kernel(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), starts.data_ptr(), ends.data_ptr(), starts.numel(), scaling,
        torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    return out
