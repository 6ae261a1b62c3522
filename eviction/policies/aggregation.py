"""The steps of defensive aggregation, one function each.

Source: "Taming the Fragility of KV Cache Eviction" (Feng et al., ICLR 2026), section 4 and the released code.
"""

from __future__ import annotations

import torch

from ..select import top_by_mass, top_of_each_head

MASS = 0.9  # attention that the protected entries and the window cover together, in the paper


def pool_and_renormalise(attention: torch.Tensor, counted: torch.Tensor, kernel: int) -> torch.Tensor:
    """Average-pools each query's attention along the entries, then scales it back to its sum.

    Args:
        attention: fp32 `(batch, num_kv_heads, num_kv_groups, w, n)`.
        counted: bool `(batch, num_kv_heads, n)`: entries outside the window; the others are taken for 0.
        kernel: width of the pooling, odd; beyond the ends there are zeros.

    Returns:
        fp32, shaped as `attention`.
    """
    attention = attention.masked_fill(~counted[:, :, None, None], 0.0)
    pooled = attention.clone()
    for shift in range(1, min(kernel // 2, attention.shape[-1] - 1) + 1):
        pooled[..., shift:] += attention[..., :-shift]
        pooled[..., :-shift] += attention[..., shift:]
    pooled.masked_fill_(~counted[:, :, None, None], 0.0)
    scale = attention.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True)  # the kernel's width cancels out
    return pooled.mul_(scale.nan_to_num(0.0, posinf=0.0))  # a query that attends to nothing outside its window


def worst_case(pooled: torch.Tensor) -> torch.Tensor:
    """The most attention that any query of any head of the group pays: `(batch, num_kv_heads, n)`."""
    return pooled.amax(dim=(2, 3))


def flat_prior(worst: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean of the worst case over the head's entries outside the window: `(batch, num_kv_heads, 1)`."""
    total = worst.masked_fill(~counted, 0.0).sum(2, keepdim=True)
    return total / counted.sum(2, keepdim=True).clamp(min=1)


def defensive_aggregate(worst: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """The risk of losing an entry: what was seen at its worst, but no less than the prior."""
    return torch.maximum(worst, prior)


def mass_protection(
    mean: torch.Tensor, needed: torch.Tensor, counted: torch.Tensor, most: torch.Tensor
) -> torch.Tensor:
    """The fewest entries of each head that cover a mass of the mean attention.

    Entries are taken in the order of their mean attention, of equal ones the last.

    Args:
        mean: fp32 `(batch, num_kv_heads, n)`: attention, mean over queries and heads of the group.
        needed: fp32 `(batch, num_kv_heads)`: the mass to cover: `MASS` less the part that falls into the window. The
            released code measures that part after it has cut the window off; here it is that of the window.
        counted: bool `(batch, num_kv_heads, n)`: entries outside the window.
        most: int64 `(batch,)`: no more than that many in a head.

    Returns:
        bool `(batch, num_kv_heads, n)`.
    """
    mean = mean.masked_fill(~counted, 0.0)
    covering = top_by_mass(mean, needed) & counted
    if not bool((covering.sum(2) > most.view(-1, 1)).any()):
        return covering
    place = torch.arange(mean.shape[2], device=mean.device).expand(mean.shape)
    each = [int(k) for k in most.tolist() for _ in range(mean.shape[1])]
    return top_of_each_head(mean.masked_fill(~covering, -torch.inf), place, each)
