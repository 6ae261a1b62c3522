"""Plain-torch twins of every clever formula in this package: quadratic memory, any dtype, the reference in tests."""

from __future__ import annotations

import torch

from ..segments import Segments
from .softmax import ORDINARY, Softmax


def allowed(segments: Segments) -> torch.Tensor:
    """`(batch, 1, seq_len, seq_len)` bool: may query t (row) attend to key i (column)?"""
    document = segments.document
    same = (document[:, :, None] == document[:, None, :]) & (document[:, :, None] >= 0)
    return (same & same.new_ones(same.shape[-2:]).tril())[:, None]


def distance(segments: Segments) -> torch.Tensor:
    """`(batch, 1, seq_len, seq_len)` int64: t - i inside a document, 0 where the pair is not allowed."""
    position = segments.position
    return torch.where(allowed(segments), (position[:, :, None] - position[:, None, :])[:, None], 0)


def gated_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
    segments: Segments, softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """Same contract as `retention.ops.gated_attention`, computed with the explicit bias."""
    groups = query.shape[1] // key.shape[1]
    key, value, log_beta = (x.repeat_interleave(groups, dim=1) for x in (key, value, log_beta))
    mask = allowed(segments)
    logits = softmax.capped(query @ key.transpose(-1, -2) * scaling) + distance(segments) * log_beta[:, :, None, :]
    logits = logits.masked_fill(~mask, float("-inf"))
    padding = ~mask.any(-1, keepdim=True)
    weights = softmax.weights(logits.masked_fill(padding, 0.0)).masked_fill(padding, 0.0)
    return weights.to(value.dtype) @ value


def gated_attention_after(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
    softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """Same contract as `retention.ops.gated_attention_after`, computed with the explicit bias."""
    index = torch.arange(key.shape[2], device=key.device)
    age = index[key.shape[2] - query.shape[2] :, None] - index
    return _after(query, key, value, age.clamp_min(0) * log_beta[:, :, None, :], scaling, softmax)


def biased_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float,
    softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """Same contract as `retention.ops.biased_attention`, computed with the explicit bias."""
    return _after(query, key, value, bias[:, :, None, :], scaling, softmax)


def _after(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float, softmax: Softmax
) -> torch.Tensor:
    """Attention of the last queries; `bias` `(batch, num_kv_heads, q_len or 1, seq_len)` is added to the logits."""
    groups, (q_len, seq_len) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value, bias = (x.repeat_interleave(groups, dim=1) for x in (key, value, bias))
    future = torch.ones(q_len, seq_len, dtype=torch.bool, device=query.device).triu(seq_len - q_len + 1)
    logits = softmax.capped(query @ key.transpose(-1, -2) * scaling) + bias
    return softmax.weights(logits.masked_fill(future, float("-inf"))).to(value.dtype) @ value


def occupancy(log_beta: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Same contract as `retention.ops.occupancy`, with the T x T matrix."""
    terms = torch.exp(distance(segments) * log_beta[..., None, :])
    return terms.masked_fill(~allowed(segments), 0.0).sum(-1)
