"""How much an entry moves the layer's output when it is attended to: the norm of its value behind W_O."""

from __future__ import annotations

import torch

from ...retention.ops.kernel_choice import chosen_kernels

PROJECTED = 2**18  # projected numbers that are held at a time: few enough for a cache of the processor


def value_norms(values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """`‖v_i W_O‖₁`, mean over the query heads of a group.

    Source: CriticalKV (Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation
    Perspective", 2025), section 4.

    Args:
        values: `(batch, num_kv_heads, n, value_dim)`.
        output_weight: `(num_heads, value_dim, hidden_size)`.

    Returns:
        fp32 `(batch, num_kv_heads, n)`.
    """
    if chosen_kernels(values.device) == "triton":
        from ..ops.value_norms import value_norms as norms_by_kernel

        return norms_by_kernel(values, output_weight)
    return norms_by_parts(values, output_weight)


def norms_by_parts(values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """`value_norms` in plain torch, in fp32; a few entries are projected at a time.

    Products of 16-bit numbers are made in fp32 too: processors without 16-bit arithmetic take four times as long for
    them otherwise.
    """
    batch, heads, n, _ = values.shape
    group = output_weight.shape[0] // heads
    flat = values.transpose(0, 1).flatten(1, 2).float()  # (heads, batch * n, value_dim)
    weight = output_weight.float().unflatten(0, (heads, group)).transpose(1, 2).flatten(2)
    columns = weight.shape[2]  # those of all query heads of a group
    norms = values.new_empty(heads, batch * n, dtype=torch.float32)
    size = max(1, PROJECTED // columns)
    projected = norms.new_empty(min(size, batch * n), columns)
    for of_head, matrix, out in zip(flat, weight, norms, strict=True):
        for part, sums in zip(of_head.split(size), out.split(size), strict=True):
            torch.sum(torch.mm(part, matrix, out=projected[: len(part)]).abs_(), 1, out=sums)
    return (norms / group).view(heads, batch, n).transpose(0, 1)
