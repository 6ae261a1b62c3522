"""Plain-torch twins of the kernels: the reference in tests, and the implementation without CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ...retention.ops.softmax import ORDINARY, Softmax

if TYPE_CHECKING:
    from .segment_attention import PageAddresses


def top_of_rows(scores: torch.Tensor, k: list[int], order: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Marks the `k[i]` highest scores of each row.

    A row with fewer than `k[i]` candidates keeps them all. Cost is linear in the number of scores (selection, no
    sort); rows with the same k are handled together.

    Args:
        scores: fp32 `(rows, n)`; -inf where there is no candidate; no NaN.
        k: how many to keep in each row.
        order: returns int64 `(rows, n)`, distinct and not negative within a row; among equal scores the higher one
            is kept. Called only when there are ties to break.

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


def top_by_mass(values: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Marks the fewest highest values of each row whose sum reaches `mass`; on ties the last.

    Cost is linear in the number of values: the lowest one that is needed is found eight bits at a time, no sort.

    Args:
        values: fp32 `(..., n)`, not negative, no NaN.
        mass: fp32 `(...)`; nothing is marked for 0 or less, everything if it exceeds the row's sum.

    Returns:
        bool `(..., n)`.
    """
    bits = values.contiguous().view(torch.int32)  # not negative: ordered as the numbers are
    needed = mass.unsqueeze(-1)
    least = torch.zeros_like(needed, dtype=torch.int32)
    above = torch.zeros_like(needed)  # the sum of the values whose leading bits exceed those of `least`
    for shift in (24, 16, 8, 0):
        digit = ((bits >> shift) & 255).long()
        inside = values if shift == 24 else values.masked_fill((bits >> (shift + 8)) != (least >> (shift + 8)), 0.0)
        sums = values.new_zeros(*mass.shape, 256).scatter_add_(-1, digit, inside)
        reached = above + sums.flip(-1).cumsum(-1).flip(-1) >= needed
        highest = reached.sum(-1, keepdim=True).sub_(1).clamp_(min=0)  # it decreases with the digit
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


def segment_of_column(bounds: torch.Tensor, n: int) -> torch.Tensor:
    """int64 `(n,)`: the segment that each column belongs to."""
    columns = torch.arange(n, device=bounds.device)
    return torch.searchsorted(bounds[1:].long().contiguous(), columns, right=True)


def select_top(
    scores: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as `ops.radix_select.select_top`."""
    segments = bounds.numel() - 1
    owner = segment_of_column(bounds, scores.shape[1])
    keep = top_of_rows(scores, k.tolist(), lambda: positions.long() * segments + (segments - 1 - owner))
    counts = torch.zeros(len(scores), segments, dtype=torch.int32, device=scores.device)
    return keep, counts.index_add_(1, owner, keep.int())


def owned_pages(length: int, size: int) -> int:
    return -(-length // size)


def append_entries(
    key: torch.Tensor, value: torch.Tensor, position: torch.Tensor, rank: torch.Tensor, added: torch.Tensor,
    key_pages: torch.Tensor, value_pages: torch.Tensor, position_pages: torch.Tensor, table: torch.Tensor,
    lengths: torch.Tensor, free: torch.Tensor, counters: torch.Tensor, plan: torch.Tensor,
) -> None:  # fmt: skip
    """Same contract as `ops.page_table.append_entries`, whose plan is written into `plan`."""
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
    """Same contract as `ops.page_table.write_state`."""
    heads, size = state.shape[1], pages.shape[1]
    for segment, start in enumerate(plan[0].tolist()):
        row = segment // heads
        columns = (rank[row] >= 0).nonzero().squeeze(1)
        columns = columns[rank[row, columns].argsort()]
        if start >= 0:
            slots = entry_slots(table[segment], start, start + len(columns), size)
            pages.flatten()[slots] = state[row, segment % heads, columns]


def move_entries(keep: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, pages: torch.Tensor) -> None:
    """Same contract as `ops.page_table.move_entries`."""
    size, flat = pages.shape[1], pages.flatten(0, 1)
    for segment, n in enumerate(lengths.tolist()):
        slots = entry_slots(table[segment], 0, n, size)
        kept = slots[keep[segment, :n]]
        flat[slots[: len(kept)]] = flat[kept]


def release_pages(
    lengths: torch.Tensor, shorter: torch.Tensor, table: torch.Tensor, free: torch.Tensor, counters: torch.Tensor,
    page_size: int,
) -> None:  # fmt: skip
    """Same contract as `ops.page_table.release_pages`."""
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
    """Same contract as `ops.copy_entries.copy_entries`."""
    for source, target in zip(sources, targets, strict=True):
        chosen = source[:count] if source_slots is None else source.index_select(0, source_slots)
        if target_slots is None:
            target[:count] = chosen
        else:
            target.index_copy_(0, target_slots.long(), chosen)


def ragged_decode(
    query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, table: torch.Tensor,
    lengths: torch.Tensor, hidden: torch.Tensor | None, scaling: float, sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Same contract as `ops.paged_attention.ragged_decode_part`, in fp32 (fp64 for fp64 inputs); softcap 0: no cap."""
    batch, num_heads, q_len, _ = query.shape
    heads, size = len(lengths) // batch, key_pages.shape[1]
    group = num_heads // heads
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(batch, q_len, num_heads, value_pages.shape[2])
    log_total = query.new_zeros(batch, q_len, num_heads, dtype=torch.float32)
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
        logits = query[row, own].to(wide) @ key.T * scaling
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.masked_fill(~seen, -torch.inf)
        if sinks is not None:  # an entry whose value is zero
            sink = sinks[own].to(wide).view(-1, 1, 1).expand(-1, len(unseen), 1)
            logits, value = torch.cat([logits, sink], -1), torch.cat([value, value.new_zeros(1, value.shape[1])])
        weights = logits.softmax(-1).masked_fill(logits.isneginf().all(-1, keepdim=True), 0.0)
        out[row, :, own] = (weights @ value).transpose(0, 1).to(query.dtype)
        log_total[row, :, own] = logits.logsumexp(-1).T.float()
    return out, log_total


def segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor,
    scaling: float, softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """Same contract as `ops.segment_attention.segment_attention`, which takes its kernel too; fp64 for fp64 inputs."""
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:3], value.shape[1])
    heads, group = query.shape[1:3]
    for segment, (of_segment, result, start, end) in enumerate(
        zip(query.flatten(0, 1), out.flatten(0, 1), starts.tolist(), ends.tolist(), strict=True)
    ):
        if end > start:
            logits = softmax.capped(of_segment.to(wide) @ key[start:end].to(wide).T * scaling)
            own = slice(segment % heads * group, (segment % heads + 1) * group)
            sinks = None if softmax.sinks is None else softmax.sinks[own]
            weights = Softmax(softmax.softcap, sinks).weights(logits[None, :, None])[0, :, 0]
            result.copy_(weights @ value[start:end].to(wide))
    return out


def paged_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pages: PageAddresses, layer: int, scaling: float,
    out: torch.Tensor, log_sums: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Same contract as `ops.segment_attention.paged_attention`, which takes its kernel too; fp64 for fp64 inputs."""
    size, arrays = pages.page_size, iter(pages.arrays)
    wide = torch.promote_types(query.dtype, torch.float32)
    for row, (ragged, *_, tokens) in enumerate(pages.rows.tolist()):
        compressed = [next(arrays) for _ in range(3)] if ragged else None
        table = next(arrays)
        for head in range(pages.heads):
            segment = layer * pages.heads + head
            lists = [(torch.from_numpy(table[segment].astype("int64")), tokens)]
            if compressed is not None:
                listed, bounds, lengths = compressed
                own = listed[bounds[segment] : bounds[segment + 1]]
                lists.insert(0, (torch.from_numpy(own.astype("int64")), int(lengths[segment])))
            slots = torch.cat([entry_slots(own, 0, count, size) for own, count in lists])
            if new is not None:
                key[slots[-1]], value[slots[-1]] = new[0][row, head], new[1][row, head]
            logits = query[row, head].to(wide) @ key[slots].to(wide).T * scaling
            log_sums[row, head] = logits.logsumexp(1)
            out[row, head] = logits.softmax(1).to(wide) @ value[slots].to(wide)


def window_risk(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, query_positions: torch.Tensor,
    limit: torch.Tensor, scaling: float, kernel: int, mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Same contract as `ops.window_risk.window_risk`, by the formulas below."""
    attention = attention_over(keys, positions, queries, query_positions, scaling)
    counted = (positions >= 0) & (positions < limit.view(-1, 1, 1))
    worst = worst_case(pool_and_renormalise(attention, counted, kernel))
    return worst, mean_over_queries(attention, query_positions) if mean else worst.new_zeros(0)


def value_norms(values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """Same contract as `ops.value_norms.value_norms`."""
    return norms_by_parts(values, output_weight).contiguous()


def pool_and_renormalise(attention: torch.Tensor, counted: torch.Tensor, kernel: int) -> torch.Tensor:
    """Average-pools each query's attention along the entries, then scales it back to its sum.

    Args:
        attention: fp32 `(batch, num_kv_heads, num_kv_groups, w, n)`.
        counted: bool `(batch, num_kv_heads, n)`: entries outside the window; the others count as 0.
        kernel: width of the pooling, odd; zero-padded at the ends.

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


PROJECTED_BYTES = 2**20  # of a projection that are held at a time, to fit into a CPU's cache


def by_head(values: torch.Tensor, output_weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The arguments of `value_norms` by key/value head, contiguous: `(heads, batch * n, dim)`, `(heads, dim, columns)`.

    The columns are those of all query heads of a group.
    """
    heads = values.shape[1]
    flat = values.transpose(0, 1).flatten(1, 2).to(dtype)
    weight = output_weight.to(dtype).unflatten(0, (heads, output_weight.shape[0] // heads))
    return flat.contiguous(), weight.transpose(1, 2).flatten(2).contiguous()


def norms_by_parts(values: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """`value_norms` in plain torch, in fp32; a few entries are projected at a time.

    16-bit numbers are multiplied in fp32 too: CPUs without 16-bit arithmetic take four times as long otherwise.
    """
    batch, heads, n, _ = values.shape
    flat, weight = by_head(values, output_weight, torch.float32)
    columns = weight.shape[2]
    norms = flat.new_empty(heads, batch * n)
    size = max(1, PROJECTED_BYTES // (columns * flat.itemsize))
    projected = flat.new_empty(min(size, batch * n), columns)
    for of_head, matrix, out in zip(flat, weight, norms, strict=True):
        for part, sums in zip(of_head.split(size), out.split(size), strict=True):
            torch.sum(torch.mm(part, matrix, out=projected[: part.shape[0]]).abs_(), 1, out=sums)
    return norms.div_(output_weight.shape[0] // heads).view(heads, batch, n).transpose(0, 1)


def attention_over(
    keys: torch.Tensor, positions: torch.Tensor, queries: torch.Tensor, query_positions: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Causal softmax of each query over all entries of its key/value head.

    Args:
        keys: `(batch, num_kv_heads, n, head_dim)`, post-RoPE.
        positions: int64 `(batch, num_kv_heads, n)`, -1 for no entry.
        queries: `(batch, num_heads, w, head_dim)`, post-RoPE.
        query_positions: int64 `(batch, w)`, -1 for no query.
        scaling: factor of the logits.

    Returns:
        fp32 `(batch, num_kv_heads, num_kv_groups, w, n)`; zeros for a query that is missing or sees no entry.
    """
    batch, heads, n, _ = keys.shape
    groups = queries.shape[1] // heads
    queries = queries.float().reshape(batch, heads, -1, queries.shape[-1])  # the group's heads as queries
    logits = (queries * scaling) @ keys.float().transpose(2, 3)
    logits = logits.view(batch, heads, groups, -1, n)
    hidden = positions.unsqueeze(2) > query_positions[:, None, :, None]
    hidden = (hidden | (positions < 0).unsqueeze(2)).unsqueeze(2)
    attention = logits.masked_fill_(hidden, torch.finfo(torch.float32).min).softmax(-1)
    blind = hidden.all(-1, keepdim=True)
    return attention.masked_fill_(blind, 0.0) if bool(blind.any()) else attention


def mean_over_queries(attention: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
    """Mean over the queries that exist, then over the heads of a group.

    Args:
        attention: fp32 `(batch, num_kv_heads, num_kv_groups, w, n)`.
        query_positions: int64 `(batch, w)`, -1 for no query.

    Returns:
        fp32 `(batch, num_kv_heads, n)`.
    """
    present = (query_positions >= 0)[:, None, None, :, None]
    count = present.sum(3).clamp(min=1)
    return ((attention * present).sum(3) / count).mean(2)
