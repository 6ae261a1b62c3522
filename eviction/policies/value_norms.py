"""How much an entry moves the layer's output when it is attended to: the norm of its value behind W_O."""

from __future__ import annotations

import torch

PROJECTED = 4096  # projected values, of query heads and entries, that are held at a time


def value_norms(values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """`‖v_i W_O‖₁`, mean over the query heads of a group; a few entries are projected at a time.

    Source: CriticalKV (Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation
    Perspective", 2025), section 4.

    Args:
        values: `(batch, num_kv_heads, n, value_dim)`.
        output_weight: `(num_heads, value_dim, hidden_size)`.

    Returns:
        fp32 `(batch, num_kv_heads, n)`.
    """
    batch, heads, n, _ = values.shape
    weight = output_weight.to(values.dtype).unflatten(0, (heads, -1))
    flat = values.transpose(0, 1).flatten(1, 2)  # (heads, batch * n, value_dim): the weight is not repeated for rows
    norms = [
        (part.unsqueeze(1) @ weight).abs().sum(-1, dtype=torch.float32).mean(1)
        for part in flat.split(max(1, PROJECTED // output_weight.shape[0]), dim=1)
    ]
    return torch.cat(norms, dim=1).view(heads, batch, n).transpose(0, 1)
