"""Retention-gated attention: softmax over `scale·q_t·k_i + (t-i)·log β_i` (TRIM-KV, retention-gated attention).

On CPU two more channels of queries and keys carry the bias, in fp32 (`channels`). On CUDA it is added in fp32 inside a
Triton kernel (`triton`), or inside FlexAttention (`flex`).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ..segments import Segments
from .channels import channels
from .kernel_choice import chosen_kernels
from .naive import gated_attention as naive
from .softmax import ORDINARY, Softmax

Implementation = Literal["auto", "channels", "flex", "naive", "triton"]


def gated_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
    segments: Segments | None = None, implementation: Implementation = "auto", softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """Causal attention whose logits decay with the age of the key, at the rate its gate chose.

    Args:
        query: `(batch, num_heads, seq_len, head_dim)`, after RoPE.
        key: `(batch, num_kv_heads, seq_len, head_dim)`, after RoPE.
        value: `(batch, num_kv_heads, seq_len, value_dim)`.
        log_beta: `(batch, num_kv_heads, seq_len)`, ≤ 0, fp32 (fp64 in tests).
        scaling: factor of `q·k`.
        segments: documents and padding; None means every row is one document.
        implementation: `auto` is `triton` on CUDA and `channels` on CPU. `TENURE_KERNELS=reference` in the environment
            makes it `flex` on CUDA, `TENURE_KERNELS=triton` makes it `triton` wherever that runs. With a cap on
            logits `naive` takes the place of `channels`, with sinks that of `flex`.
        softmax: the model's own variant of it.

    Returns:
        `(batch, num_heads, seq_len, value_dim)` in the query's dtype, 0 on padding. Differentiable in query, key,
        value and log_beta.

    Raises:
        ValueError: unknown implementation, or one that does not have this softmax; shapes that do not belong together;
            for `triton` a dtype or head dimension that its kernels do not have, or a device on which they do not run.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; accepted: {', '.join(get_args(Implementation))}")
    _check_shapes(query, key, value, log_beta)
    if segments is None:
        segments = Segments.whole(query.shape[0], query.shape[2], query.device)
    if implementation == "auto":
        implementation = _chosen(query.device, softmax)
    given = query, key, value, log_beta, scaling, segments
    if implementation == "naive":
        return naive(*given, softmax)
    if implementation == "flex":
        if softmax.sinks is not None:
            raise ValueError("got sinks for implementation 'flex'; accepted with sinks: channels, naive, triton")
        return flex(*given, softmax)
    if implementation == "triton":
        return triton(*given, softmax)
    if softmax.softcap is not None:
        raise ValueError("got a cap on logits for implementation 'channels'; accepted with a cap: flex, naive, triton")
    return channels(*given, softmax.sinks)


def _chosen(device: torch.device, softmax: Softmax) -> Implementation:
    """The fastest implementation that has this softmax."""
    if chosen_kernels(device) == "triton":
        return "triton"
    if device.type == "cuda":
        return "flex" if softmax.sinks is None else "naive"
    return "channels" if softmax.softcap is None else "naive"


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


def triton(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
    segments: Segments, softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """Our kernels, see `gated_attention_triton`; they are loaded here."""
    chosen_kernels(query.device, "triton")
    from .gated_attention_triton import gated_attention as launch

    return launch(query, key, value, log_beta, scaling, segments, softmax)


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
    segments: Segments, softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
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
        return softmax.capped(score) + (position[b, t] - position[b, i]) * log_beta[b, h // groups, i]

    batch, _, seq_len, _ = query.shape
    mask = create_block_mask(may_attend, batch, None, seq_len, seq_len, device=str(query.device))
    run = torch.compile(flex_attention, dynamic=False) if query.device.type == "cuda" else flex_attention
    output = run(query, key, value, score_mod=decayed, block_mask=mask, scale=scaling, enable_gqa=groups > 1)
    assert isinstance(output, torch.Tensor)
    return output.masked_fill((document < 0)[:, None, :, None], 0.0)
