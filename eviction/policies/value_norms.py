"""How much an entry moves the layer's output when it is attended to: the norm of its value behind W_O."""

from __future__ import annotations

import torch

from ...retention.ops.kernel_choice import chosen_kernels

PROJECTED = 2**19  # projected numbers that are held at a time: few enough for a cache of the processor


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
    """`value_norms` in plain torch; a few entries are projected at a time."""
    batch, heads, n, _ = values.shape
    group = output_weight.shape[0] // heads
    flat = values.transpose(0, 1).flatten(1, 2)  # (heads, batch * n, value_dim)
    weight = output_weight.to(values.dtype).unflatten(0, (heads, group)).transpose(1, 2).flatten(2)
    columns = weight.shape[2]  # those of all query heads of a group
    norms = values.new_empty(heads, batch * n, dtype=torch.float32)
    size = max(1, PROJECTED // columns)
    projected = values.new_empty(min(size, batch * n), columns)
    for head in range(heads):
        for start in range(0, batch * n, size):
            part = flat[head, start : start + size]
            magnitude = torch.mm(part, weight[head], out=projected[: len(part)]).abs_()
            norms[head, start : start + size] = magnitude.sum(1, dtype=torch.float32)
    return (norms / group).view(heads, batch, n).transpose(0, 1)
