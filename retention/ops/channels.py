"""Retention-gated attention by two extra channels, over `scaled_dot_product_attention` (see `gated_attention`).

`(t-i)·log β_i = t·log β_i - i·log β_i` has rank 2 in (t, i). So `[t, 1]` appended to the scaled query and
`[log β_i, -i·log β_i]` appended to the key turn the gated attention into ordinary attention, which any fused kernel
computes exactly, with gradients, in memory linear in the sequence length. The two products cancel, so this form runs in
fp32: with positions centred the error of a logit is at most about `seq_len / 2 · max|log β| · 6e-8`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..segments import Segments

CHANNEL_MULTIPLE = 8  # fused CPU and CUDA kernels want head dimensions that are multiples of 8


def channels(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
    segments: Segments, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Same contract as `gated_attention`, in fp32 (fp64 for fp64 inputs); `sinks` as in `softmax.Softmax`."""
    if segments.dense:
        return channels_after(query, key, value, log_beta, scaling, sinks)
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    for row, start, end in segments.spans:
        part = slice(row, row + 1), slice(None), slice(start, end)
        output[part] = channels_after(query[part], key[part], value[part], log_beta[part], scaling, sinks)
    return output


def channels_after(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Same contract as `gated_attention_after`, in fp32 (fp64 for fp64 inputs)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q_len, seq_len = query.shape[-2], key.shape[-2]
    position = torch.arange(seq_len, dtype=dtype, device=query.device) - (seq_len - 1) / 2
    log_beta = log_beta.to(dtype)
    time = torch.stack((position, torch.ones_like(position)), dim=-1)[seq_len - q_len :]
    time = time.expand(*query.shape[:-1], 2)
    decay = torch.stack((log_beta, -position * log_beta), dim=-1)
    wide_query = torch.cat((query.to(dtype) * scaling, time), dim=-1)
    wide_key = torch.cat((key.to(dtype), decay), dim=-1)
    return _attend(wide_query, wide_key, value.to(dtype), sinks).to(query.dtype)


def bias_channel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Same contract as `biased_attention`, in fp32 (fp64 for fp64 inputs): one extra channel."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    one = query.new_ones((), dtype=dtype).expand(*query.shape[:-1], 1)
    wide_query = torch.cat((query.to(dtype) * scaling, one), dim=-1)
    wide_key = torch.cat((key.to(dtype), bias.to(dtype)[..., None]), dim=-1)
    return _attend(wide_query, wide_key, value.to(dtype), sinks).to(query.dtype)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Fused causal attention at scale 1 of the last queries of a sequence, in the precision of its inputs."""
    if sinks is not None:
        return _attend(*_with_sink(query, key, value, sinks), None)[:, :, 1:]
    (q_len, seq_len), value_dim = (query.shape[-2], key.shape[-2]), value.shape[-1]
    width = -(-max(key.shape[-1], value_dim) // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
    past = None
    if q_len < seq_len:
        past = torch.ones(q_len, seq_len, dtype=torch.bool, device=query.device).tril(seq_len - q_len)
    with torch.autocast(query.device.type, enabled=False):
        output = F.scaled_dot_product_attention(
            _widen(query, width), _widen(key, width), _widen(value, width), attn_mask=past, is_causal=past is None,
            scale=1.0, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    return output[..., :value_dim]


def _with_sink(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A first entry of value zero, whose logit is the sink of the query's head, by one more channel.

    A first query is added too, whose output is to be dropped: the causal order of the others stays as it was.
    """
    batch, heads, q_len, _ = query.shape
    logit = sinks.to(query.dtype).view(1, heads, 1, 1).expand(batch, heads, q_len, 1)
    query = F.pad(torch.cat((query, logit), dim=-1), (0, 0, 1, 0))
    key = F.pad(F.pad(key, (0, 0, 1, 0)), (0, 1))
    is_sink = torch.zeros_like(key[..., -1:])
    is_sink[:, :, 0] = 1.0
    return query, torch.cat((key[..., :-1], is_sink), dim=-1), F.pad(value, (0, 0, 1, 0))


def _widen(x: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(x, (0, width - x.shape[-1]))
