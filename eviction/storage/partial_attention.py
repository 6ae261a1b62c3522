"""Attention over parts of a context, each with the logarithm of its softmax denominator, and how parts are merged.

Softmax attention over a context that lies in several places is the mean of the parts' results, weighted by their
denominators (flash-decoding; Dao et al. 2023). So nothing has to be copied together.
"""

from __future__ import annotations

import torch

HIDDEN = float("-inf")
# Output `(…, n, value_dim)`, and the logarithm of its softmax denominator, fp32 `(…, n)`.
Part = tuple[torch.Tensor, torch.Tensor]


def attend_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, mask: torch.Tensor | None = None,
    causal: bool = False,
) -> Part:  # fmt: skip
    """Attention of `query` over one part of its context.

    Args:
        query: `(batch, heads, n, head_dim)`.
        key, value: `(batch, heads, entries, dim)`, of the same dtype; may be expanded views.
        mask: added to the logits, broadcast to `(batch, heads, n, entries)`, the query's dtype.
        causal: query i sees the first i + 1 entries; needs as many entries as queries.
    """
    if query.device.type == "cpu" and key.shape[-1] == value.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scaling
        )
    logits = (query.float() @ key.float().transpose(-1, -2)) * scaling
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits.masked_fill_(hidden, HIDDEN)
    if mask is not None:
        logits += mask
    log_sum = logits.logsumexp(-1)
    return ((logits - log_sum.unsqueeze(-1)).exp() @ value.float()).to(value.dtype), log_sum


def merged(outputs: torch.Tensor, log_sums: torch.Tensor) -> torch.Tensor:
    """The attention over all parts, fp32; of a single part itself.

    Args:
        outputs: `(parts, …, value_dim)`. log_sums: fp32 `(parts, …)`; -inf where there is no such part.

    Returns:
        `(…, value_dim)`.
    """
    if len(outputs) == 1:
        return outputs[0]
    weights = log_sums.softmax(0).unsqueeze(-1)
    return (weights * outputs).sum(0)
