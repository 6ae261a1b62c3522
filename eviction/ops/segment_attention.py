"""Attention of one query per head over ragged segments on a CPU, by a C kernel that is compiled at its first use.

The entries of a segment are contiguous, or in pages. SDPA needs a call per segment, and its products with the few
queries of a group take several times as long as reading keys and values from memory. The kernel computes all segments
of a layer in one call and reads them once, close to the memory's bandwidth. It needs a C compiler with OpenMP, the one
that `CC` names or `cc`; where there is none, callers keep to SDPA. Twins: `naive.segment_attention`,
`naive.paged_attention`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from ...retention.ops.kernel_choice import VARIABLE, compiles_for_cpu

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
DTYPES = (torch.float32, torch.bfloat16)
DIM_MULTIPLE = 8  # of the head dimensions that the kernel takes


Kernel = Callable[..., None]


@dataclass(frozen=True)
class Kernels:
    """The kernels of one shape: of `segment_attention`, and of `paged_attention`."""

    contiguous: Kernel
    paged: Kernel


def find_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """The kernel for the arguments of `segment_attention`, or None, see `find_kernels`."""
    found = find_kernels(query, key, value)
    return None if found is None else found.contiguous


def find_kernels(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Kernels | None:
    """The kernels for queries, keys and values as the two functions take them, or None.

    None where it cannot be compiled or does not record what is needed: another device, dtype or head dimension, a
    query with a gradient, or `TENURE_KERNELS` asks for another form. The first call for a shape takes about 0.3 s.

    Raises:
        ValueError: `TENURE_KERNELS` is unknown.
    """
    if key.device.type != "cpu" or query.requires_grad:
        return None
    return _compiled(os.environ.get(VARIABLE), key.dtype, query.shape[2], key.shape[1], value.shape[1])


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


@dataclass(frozen=True)
class PageAddresses:
    """Where the kernel finds the pages of some sequences, in CPU memory.

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
        kernel: what `find_kernels` returned for these tensors, the paged one.
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


@cache
def _compiled(kernels: str | None, dtype: torch.dtype, group: int, head_dim: int, value_dim: int) -> Kernels | None:
    """The kernels of one shape, or None if they cannot be compiled or loaded here; `kernels` is `TENURE_KERNELS`."""
    if not compiles_for_cpu() or dtype not in DTYPES or head_dim % DIM_MULTIPLE or value_dim % DIM_MULTIPLE:
        return None
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    shape = [f"-DGROUP={group}", f"-DKEY_DIM={head_dim}", f"-DVALUE_DIM={value_dim}"]
    if dtype == torch.bfloat16:
        shape.append("-DBF16")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "segment_attention.so")
        command = [*compiler, *FLAGS, *shape, str(SOURCE), "-o", str(library), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError((done.stderr.strip().splitlines() or ["no output"])[-1])
            loaded = ctypes.CDLL(str(library))  # it stays loaded without its file
        except OSError as error:
            logger.info("decoding on the CPU uses SDPA: %s could not compile its kernel: %s", compiler[0], error)
            return None
    pointer, count, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    loaded.segment_attention.argtypes = [*[pointer] * 5, count, number, threads, pointer]
    loaded.paged_attention.argtypes = [*[pointer] * 4, *[count] * 4, number, threads, *[pointer] * 4]
    loaded.segment_attention.restype = loaded.paged_attention.restype = None
    return Kernels(loaded.segment_attention, loaded.paged_attention)
