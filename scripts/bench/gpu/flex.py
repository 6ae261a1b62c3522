"""FlexAttention as a peer, compiled for one shape."""

from __future__ import annotations

from collections.abc import Callable

import torch


def gated_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float
) -> Callable[[], torch.Tensor]:
    """Gated attention over whole rows; the tiles of its mask are found here, not at each call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    on_card, groups, length = query.is_cuda, query.shape[1] // key.shape[1], query.shape[2]

    def causal(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return t >= i

    def decayed(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, i: torch.Tensor
    ) -> torch.Tensor:
        return score + (t - i) * log_beta[b, h // groups, i]

    # Compiled, the mask is made tile by tile and never exists as a whole.
    mask = create_block_mask(causal, None, None, length, length, device=str(query.device), _compile=on_card)
    attend = torch.compile(flex_attention, dynamic=False) if on_card else flex_attention

    def run() -> torch.Tensor:
        output = attend(query, key, value, score_mod=decayed, block_mask=mask, scale=scaling, enable_gqa=groups > 1)
        assert isinstance(output, torch.Tensor)
        return output

    return run


def plain_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Attention of a few queries over everything, as in decoding a cache without eviction."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False) if query.is_cuda else flex_attention

    def run() -> torch.Tensor:
        output = attend(query, key, value, enable_gqa=query.shape[1] != key.shape[1])
        assert isinstance(output, torch.Tensor)
        return output

    return run
