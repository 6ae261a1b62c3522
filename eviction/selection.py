"""One eviction: score every layer, choose what stays, give the rest of the memory back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..retention.ops.kernel_choice import chosen_kernels
from .cache_layer import RaggedLayer
from .layer_view import LayerView
from .ops.naive import top_of_rows
from .ops.radix_select import select_with_kernels, top_of_each_head
from .plan import Allocation, Layout, Plan
from .policies.base import Policy


def layout_of(layers: Sequence[RaggedLayer]) -> Layout:
    """What the budget of a row in these layers is shared among; all have entries."""
    stores = [layer.store for layer in layers if layer.store is not None]
    assert len(stores) == len(layers), "every layer has entries"
    heads = tuple(store.num_kv_heads for store in stores)
    entry_bytes = max((store.entry_bytes for store in stores), default=0)
    return Layout(heads, entry_bytes, max((store.spare for store in stores), default=1))


@torch.no_grad()
def choose(
    layers: Sequence[RaggedLayer],
    plan: Plan,
    tokens: Sequence[int],
    due: Sequence[bool],
    query_positions: torch.Tensor | None,
    horizon: Sequence[int] | None = None,
) -> list[torch.Tensor]:
    """Which entries stay under `plan`.

    Args:
        layers: the layers that compete; all have entries.
        tokens: real tokens each row has seen.
        due: the rows that evict; the others keep everything.
        query_positions: `(batch, size)` positions of the remembered queries, for policies that read them.
        horizon: real tokens each row will have seen at the end of the running input, which its budget is counted
            from; None for `tokens`.

    Returns:
        A bool tensor `(batch, num_kv_heads, n)` a layer, in the order of the layer's segments.
    Raises:
        ValueError: the policy's scores have the wrong shape or are not numbers; the budget is too small for the tokens
            that `plan.protect` names, or for one entry a head.
    """
    time = torch.tensor(list(tokens), device=layers[0].device)
    layout = layout_of(layers)
    ends = list(tokens if horizon is None else horizon)
    shares = [plan.allocate(end, layout) if now else None for end, now in zip(ends, due, strict=True)]
    kept_anyway = _Protection(plan, tokens, shares, time)
    evicting = torch.tensor(list(due), device=time.device).view(-1, 1, 1)
    scores, positions = [], []
    for index, layer in enumerate(layers):
        allowed = [0 if share is None else share.shares[index] for share in shares]
        view = LayerView(layer, time, query_positions, plan.policy, time.new_tensor(allowed), time.new_tensor(ends))
        conclude(layer, plan.policy, view, evicting)
        score = _checked(plan, layer.layer_idx, plan.policy.score(view), view.valid)
        score = torch.where(evicting, score, 0.0)  # a row that keeps everything keeps -inf as well
        score = score.masked_fill(kept_anyway.mask(view.positions, index), torch.inf)
        scores.append(score.masked_fill(~view.valid, -torch.inf))
        positions.append(view.positions)
    if plan.scope in ("head", "pyramid"):
        return _alone(scores, positions, shares)
    if plan.floor:
        safe = [0 if share is None else max(1, int(plan.floor * share.average)) for share in shares]
        scores = [_lifted(score, place, safe) for score, place in zip(scores, positions, strict=True)]
    if plan.scope == "global":
        return _compete(scores, positions, [share and share.groups[0] for share in shares])
    return [
        _compete([score], [place], [share and share.groups[index] for share in shares])[0]
        for index, (score, place) in enumerate(zip(scores, positions, strict=True))
    ]


def conclude(layer: RaggedLayer, policy: Policy, view: LayerView, evicting: torch.Tensor) -> None:
    """Stores what the policy concludes about the rows that evict; the others must not depend on when these do.

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


class _Protection:
    """Which positions stay whatever their score: sinks, recent tokens and those of `plan.protect`."""

    def __init__(
        self, plan: Plan, tokens: Sequence[int], shares: Sequence[Allocation | None], time: torch.Tensor
    ) -> None:
        layers = next((len(share.shares) for share in shares if share is not None), 0)
        limits = [
            [
                (0, 0) if share is None else plan.protected(row, count, share.shares[layer])
                for row, (count, share) in enumerate(zip(tokens, shares, strict=True))
            ]
            for layer in range(layers)
        ]
        self._limits = torch.tensor(limits, device=time.device).view(layers, len(tokens), 2, 1, 1)
        self._time = time.view(-1, 1, 1)
        self._table = None if plan.protect is None else plan.protect.table(tokens, time.device)

    def mask(self, positions: torch.Tensor, layer: int) -> torch.Tensor:
        """bool `(batch, heads, n)` for entries at `positions`, int64, -1 for none; `layer` counts those that evict."""
        sinks, recent = self._limits[layer].unbind(1)
        kept = (positions < sinks) | (positions >= self._time - recent)
        if self._table is not None:
            table = self._table.unsqueeze(1).expand(-1, positions.shape[1], -1)
            kept |= table.gather(2, positions.clamp(min=0))
        return kept


def _checked(plan: Plan, layer_idx: int, score: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The policy's scores as fp32 below infinity, which marks the protected; -inf stays: not even if there is room."""
    name = type(plan.policy).__name__
    if score.shape != valid.shape:
        raise ValueError(f"{name}.score gave {tuple(score.shape)} in layer {layer_idx}, expected {tuple(valid.shape)}")
    if bool((score.isnan() & valid).any()):
        raise ValueError(f"{name}.score gave NaN in layer {layer_idx}")
    return score.float().clamp(max=torch.finfo(torch.float32).max)


def _lifted(score: torch.Tensor, positions: torch.Tensor, safe: list[int]) -> torch.Tensor:
    """The `safe[row]` best entries of every head get +inf: they win the competition with other heads."""
    each = [k for k in safe for _ in range(score.shape[1])]
    return score.masked_fill(top_of_each_head(score, positions, each), torch.inf)


def _compete(
    scores: list[torch.Tensor], positions: list[torch.Tensor], allowed: list[int | None]
) -> list[torch.Tensor]:
    """All heads of the given layers compete within each row, for `allowed[row]` entries; None keeps all."""
    batch = scores[0].shape[0]
    segments = sum(score.shape[1] for score in scores)
    flat = torch.cat([score.flatten(1) for score in scores], dim=1)
    wanted = [flat.shape[1] if k is None else k for k in allowed]
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
        keep = select_with_kernels(flat, place, wanted, [n for one in scores for n in [one.shape[2]] * one.shape[1]])
    else:
        keep = top_of_rows(flat, wanted, order)
    parts = keep.split(sizes, dim=1)
    return [part.view(batch, *score.shape[1:]) for part, score in zip(parts, scores, strict=True)]


def _alone(
    scores: list[torch.Tensor], positions: list[torch.Tensor], shares: list[Allocation | None]
) -> list[torch.Tensor]:
    """Every head keeps its own number."""
    keeps, before = [], 0
    for score, place in zip(scores, positions, strict=True):
        _, heads, n = score.shape
        own = slice(before, before + heads)
        k = [one for share in shares for one in ([n] * heads if share is None else share.groups[own])]
        keeps.append(top_of_each_head(score, place, k))
        before += heads
    return keeps
