"""Value norms `‖v W_O‖₁`: the effect of an entry's value on the layer's output, without storing the product.

On a GPU by a Triton kernel, on a CPU by one in C. Twin: `naive.norms_by_parts`, which stores the products of a few
entries at a time.
"""

from __future__ import annotations

import torch

from ...retention.ops.kernel_choice import (
    LAUNCH_OPTIONS,
    chosen_kernels,
    dot_precision,
    launching_on,
    multiplies_bf16,
    multiplies_bf16_tiles,
)
from ...retention.ops.triton_language import dot, jit, tl
from . import naive
from .c_kernels import COUNT, POINTER, THREADS, Kernel, find_kernel
from .naive import by_head, norms_by_parts
from .paged_attention import DTYPES, MAX_DIM
from .window_risk import dense, power

TILE_COLUMNS = 16  # of the weight in one of AMX's tiles
TILE_DTYPES = (torch.float32, torch.bfloat16)  # fp32 as sums of two bf16 numbers


@jit
def project_norms(
    values, weight, norms, heads, n, hidden, value_row, value_head, value_token, weight_head, weight_dim,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of entries, segments): `‖v_i W_O‖₁`, mean over the group, some columns of the product at a time."""
    segment = tl.program_id(1)
    batch, head = segment // heads, segment % heads
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim, column = tl.arange(0, DIM_BLOCK), tl.arange(0, COLUMNS)
    at = batch.to(tl.int64) * value_row + head.to(tl.int64) * value_head + entry.to(tl.int64) * value_token
    whole = (entry < n)[:, None] & (dim < DIM)[None, :]
    v = tl.load(values + at[:, None] + dim[None, :], mask=whole, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(hidden, COLUMNS)
    for step in range(0, GROUP * blocks):
        member, first = step // blocks, (step % blocks) * COLUMNS
        line = (head * GROUP + member).to(tl.int64) * weight_head + dim.to(tl.int64) * weight_dim
        inside = (dim < DIM)[:, None] & (first + column < hidden)[None, :]
        w = tl.load(weight + line[:, None] + (first + column)[None, :], mask=inside, other=0.0)
        total += tl.sum(tl.abs(dot(v, w, None, PRECISION)), 1)
    tl.store(norms + segment.to(tl.int64) * n + entry, total / GROUP, mask=entry < n)


def _launch(values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    values, weight = dense(values), dense(output_weight.to(values.dtype))
    (batch, heads, n, dim), hidden = values.shape, weight.shape[2]
    norms = values.new_zeros(batch, heads, n, dtype=torch.float32)
    if not norms.numel():
        return norms
    sizes = tile_sizes(dim, values.element_size())
    with launching_on(values):
        project_norms[(-(-n // sizes["BLOCK"]), batch * heads)](
            values, weight, norms, heads, n, hidden, *values.stride()[:3], *weight.stride()[:2],
            GROUP=weight.shape[0] // heads, DIM=dim, DIM_BLOCK=power(dim), PRECISION=dot_precision(values.dtype),
            **sizes, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return norms


def tile_sizes(dim: int, itemsize: int) -> dict[str, int]:
    """Entries and columns of a tile, and warps and stages of `project_norms`; those that compile without spills.

    A tile reads all of its group's W_O, so the more entries the better.
    """
    if itemsize == 4:  # multiplied without tensor cores, in registers
        return {"BLOCK": 32, "COLUMNS": 32, "num_warps": 8, "num_stages": 1}
    if dim > 128:
        return {"BLOCK": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK": 128, "COLUMNS": 128, "num_warps": 8, "num_stages": 2}


@torch.library.custom_op("tenure::value_norms", mutates_args=())
def _value_norms(values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    run = _launch if chosen_kernels(values.device) == "triton" else naive.value_norms
    return run(values, output_weight)


@_value_norms.register_fake
def _(values, output_weight):
    return values.new_empty(values.shape[:3], dtype=torch.float32)


def value_norms_by_kernel(values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """`value_norms` of fp16, bf16 or fp32 values by the kernel, W_O in their dtype; no product is stored.

    Raises:
        ValueError: shapes or dtypes that the operation does not take.
    """
    heads, dim = output_weight.shape[0], output_weight.shape[1]
    if values.dtype not in DTYPES or values.ndim != 4 or heads % values.shape[1] or dim != values.shape[3]:
        raise ValueError(
            f"value norms got values {values.dtype} {tuple(values.shape)} and W_O {tuple(output_weight.shape)}; "
            f"accepted: (batch, num_kv_heads, n, value_dim) of {', '.join(map(str, DTYPES))}, and (num_heads, "
            "value_dim, hidden_size) with a multiple of num_kv_heads heads"
        )
    if dim > MAX_DIM:
        raise ValueError(f"value norms got {dim} numbers a head; accepted: at most {MAX_DIM}")
    return _value_norms(values, output_weight)


def value_norms(values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """`‖v_i W_O‖₁`, mean over the query heads of a group.

    On a CPU products of bf16 numbers are exact, and sums are fp32. On one with AMX fp32 numbers are divided into two of
    bf16, which leaves out 2^-16 of a product at most.

    Source: CriticalKV (Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation
    Perspective", 2025), section 4.

    Args:
        values: `(batch, num_kv_heads, n, value_dim)`.
        output_weight: `(num_heads, value_dim, hidden_size)`.

    Returns:
        fp32 `(batch, num_kv_heads, n)`.
    """
    if chosen_kernels(values.device) == "triton":
        return value_norms_by_kernel(values, output_weight)
    tiles = find_tile_kernel(values, output_weight)
    if tiles is not None:
        return norms_in_tiles(tiles, values, output_weight)
    found = find_norm_kernel(values, output_weight)
    return norms_by_parts(values, output_weight) if found is None else norms_in_c(*found, values, output_weight)


def bf16_of_both(values: torch.Tensor, output_weight: torch.Tensor) -> bool:
    return values.dtype == output_weight.dtype == torch.bfloat16


def find_tile_kernel(values: torch.Tensor, output_weight: torch.Tensor) -> Kernel | None:
    """The C kernel for these arguments of `norms_in_tiles`, which needs AMX; None if there is none, see `c_kernels`."""
    dim, dtype = values.shape[3], values.dtype
    if dtype not in TILE_DTYPES or output_weight.dtype != dtype or dim % 32 or not multiplies_bf16_tiles(values.device):
        return None
    arguments = POINTER, *(COUNT,) * 2, POINTER, *(COUNT,) * 5, THREADS, POINTER, POINTER
    defines = (f"DIM={dim}", "BF16") if dtype == torch.bfloat16 else (f"DIM={dim}",)
    return find_kernel("value_norms_amx", arguments, defines)


def norms_in_tiles(kernel: Kernel, values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """`value_norms` of values and weight of one dtype, bf16 or fp32, by what `find_tile_kernel` returned."""
    (batch, heads, n, dim), threads = values.shape, torch.get_num_threads()
    values, weight = dense(values.detach()), output_weight.detach().unflatten(0, (heads, -1))
    members, columns = weight.shape[1], weight.shape[3]
    parts = 1 if values.dtype == torch.bfloat16 else 2
    padded = -(-columns // TILE_COLUMNS) * TILE_COLUMNS
    panel = values.new_empty(parts * members * padded * dim, dtype=torch.bfloat16)  # a head's weight in tiles
    norms = values.new_empty(batch, heads, n, dtype=torch.float32)
    for of_head, matrix, out in zip(values.transpose(0, 1), weight, norms.transpose(0, 1), strict=True):
        for row, into in zip(of_head, out, strict=True):
            kernel(
                row.data_ptr(), row.stride(0), n, matrix.data_ptr(), *matrix.stride(), members, columns, threads,
                panel.data_ptr(), into.data_ptr(),
            )  # fmt: skip
    return norms


def find_norm_kernel(values: torch.Tensor, output_weight: torch.Tensor) -> tuple[Kernel, torch.dtype] | None:
    """The C kernel for these arguments of `norms_in_c` and the dtype in which it takes them; see `c_kernels`."""
    dim = values.shape[3]
    if values.device.type != "cpu" or dim > MAX_DIM:
        return None
    arguments, shape = (POINTER, POINTER, COUNT, COUNT, THREADS, POINTER), f"DIM={dim}"
    if bf16_of_both(values, output_weight) and multiplies_bf16(values.device) and dim % 2 == 0:
        kernel = find_kernel("value_norms", arguments, (shape, "BF16"))
        if kernel is not None:
            return kernel, torch.bfloat16
    kernel = find_kernel("value_norms", arguments, (shape,))
    return None if kernel is None else (kernel, torch.float32)


def norms_in_c(kernel: Kernel, dtype: torch.dtype, values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """`value_norms` by what `find_norm_kernel` returned: exact products, summed in fp32; none is stored."""
    batch, heads, n, _ = values.shape
    flat, weight = by_head(values.detach(), output_weight.detach(), dtype)
    norms = flat.new_empty(heads, batch * n, dtype=torch.float32)
    for of_head, matrix, out in zip(flat, weight, norms, strict=True):
        threads = torch.get_num_threads()
        kernel(of_head.data_ptr(), matrix.data_ptr(), batch * n, matrix.shape[1], threads, out.data_ptr())
    return norms.div_(output_weight.shape[0] // heads).view(heads, batch, n).transpose(0, 1)
