"""Plain-torch twins of the kernels: the reference in tests, and what runs without CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..policies.aggregation import pool_and_renormalise, worst_case
from ..policies.value_norms import norms_by_parts
from ..policies.window import attention_over, mean_over_queries
from ..select import select_top as select_rows


def segment_of_column(bounds: torch.Tensor, n: int) -> torch.Tensor:
    """int64 `(n,)`: the segment that each column belongs to."""
    columns = torch.arange(n, device=bounds.device)
    return torch.searchsorted(bounds[1:].long().contiguous(), columns, right=True)


def select_top(
    scores: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as `eviction.ops.select.select_top`."""
    segments = bounds.numel() - 1
    owner = segment_of_column(bounds, scores.shape[1])
    keep = select_rows(scores, k.tolist(), lambda: positions.long() * segments + (segments - 1 - owner))
    counts = torch.zeros(len(scores), segments, dtype=torch.int32, device=scores.device)
    return keep, counts.index_add_(1, owner, keep.int())


def owned_pages(length: int, size: int) -> int:
    return -(-length // size)


def append_entries(
    key: torch.Tensor, value: torch.Tensor, position: torch.Tensor, rank: torch.Tensor, added: torch.Tensor,
    key_pages: torch.Tensor, value_pages: torch.Tensor, position_pages: torch.Tensor, table: torch.Tensor,
    lengths: torch.Tensor, free: torch.Tensor, counters: torch.Tensor, plan: torch.Tensor,
) -> None:  # fmt: skip
    """Same contract as `eviction.ops.pages.append_entries`, whose plan is written into `plan`."""
    size, heads = key_pages.shape[1], key.shape[1]
    old, more = lengths.tolist(), added.tolist()
    fresh = [owned_pages(n + k, size) - owned_pages(n, size) for n, k in zip(old, more, strict=True)]
    top = int(counters[0])
    plan[0] = lengths
    plan[1] = top - 1 - (torch.tensor(fresh).cumsum(0) - torch.tensor(fresh)).int()
    if sum(fresh) > top:
        plan[0], counters[1] = -1, 1
        return
    for segment, (n, k, count) in enumerate(zip(old, more, fresh, strict=True)):
        first = owned_pages(n, size)
        table[segment, first : first + count] = free[top - count : top].flip(0)
        top -= count
        columns = (rank[segment // heads] >= 0).nonzero().squeeze(1)
        columns = columns[rank[segment // heads, columns].argsort()]
        slots = entry_slots(table[segment], n, n + k, size)
        row, head = segment // heads, segment % heads
        key_pages.flatten(0, 1)[slots] = key[row, head, columns]
        value_pages.flatten(0, 1)[slots] = value[row, head, columns]
        position_pages.flatten()[slots] = position[row, columns]
        lengths[segment] = n + k
    counters[0] = top


def entry_slots(pages: torch.Tensor, start: int, stop: int, size: int) -> torch.Tensor:
    """int64 flat indices, into pages of `size` entries, of the entries `[start, stop)` of one segment."""
    entry = torch.arange(start, stop, device=pages.device)
    return pages[entry // size].long() * size + entry % size


def write_state(
    state: torch.Tensor, rank: torch.Tensor, plan: torch.Tensor, table: torch.Tensor, pages: torch.Tensor
) -> None:
    """Same contract as `eviction.ops.pages.write_state`."""
    heads, size = state.shape[1], pages.shape[1]
    for segment, start in enumerate(plan[0].tolist()):
        row = segment // heads
        columns = (rank[row] >= 0).nonzero().squeeze(1)
        columns = columns[rank[row, columns].argsort()]
        if start >= 0:
            slots = entry_slots(table[segment], start, start + len(columns), size)
            pages.flatten()[slots] = state[row, segment % heads, columns]


def move_entries(keep: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, pages: torch.Tensor) -> None:
    """Same contract as `eviction.ops.pages.move_entries`."""
    size, flat = pages.shape[1], pages.flatten(0, 1)
    for segment, n in enumerate(lengths.tolist()):
        slots = entry_slots(table[segment], 0, n, size)
        kept = slots[keep[segment, :n]]
        flat[slots[: len(kept)]] = flat[kept]


def release_pages(
    lengths: torch.Tensor, shorter: torch.Tensor, table: torch.Tensor, free: torch.Tensor, counters: torch.Tensor,
    page_size: int,
) -> None:  # fmt: skip
    """Same contract as `eviction.ops.pages.release_pages`."""
    top = int(counters[0])
    for segment, (old, new) in enumerate(zip(lengths.tolist(), shorter.tolist(), strict=True)):
        new = min(old, new)
        gone = table[segment, owned_pages(new, page_size) : owned_pages(old, page_size)]
        free[top : top + len(gone)] = gone
        lengths[segment], top = new, top + len(gone)
    counters[0] = top


def copy_entries(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], source_slots: torch.Tensor | None,
    target_slots: torch.Tensor | None, count: int,
) -> None:  # fmt: skip
    """Same contract as `eviction.ops.copies.copy_entries`."""
    for source, target in zip(sources, targets, strict=True):
        chosen = source[:count] if source_slots is None else source.index_select(0, source_slots)
        if target_slots is None:
            target[:count] = chosen
        else:
            target.index_copy_(0, target_slots.long(), chosen)


def ragged_decode(
    query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, table: torch.Tensor,
    lengths: torch.Tensor, hidden: torch.Tensor | None, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """Same contract as `eviction.ops.decode.ragged_decode`, in fp32 (fp64 for fp64 inputs)."""
    batch, num_heads, q_len, _ = query.shape
    heads, size = len(lengths) // batch, key_pages.shape[1]
    group = num_heads // heads
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(batch, q_len, num_heads, value_pages.shape[2])
    if hidden is None:
        hidden = torch.arange(q_len - 1, -1, -1, device=query.device).expand(batch, -1)
    for segment, length in enumerate(lengths.tolist()):
        row, head = segment // heads, segment % heads
        slots = entry_slots(table[segment], 0, length, size)
        key, value = (pages.flatten(0, 1)[slots].to(wide) for pages in (key_pages, value_pages))
        unseen = hidden[row].unsqueeze(1)
        seen = torch.arange(length, device=query.device) < length - unseen
        seen &= unseen >= 0
        own = slice(head * group, (head + 1) * group)
        logits = (query[row, own].to(wide) @ key.T * scaling).masked_fill(~seen, -torch.inf)
        weights = logits.softmax(-1).masked_fill(~seen.any(1, keepdim=True), 0.0)
        out[row, :, own] = (weights @ value).transpose(0, 1).to(query.dtype)
    return out


def window_risk(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, query_positions: torch.Tensor,
    limit: torch.Tensor, scaling: float, kernel: int, mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Same contract as `eviction.ops.defensive.window_risk`, by the functions of the policies."""
    attention = attention_over(keys, positions, queries, query_positions, scaling)
    counted = (positions >= 0) & (positions < limit.view(-1, 1, 1))
    worst = worst_case(pool_and_renormalise(attention, counted, kernel))
    return worst, mean_over_queries(attention, query_positions) if mean else worst.new_zeros(0)


def value_norms(values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """Same contract as `eviction.ops.value_norms.value_norms`."""
    return norms_by_parts(values, output_weight).contiguous()
