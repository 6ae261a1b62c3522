"""Which entries stay: exactly k of each group of competitors, in linear time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..retention.ops.kernel_choice import chosen_kernels


def select_top(scores: torch.Tensor, k: list[int], order: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Marks the `k[i]` highest scores of each row.

    A row with fewer than `k[i]` candidates keeps them all. Cost is linear in the number of scores (selection, no
    sort); rows with the same k are handled together.

    Args:
        scores: fp32 `(rows, n)`; -inf where there is no candidate; no NaN.
        k: how many to keep in each row.
        order: gives int64 `(rows, n)`, distinct and not negative within a row; among equal scores the higher one
            stays. Asked for only when there are ties to break.

    Returns:
        bool `(rows, n)`.
    """
    candidate = scores > -torch.inf
    threshold = _kth_highest(scores, k)
    keep = candidate & (scores > threshold)
    ties = candidate & (scores == threshold)
    wanted = torch.tensor(k, device=scores.device) - keep.sum(1)
    if bool((ties.sum(1) <= wanted).all()):
        return keep | ties
    ranks = order().masked_fill(~ties, -1)
    return keep | (ties & (ranks >= _kth_highest(ranks, wanted.tolist())))


def top_of_each_head(scores: torch.Tensor, positions: torch.Tensor, k: list[int]) -> torch.Tensor:
    """Marks the highest scores of each head on its own; among equal scores the newer entries stay.

    Args:
        scores: fp32 `(batch, heads, n)`; -inf where there is no candidate; no NaN.
        positions: int64 `(batch, heads, n)`, -1 for none.
        k: how many to keep, row by row and head by head.

    Returns:
        bool `(batch, heads, n)`.
    """
    flat = scores.flatten(0, 1)
    if chosen_kernels(scores.device) == "triton":
        return select_with_kernels(flat, positions.flatten(0, 1), k, [scores.shape[2]]).view(scores.shape)
    return select_top(flat, k, lambda: positions.flatten(0, 1)).view(scores.shape)


def select_with_kernels(
    scores: torch.Tensor, positions: torch.Tensor, k: list[int], widths: Sequence[int]
) -> torch.Tensor:
    """`select_top` by radix, ties in the order of `ops.select.select_top`; rows are segments of these widths."""
    from .ops.select import select_top as select_by_radix

    sizes = torch.tensor([0, *widths], device=scores.device)
    wanted = torch.tensor(k, dtype=torch.int32, device=scores.device)
    return select_by_radix(scores, positions.int(), wanted, sizes.cumsum(0, dtype=torch.int32))[0]


def top_by_mass(values: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Marks the fewest highest values of each row whose sum reaches `mass`; of equal ones the last.

    Cost is linear in the number of values: the lowest one that is needed is found eight bits at a time, no sort.

    Args:
        values: fp32 `(..., n)`, not negative, no NaN.
        mass: fp32 `(...)`; nothing is marked for 0 or less, everything for more than there is.

    Returns:
        bool `(..., n)`.
    """
    bits = values.contiguous().view(torch.int32)  # not negative: ordered as the numbers are
    needed = mass.unsqueeze(-1)
    least = torch.zeros_like(needed, dtype=torch.int32)
    above = torch.zeros_like(needed)  # the sum of the values whose leading bits are higher than those of the least one
    for shift in (24, 16, 8, 0):
        digit = ((bits >> shift) & 255).long()
        inside = values if shift == 24 else values.masked_fill((bits >> (shift + 8)) != (least >> (shift + 8)), 0.0)
        sums = values.new_zeros(*mass.shape, 256).scatter_add_(-1, digit, inside)
        reached = above + sums.flip(-1).cumsum(-1).flip(-1) >= needed
        highest = reached.sum(-1, keepdim=True).sub_(1).clamp_(min=0)  # it falls with the digit
        above += sums.masked_fill(torch.arange(256, device=values.device) <= highest, 0.0).sum(-1, keepdim=True)
        least |= highest.int() << shift
    above, ties = bits > least, bits == least
    missing = needed - values.masked_fill(~above, 0.0).sum(-1, keepdim=True)
    behind = ties.flip(-1).cumsum(-1).flip(-1) - 1
    return (above | (ties & (behind * least.view(torch.float32) < missing))) & (needed > 0)


def _kth_highest(values: torch.Tensor, k: list[int]) -> torch.Tensor:
    """The `k[i]`-th highest value of each row, `(rows, 1)`: the highest possible for k <= 0, the lowest for k > n."""
    n = values.shape[1]
    floating = values.dtype.is_floating_point
    lowest, highest = (-torch.inf, torch.inf) if floating else (-1, torch.iinfo(values.dtype).max)
    out = values.new_full((len(k), 1), lowest)
    for count in set(k):
        rows = torch.tensor([i for i, one in enumerate(k) if one == count], device=values.device)
        if count <= 0:
            out[rows] = highest
        elif count <= n:
            group = values if len(rows) == len(k) else values[rows]
            out[rows] = group.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    return out
