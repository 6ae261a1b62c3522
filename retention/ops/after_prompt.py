"""Attention of tokens that follow a prompt, whose queries have been read before: decays, or one bias a key.

On CUDA the Triton kernels of gated attention run, over the last queries of a sequence; elsewhere extra channels carry
the bias (`channels`).
"""

from __future__ import annotations

import torch

from ..segments import Segments
from . import naive
from .channels import bias_channel, channels_after
from .kernel_choice import Kernels, chosen_kernels
from .softmax import ORDINARY, Softmax


def gated_attention_after(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
    kernels: Kernels = "auto", softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """`gated_attention` of the last `q_len` queries of a sequence, one document a row: the others were read before.

    Args:
        query: `(batch, num_heads, q_len, head_dim)`, after RoPE.
        key, value, log_beta: of the whole sequence, as in `gated_attention`.
        kernels: see `kernel_choice.chosen_kernels`.
        softmax: the model's own variant of it.

    Returns:
        `(batch, num_heads, q_len, value_dim)` in the query's dtype, differentiable in all four.

    Raises:
        ValueError: shapes that do not belong together; with Triton, what `gated_attention` raises.
    """
    _check_shapes("log_beta", query, key, value, log_beta)
    if chosen_kernels(query.device, kernels) == "reference":
        if softmax.softcap is not None:
            return naive.gated_attention_after(query, key, value, log_beta, scaling, softmax)
        return channels_after(query, key, value, log_beta, scaling, softmax.sinks)
    from .gated_attention_triton import attention_after

    return attention_after(query, key, value, log_beta, scaling, decays=True, softmax=softmax)


def biased_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float,
    kernels: Kernels = "auto", softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of the last `q_len` queries of a sequence with `bias_i` added to every logit of key i.

    Args:
        query: `(batch, num_heads, q_len, head_dim)`, after RoPE.
        key: `(batch, num_kv_heads, seq_len, head_dim)`; value: `(batch, num_kv_heads, seq_len, value_dim)`.
        bias: `(batch, num_kv_heads, seq_len)` fp32.
        kernels, softmax: as in `gated_attention_after`.

    Returns, raises: as `gated_attention_after`.
    """
    _check_shapes("bias", query, key, value, bias)
    if chosen_kernels(query.device, kernels) == "reference":
        if softmax.softcap is not None:
            return naive.biased_attention(query, key, value, bias, scaling, softmax)
        return bias_channel(query, key, value, bias, scaling, softmax.sinks)
    from .gated_attention_triton import attention_after

    return attention_after(query, key, value, bias, scaling, decays=False, softmax=softmax)


def gated_attention_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
    segments: Segments, first: int, kernels: Kernels = "auto", softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """`gated_attention` of the queries in columns `first` to `first + q_len` of packed or padded rows.

    Args:
        query: `(batch, num_heads, q_len, head_dim)`, after RoPE.
        key, value, log_beta: of the whole rows, as in `gated_attention`.
        segments: documents and padding of the whole rows.
        kernels, softmax: as in `gated_attention_after`.

    Returns:
        `(batch, num_heads, q_len, value_dim)`, 0 on padding, differentiable in all four.

    Raises:
        ValueError: as `gated_attention_after`.
    """
    stop = first + query.shape[2]
    if chosen_kernels(query.device, kernels) == "triton":
        from .gated_attention_triton import attention_part

        key, value, log_beta = (x[:, :, :stop] for x in (key, value, log_beta))
        return attention_part(query, key, value, log_beta, scaling, segments, softmax)
    if segments.dense:
        key, value, log_beta = (x[:, :, :stop] for x in (key, value, log_beta))
        return gated_attention_after(query, key, value, log_beta, scaling, "reference", softmax)
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    for row, start, end in segments.spans:
        begin, end = max(first, start), min(stop, end)
        if begin < end:
            queries = slice(row, row + 1), slice(None), slice(begin - first, end - first)
            keys = slice(row, row + 1), slice(None), slice(start, end)
            output[queries] = gated_attention_after(
                query[queries], key[keys], value[keys], log_beta[keys], scaling, "reference", softmax
            )
    return output


def _check_shapes(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> None:
    if query.shape[-2] > key.shape[-2] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}: at most as many queries as keys are accepted, "
            "with a multiple of num_kv_heads heads"
        )
    if key.shape[:-1] != value.shape[:-1] or key.shape[:-1] != bias.shape:
        raise ValueError(
            f"key {tuple(key.shape)}, value {tuple(value.shape)} and {name} {tuple(bias.shape)} must agree in (batch, "
            "num_kv_heads, seq_len)"
        )
