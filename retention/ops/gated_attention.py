"""Retention-gated attention: softmax over `scale·q_t·k_i + (t-i)·log β_i` (TRIM-KV, retention-gated attention).

`(t-i)·log β_i = t·log β_i - i·log β_i` has rank 2 in (t, i). So `[t, 1]` appended to the scaled query and
`[log β_i, -i·log β_i]` appended to the key turn the gated attention into ordinary attention, which any fused kernel
computes exactly, with gradients, in memory linear in the sequence length (`channels`). The two products cancel, so
that form runs in fp32: with positions centred the error of a logit is at most about
`seq_len / 2 · max|log β| · 6e-8`. On CUDA the bias is added in fp32 inside a Triton kernel instead (`triton`), or
inside FlexAttention (`flex`).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch.nn import functional as F

from ..segments import Segments
from . import naive
from .kernel_choice import chosen_kernels

Implementation = Literal["auto", "channels", "flex", "naive", "triton"]
CHANNEL_MULTIPLE = 8  # fused CPU and CUDA kernels want head dimensions that are multiples of 8


def gated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_beta: torch.Tensor,
    scaling: float,
    segments: Segments | None = None,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """Causal attention whose logits decay with the age of the key, at the rate its gate chose.

    Args:
        query: `(batch, num_heads, seq_len, head_dim)`, after RoPE.
        key: `(batch, num_kv_heads, seq_len, head_dim)`, after RoPE.
        value: `(batch, num_kv_heads, seq_len, value_dim)`.
        log_beta: `(batch, num_kv_heads, seq_len)`, ≤ 0, fp32 (fp64 in tests).
        scaling: factor of `q·k`.
        segments: documents and padding; None means every row is one document.
        implementation: `auto` is `triton` on CUDA and `channels` on CPU. `TENURE_KERNELS=reference` in the environment
            makes it `flex` on CUDA, `TENURE_KERNELS=triton` makes it `triton` wherever that runs.

    Returns:
        `(batch, num_heads, seq_len, value_dim)` in the query's dtype, 0 on padding. Differentiable in query, key,
        value and log_beta.

    Raises:
        ValueError: unknown implementation, shapes that do not belong together, or for `triton` a dtype or head
            dimension that its kernels do not have, or a device on which they do not run.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; accepted: {', '.join(get_args(Implementation))}")
    _check_shapes(query, key, value, log_beta)
    if segments is None:
        segments = Segments.whole(query.shape[0], query.shape[2], query.device)
    if implementation == "auto":
        if chosen_kernels(query.device) == "triton":
            implementation = "triton"
        else:
            implementation = "flex" if query.device.type == "cuda" else "channels"
    functions = {"channels": channels, "flex": flex, "naive": naive.gated_attention, "triton": triton}
    return functions[implementation](query, key, value, log_beta, scaling, segments)


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor) -> None:
    if query.shape[-2] != key.shape[-2] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}: gated attention runs over whole sequences "
            "(no cache), with a multiple of num_kv_heads query heads"
        )
    if key.shape[:-1] != value.shape[:-1] or key.shape[:-1] != log_beta.shape:
        raise ValueError(
            f"key {tuple(key.shape)}, value {tuple(value.shape)} and log_beta {tuple(log_beta.shape)} must agree in "
            "(batch, num_kv_heads, seq_len)"
        )


def channels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_beta: torch.Tensor,
    scaling: float,
    segments: Segments,
) -> torch.Tensor:
    """The two-extra-channels form over `scaled_dot_product_attention`, in fp32 (fp64 for fp64 inputs)."""
    if segments.dense:
        return gated_attention_after(query, key, value, log_beta, scaling)
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    for row, start, end in segments.spans:
        part = slice(row, row + 1), slice(None), slice(start, end)
        output[part] = gated_attention_after(query[part], key[part], value[part], log_beta[part], scaling)
    return output


def gated_attention_after(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`gated_attention` of the last `q_len` queries of a sequence, one document a row: the others were read before.

    Args:
        query: `(batch, num_heads, q_len, head_dim)`, after RoPE.
        key, value, log_beta: of the whole sequence, as in `gated_attention`.

    Returns:
        `(batch, num_heads, q_len, value_dim)` in the query's dtype, computed in fp32 through the two extra channels.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    q_len, seq_len = query.shape[-2], key.shape[-2]
    position = torch.arange(seq_len, dtype=dtype, device=query.device) - (seq_len - 1) / 2
    log_beta = log_beta.to(dtype)
    time = torch.stack((position, torch.ones_like(position)), dim=-1)[seq_len - q_len :]
    time = time.expand(*query.shape[:-1], 2)
    decay = torch.stack((log_beta, -position * log_beta), dim=-1)
    wide_query = torch.cat((query.to(dtype) * scaling, time), dim=-1)
    wide_key = torch.cat((key.to(dtype), decay), dim=-1)
    return _attend(wide_query, wide_key, value.to(dtype)).to(query.dtype)


def biased_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Causal attention of the last `q_len` queries of a sequence with `bias_i` added to every logit of key i.

    Args:
        query: `(batch, num_heads, q_len, head_dim)`, after RoPE.
        key: `(batch, num_kv_heads, seq_len, head_dim)`; value: `(batch, num_kv_heads, seq_len, value_dim)`.
        bias: `(batch, num_kv_heads, seq_len)` fp32.

    Returns:
        `(batch, num_heads, q_len, value_dim)` in the query's dtype, differentiable in all four; fp32 inside.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    one = query.new_ones((), dtype=dtype).expand(*query.shape[:-1], 1)
    wide_query = torch.cat((query.to(dtype) * scaling, one), dim=-1)
    wide_key = torch.cat((key.to(dtype), bias.to(dtype)[..., None]), dim=-1)
    return _attend(wide_query, wide_key, value.to(dtype)).to(query.dtype)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Fused causal attention at scale 1 of the last queries of a sequence, in the precision of its inputs."""
    (q_len, seq_len), value_dim = (query.shape[-2], key.shape[-2]), value.shape[-1]
    width = -(-max(key.shape[-1], value_dim) // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
    past = None
    if q_len < seq_len:
        past = torch.ones(q_len, seq_len, dtype=torch.bool, device=query.device).tril(seq_len - q_len)
    with torch.autocast(query.device.type, enabled=False):
        output = F.scaled_dot_product_attention(
            _widen(query, width),
            _widen(key, width),
            _widen(value, width),
            attn_mask=past,
            is_causal=past is None,
            scale=1.0,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output[..., :value_dim]


def _widen(x: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(x, (0, width - x.shape[-1]))


def triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_beta: torch.Tensor,
    scaling: float,
    segments: Segments,
) -> torch.Tensor:
    """Our kernels, see `gated_attention_triton`; they are loaded here."""
    chosen_kernels(query.device, "triton")
    from .gated_attention_triton import gated_attention as launch

    return launch(query, key, value, log_beta, scaling, segments)


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_beta: torch.Tensor,
    scaling: float,
    segments: Segments,
) -> torch.Tensor:
    """FlexAttention with the bias in fp32 inside the kernel; q·k stays in the model's dtype."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    groups = query.shape[1] // key.shape[1]
    document, position = segments.document, segments.position.to(torch.int32)
    log_beta = log_beta.contiguous()

    def may_attend(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return (t >= i) & (document[b, t] == document[b, i]) & (document[b, t] >= 0)

    def decayed(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, i: torch.Tensor
    ) -> torch.Tensor:
        return score + (position[b, t] - position[b, i]) * log_beta[b, h // groups, i]

    batch, _, seq_len, _ = query.shape
    mask = create_block_mask(may_attend, batch, None, seq_len, seq_len, device=str(query.device))
    run = torch.compile(flex_attention, dynamic=False) if query.device.type == "cuda" else flex_attention
    output = run(query, key, value, score_mod=decayed, block_mask=mask, scale=scaling, enable_gqa=groups > 1)
    assert isinstance(output, torch.Tensor)
    return output.masked_fill((document < 0)[:, None, :, None], 0.0)
