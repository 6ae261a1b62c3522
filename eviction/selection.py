"""One eviction: scores the entries of all layers and selects those to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..retention.head_shards import UNDIVIDED, HeadShards
from ..retention.ops.kernel_choice import chosen_kernels
from .cache_layer import RaggedLayer
from .layer_view import LayerView
from .ops.naive import top_of_rows
from .ops.radix_select import select_with_kernels, top_of_each_head
from .plan import BudgetAllocation, BudgetLayout, EvictionPlan, by_preference
from .policies.policy import Policy


def layout_of(layers: Sequence[RaggedLayer]) -> BudgetLayout:
    """The budget layout of these layers; all have entries."""
    stores = [layer.store for layer in layers if layer.store is not None]
    assert len(stores) == len(layers), "every layer has entries"
    count = layers[0].attention.shards.count
    heads = tuple(count * store.num_kv_heads for store in stores)
    entry_bytes = max((store.entry_bytes for store in stores), default=0)
    spare = max((store.spare for store in stores), default=1)
    return BudgetLayout(heads, entry_bytes, spare)


@torch.no_grad()
def choose(
    layers: Sequence[RaggedLayer], plan: EvictionPlan, tokens: Sequence[int], due: Sequence[bool],
    query_positions: torch.Tensor | None, horizon: Sequence[int] | None = None, later: Sequence[bool] | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Selects the entries to keep under `plan`.

    Args:
        layers: the layers that compete; all have entries.
        tokens: real tokens each row has seen.
        due: True for the rows that evict; the others keep everything.
        query_positions: `(batch, size)` positions of the recorded queries, for policies that read them.
        horizon: real tokens each row will have seen at the end of the running input, which its budget is counted
            from; None for `tokens`.
        later: True for the rows whose text has begun in an earlier input, see `Protection`; None for none.

    Returns:
        For each layer bool `(batch, num_kv_heads, n)`, True for entries to keep.
    Raises:
        ValueError: the policy's scores have the wrong shape or are not numbers; the budget is too small for the tokens
            that `plan.protect` names, or for one entry per head.
    """
    times = {device: torch.tensor(list(tokens), device=device) for device in {layer.device for layer in layers}}
    layout = layout_of(layers)
    ends = list(tokens if horizon is None else horizon)
    scored_at = list(tokens) if plan.rules.horizon == "seen" else ends
    shares = [plan.allocate(end, layout) if now else None for end, now in zip(ends, due, strict=True)]
    protected = {device: _ProtectedPositions(plan, tokens, shares, time, later) for device, time in times.items()}
    scores, positions, preferences = [], [], []
    for index, layer in enumerate(layers):
        time = times[layer.device]
        evicting = torch.tensor(list(due), device=layer.device).view(-1, 1, 1)
        allowed = [0 if share is None else share.shares[index] for share in shares]
        view = plan.policy.view(layer, time, query_positions, time.new_tensor(allowed), time.new_tensor(scored_at))
        conclude(layer, plan.policy, view, evicting)
        score = _checked(plan, layer.layer_idx, plan.policy.score(view), view.valid)
        if plan.scope == "preference":
            preferences.append(plan.policy.layer_preference(view).tolist())
        score = torch.where(evicting, score, 0.0)  # a row that is not due keeps entries scored -inf
        score = score.masked_fill(protected[layer.device].mask(view.positions, index), torch.inf)
        scores.append(score.masked_fill(~view.valid, -torch.inf))
        positions.append(view.positions)
    shards = layers[0].attention.shards
    if plan.scope == "preference":
        shares = [
            share and _preferred(share, [layer[row] for layer in preferences], end, plan.policy.window_size, layout)
            for row, (share, end) in enumerate(zip(shares, ends, strict=True))
        ]
    for floor in plan.token_floors:
        inside = [floor.mask(place, tokens) for place in positions]
        scores = _with_token_floor(scores, positions, inside, shares, plan.scope, floor.share, shards)
    if plan.scope in ("head", "pyramid", "preference"):
        return _select_per_head(scores, positions, shares, shards)
    if plan.floor and plan.rules.floor == "add":
        return _select_with_floor_added(scores, positions, shares, plan.scope, plan.floor, shards)
    if plan.floor:
        floor = [0 if share is None else max(1, int(plan.floor * share.average)) for share in shares]
        scores = [_with_floor(score, place, floor) for score, place in zip(scores, positions, strict=True)]
    return _compete_in_groups(scores, positions, [share and share.groups for share in shares], plan.scope, shards)


def _preferred(
    share: BudgetAllocation, preferences: Sequence[float], tokens: int, window: int, layout: BudgetLayout
) -> BudgetAllocation:
    """The allocation by the layers' preferences of a row."""
    numbers = by_preference(share.average, preferences, tokens, window)
    groups = [number for number, heads in zip(numbers, layout.heads, strict=True) for _ in range(heads)]
    return BudgetAllocation(groups, numbers, share.average)


def conclude(layer: RaggedLayer, policy: Policy, view: LayerView, evicting: torch.Tensor) -> None:
    """Stores the policy's conclusions for the rows that evict; the states of other rows stay unchanged.

    Args:
        evicting: bool `(batch, 1, 1)`.
    """
    new = {
        policy.state_key(state): torch.where(evicting, values, view.state(state))
        for state, values in policy.conclude(view).items()
    }
    if new:
        assert layer.store is not None, "the layer has entries"
        layer.store.set_states(new)


class _ProtectedPositions:
    """Positions that are kept regardless of their score: sinks, recent tokens and those of `plan.protect`."""

    def __init__(
        self, plan: EvictionPlan, tokens: Sequence[int], shares: Sequence[BudgetAllocation | None], time: torch.Tensor,
        later: Sequence[bool] | None,
    ) -> None:  # fmt: skip
        later = [False] * len(tokens) if later is None else later
        layers = next((len(share.shares) for share in shares if share is not None), 0)
        limits = [
            [
                (0, 0) if share is None else plan.protected(row, count, share.shares[layer], later[row])
                for row, (count, share) in enumerate(zip(tokens, shares, strict=True))
            ]
            for layer in range(layers)
        ]
        self._limits = torch.tensor(limits, device=time.device).view(layers, len(tokens), 2, 1, 1)
        self._time = time.view(-1, 1, 1)
        self._table = None if plan.protect is None else plan.protect.table(tokens, time.device)

    def mask(self, positions: torch.Tensor, layer: int) -> torch.Tensor:
        """bool `(batch, heads, n)` for entries at `positions`, int64, -1 for none; `layer` is an index of `shares`."""
        sinks, recent = self._limits[layer].unbind(1)
        kept = (positions < sinks) | (positions >= self._time - recent)
        if self._table is not None:
            table = self._table.unsqueeze(1).expand(-1, positions.shape[1], -1)
            kept |= table.gather(2, positions.clamp(min=0))
        return kept


def _checked(plan: EvictionPlan, layer_idx: int, score: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The policy's scores as fp32 below +inf, which marks protected entries; -inf ("never keep") is left."""
    name = type(plan.policy).__name__
    if score.shape != valid.shape:
        raise ValueError(f"{name}.score gave {tuple(score.shape)} in layer {layer_idx}, expected {tuple(valid.shape)}")
    if bool((score.isnan() & valid).any()):
        raise ValueError(f"{name}.score gave NaN in layer {layer_idx}")
    return score.float().clamp(max=torch.finfo(torch.float32).max)


def _with_floor(score: torch.Tensor, positions: torch.Tensor, floor: list[int]) -> torch.Tensor:
    """Scores with +inf for the `floor[row]` best entries of every head, which are kept regardless of other heads."""
    each = [k for k in floor for _ in range(score.shape[1])]
    return score.masked_fill(top_of_each_head(score, positions, each), torch.inf)


def _with_token_floor(
    scores: list[torch.Tensor], positions: list[torch.Tensor], inside: list[torch.Tensor],
    shares: list[BudgetAllocation | None], scope: str, share: float, shards: HeadShards,
) -> list[torch.Tensor]:  # fmt: skip
    """Scores in which the best entries `inside` rank above all but protected ones, as many as `share` of the budget."""
    parts = [one and replace(one, groups=[int(group * share) for group in one.groups]) for one in shares]
    among = [score.masked_fill(~mask, -torch.inf) for score, mask in zip(scores, inside, strict=True)]
    if scope in ("head", "pyramid", "preference"):
        best = _select_per_head(among, positions, parts, shards)
    else:
        best = _compete_in_groups(among, positions, [one and one.groups for one in parts], scope, shards)
    top = torch.finfo(torch.float32).max
    return [
        torch.where(keep & mask & (score < torch.inf), top, score)
        for score, keep, mask in zip(scores, best, inside, strict=True)
    ]


def _select_with_floor_added(
    scores: list[torch.Tensor], positions: list[torch.Tensor], shares: list[BudgetAllocation | None], scope: str,
    floor: float, shards: HeadShards,
) -> list[torch.Tensor]:  # fmt: skip
    """Heads compete for a share 1 - `floor` of the budget; then each keeps as many and `floor` of the average more."""
    rest = [None if share is None else [int(group * (1 - floor)) for group in share.groups] for share in shares]
    more = torch.tensor([0 if share is None else int(share.average * floor) for share in shares]).unsqueeze(1)
    counts = [keep.sum(2) + more.to(keep.device) for keep in _compete_in_groups(scores, positions, rest, scope, shards)]
    return [
        top_of_each_head(score, place, count.flatten().tolist())
        for score, place, count in zip(scores, positions, counts, strict=True)
    ]


def _compete_in_groups(
    scores: list[torch.Tensor],
    positions: list[torch.Tensor],
    allowed: list[list[int] | None],
    scope: str,
    shards: HeadShards,
) -> list[torch.Tensor]:
    """Keeps the best entries of each group of heads, the row or a layer; `allowed[row]`: how many, None keeps all.

    Heads in other processes take part: every process makes the same selection over all heads, and returns its own.
    """
    if shards.count > 1:
        home, sizes = scores[0].device, [score.shape[2] for score in scores]
        everywhere = (
            shards.gathered([score.to(home) for score in scores], -torch.inf),
            shards.gathered([place.to(home) for place in positions], -1),
        )
        keeps = _compete_in_groups(*everywhere, allowed, scope, UNDIVIDED)
        return [
            shards.own(keep)[:, :, :n].to(score.device) for keep, n, score in zip(keeps, sizes, scores, strict=True)
        ]
    if scope == "global":
        return _compete(scores, positions, [None if groups is None else groups[0] for groups in allowed])
    return [
        _compete([score], [place], [None if groups is None else groups[index] for groups in allowed])[0]
        for index, (score, place) in enumerate(zip(scores, positions, strict=True))
    ]


def _compete(
    scores: list[torch.Tensor], positions: list[torch.Tensor], allowed: list[int | None]
) -> list[torch.Tensor]:
    """Keeps the best `allowed[row]` entries of each row over all heads of the given layers; None keeps all.

    Layers on other devices than the first one's send their scores there, and get their part of the result back.
    """
    batch, devices, home = scores[0].shape[0], [score.device for score in scores], scores[0].device
    scores, positions = [score.to(home) for score in scores], [place.to(home) for place in positions]
    segments = sum(score.shape[1] for score in scores)
    flat = torch.cat([score.flatten(1) for score in scores], dim=1)
    counts = [flat.shape[1] if k is None else k for k in allowed]
    sizes = [score[0].numel() for score in scores]

    def order() -> torch.Tensor:
        """Newer first, then the lower layer and head."""
        parts, before = [], 0
        for place in positions:
            number = before + torch.arange(place.shape[1], device=place.device)
            parts.append((place * segments + (segments - 1 - number).view(1, -1, 1)).flatten(1))
            before += place.shape[1]
        return torch.cat(parts, dim=1)

    if chosen_kernels(flat.device) == "triton":
        place = torch.cat([one.flatten(1) for one in positions], dim=1)
        keep = select_with_kernels(flat, place, counts, [n for one in scores for n in [one.shape[2]] * one.shape[1]])
    else:
        keep = top_of_rows(flat, counts, order)
    parts = keep.split(sizes, dim=1)
    return [
        part.view(batch, *score.shape[1:]).to(device)
        for part, score, device in zip(parts, scores, devices, strict=True)
    ]


def _select_per_head(
    scores: list[torch.Tensor],
    positions: list[torch.Tensor],
    shares: list[BudgetAllocation | None],
    shards: HeadShards,
) -> list[torch.Tensor]:
    """Keeps the best entries of every head by its own number."""
    keeps, before = [], 0
    for score, place in zip(scores, positions, strict=True):
        _, heads, n = score.shape
        first = before + shards.index * heads
        own = slice(first, first + heads)
        k = [one for share in shares for one in ([n] * heads if share is None else share.groups[own])]
        keeps.append(top_of_each_head(score, place, k))
        before += heads * shards.count
    return keeps
