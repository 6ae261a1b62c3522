"""Attention of one query per head over ragged segments on a CPU, by a C kernel that is compiled at its first use.

SDPA needs a call per segment, and its products with the few queries of a group take several times as long as reading
keys and values from memory. The kernel computes all segments of a layer in one call and reads them once, close to the
memory's bandwidth. It needs a C compiler with OpenMP, the one that `CC` names or `cc`; where there is none, callers
keep to SDPA. Twin: `naive.segment_attention`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from ...retention.ops.kernel_choice import VARIABLE, compiles_for_cpu

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
DTYPES = (torch.float32, torch.bfloat16)
DIM_MULTIPLE = 8  # of the head dimensions that the kernel takes


Kernel = Callable[..., None]


def find_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """The kernel for the arguments of `segment_attention`, or None.

    None where it cannot be compiled or does not record what is needed: another device, dtype or head dimension, a
    query with a gradient, or `TENURE_KERNELS` asks for another form. The first call for a shape takes about 0.3 s.

    Raises:
        ValueError: `TENURE_KERNELS` is unknown.
    """
    if key.device.type != "cpu" or query.requires_grad:
        return None
    return _kernel(os.environ.get(VARIABLE), key.dtype, query.shape[2], key.shape[1], value.shape[1])


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


@cache
def _kernel(kernels: str | None, dtype: torch.dtype, group: int, head_dim: int, value_dim: int) -> Kernel | None:
    """The kernel of one shape, or None if it cannot be compiled or loaded here; `kernels` is `TENURE_KERNELS`."""
    if not compiles_for_cpu() or dtype not in DTYPES or head_dim % DIM_MULTIPLE or value_dim % DIM_MULTIPLE:
        return None
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    shape = [f"-DGROUP={group}", f"-DKEY_DIM={head_dim}", f"-DVALUE_DIM={value_dim}"]
    if dtype == torch.bfloat16:
        shape.append("-DBF16")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "segment_attention.so")
        command = [*compiler, *FLAGS, *shape, str(SOURCE), "-o", str(library)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError((done.stderr.strip().splitlines() or ["no output"])[-1])
            kernel = ctypes.CDLL(str(library)).segment_attention  # it stays loaded without its file
        except OSError as error:
            logger.info("decoding on the CPU uses SDPA: %s could not compile its kernel: %s", compiler[0], error)
            return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    kernel.argtypes = [pointer] * 5 + [count, ctypes.c_float, ctypes.c_int, pointer]
    kernel.restype = None
    return kernel
