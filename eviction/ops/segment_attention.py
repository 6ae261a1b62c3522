"""Attention of one query per head over ragged segments on a CPU, by C kernels.

The entries of a segment are contiguous, or in pages. SDPA needs a call per segment, and its products with the few
queries of a group take several times as long as reading keys and values from memory. The kernels compute all segments
of a layer in one call and read them once, close to the memory's bandwidth. Twins: `naive.segment_attention`,
`naive.paged_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from ...retention.ops.softmax import ORDINARY, Softmax
from . import c_kernels
from .c_kernels import COUNT, FLOAT, POINTER, THREADS, Kernel

DTYPES = (torch.float32, torch.bfloat16)
DIM_MULTIPLE = 8  # of the head dimensions that the kernel takes
ARGUMENTS = (*[POINTER] * 5, COUNT, COUNT, FLOAT, FLOAT, POINTER, THREADS, POINTER)
PAGED_ARGUMENTS = (*[POINTER] * 4, *[COUNT] * 4, FLOAT, THREADS, *[POINTER] * 4)


def find_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax: Softmax = ORDINARY
) -> Kernel | None:
    """The kernel for these arguments of `segment_attention`, or None.

    None where C kernels cannot run (see `c_kernels`), on another device, for another dtype or head dimension, and for a
    query or sinks whose gradient is recorded.
    """
    if key.device.type != "cpu" or query.requires_grad:
        return None
    if softmax.sinks is not None and softmax.sinks.requires_grad and torch.is_grad_enabled():
        return None
    variant = softmax.softcap is not None, softmax.sinks is not None
    macros = _macros(key.dtype, query.shape[2], key.shape[1], value.shape[1], *variant)
    return c_kernels.find_kernel("segment_attention", ARGUMENTS, macros) if macros else None


def find_paged_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """The kernel for these arguments of `paged_attention`, or None, as `find_kernel`."""
    if key.device.type != "cpu" or query.requires_grad:
        return None
    macros = _macros(key.dtype, query.shape[2], key.shape[1], value.shape[1])
    return c_kernels.find_kernel("paged_attention", PAGED_ARGUMENTS, macros, "segment_attention") if macros else None


@cache  # asked in every layer of every token
def _macros(
    dtype: torch.dtype, group: int, head_dim: int, value_dim: int, capped: bool = False, sinks: bool = False
) -> tuple[str, ...]:
    """Those that the kernel is compiled with; none if it does not take such tensors."""
    if dtype not in DTYPES or head_dim % DIM_MULTIPLE or value_dim % DIM_MULTIPLE:
        return ()
    flags = {"BF16": dtype == torch.bfloat16, "CAPPED": capped, "SINKS": sinks}
    sizes = f"GROUP={group}", f"KEY_DIM={head_dim}", f"VALUE_DIM={value_dim}"
    return (*sizes, *(name for name, given in flags.items() if given))


def segment_attention(
    kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor,
    ends: torch.Tensor, scaling: float, softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """Softmax attention of every segment's queries over its entries; products and sums are in fp32.

    Args:
        kernel: what `find_kernel` returned for these tensors.
        query: `(batch, num_kv_heads, group, head_dim)`: one query per head, those that share a key/value head together.
        key, value: `(capacity, head_dim)` and `(capacity, value_dim)`, contiguous, the query's dtype.
        starts, ends: contiguous int64 `(batch * num_kv_heads,)`: segment s is the entries `[starts[s], ends[s])`.
        scaling: factor of the logits.
        softmax: the model's own variant of it, for which `find_kernel` was asked.

    Returns:
        `(batch, num_kv_heads, group, value_dim)`; zeros for an empty segment.
    """
    assert key.is_contiguous() and value.is_contiguous() and query.dtype == key.dtype, "entries are rows of the storage"
    query = query.contiguous()
    out = query.new_empty(*query.shape[:3], value.shape[1])
    sinks = None if softmax.sinks is None else softmax.sinks.detach().float().contiguous()
    assert sinks is None or sinks.numel() == query.shape[1] * query.shape[2], "a sink for each query head"
    kernel(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), starts.data_ptr(), ends.data_ptr(), starts.numel(),
        query.shape[1], scaling, softmax.softcap or 0.0, None if sinks is None else sinks.data_ptr(),
        torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class PageAddresses:
    """The addresses of the pages of some sequences, in CPU memory, for the kernel.

    Attributes:
        rows: int64 `(rows, 6)`, a row for each sequence. Addresses of three arrays of its compressed prompt, or 0:
            int32 pages, int64 index of each segment's first page, int32 entries of each segment. Then the address of
            the int32 pages of whole tokens, a row for each segment; how many numbers such a row has; and the tokens.
        arrays: what lies at the addresses.
        heads: segments of a layer.
        page_size: entries per page.
    """

    rows: np.ndarray
    arrays: Sequence[np.ndarray]
    heads: int
    page_size: int


def paged_attention(
    kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pages: PageAddresses, layer: int,
    scaling: float, out: torch.Tensor, log_sums: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Softmax attention of every sequence's queries over its entries of a layer; products and sums are in fp32.

    Args:
        kernel: what `find_paged_kernel` returned for these tensors.
        query: `(rows, num_kv_heads, group, head_dim)`: one query per head, those that share a key/value head together.
        key, value: `(slots, head_dim)` and `(slots, value_dim)`, contiguous, the query's dtype; slot = page * page_size
            + place.
        layer: counted from 0, in the order of the segments.
        scaling: factor of the logits.
        out, log_sums: the results, contiguous: `(rows, num_kv_heads, group, value_dim)`, the query's dtype, and fp32
            `(rows, num_kv_heads, group)`, the logarithm of the softmax denominator. Without entries zeros, and -inf.
        new: keys `(rows, num_kv_heads, head_dim)` and values of each sequence's last token, which are written first;
            None: they have been written.
    """
    rows, heads = query.shape[:2]
    assert (rows, heads) == (len(pages.rows), pages.heads), "a row of queries for each sequence"
    assert key.is_contiguous() and value.is_contiguous() and query.dtype == key.dtype, "entries are rows of the storage"
    assert out.is_contiguous() and log_sums.is_contiguous() and out.dtype == query.dtype, "results are written in order"
    query = query.contiguous()
    written = (None, None)
    if new is not None:
        new = new[0].contiguous(), new[1].contiguous()
        assert new[0].shape == (rows, heads, key.shape[1]) and new[1].shape == (rows, heads, value.shape[1])
        assert new[0].dtype == key.dtype and new[1].dtype == value.dtype, "entries are written as they are"
        written = new[0].data_ptr(), new[1].data_ptr()
    kernel(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), pages.rows.ctypes.data, rows, layer * heads, heads,
        pages.page_size, scaling, torch.get_num_threads(), *written, out.data_ptr(), log_sums.data_ptr(),
    )  # fmt: skip
