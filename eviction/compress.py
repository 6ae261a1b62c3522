"""One eviction: score every layer, choose what stays, give the rest of the memory back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .budget import Plan
from .layer import RaggedLayer
from .select import select_top
from .view import LayerView


@torch.no_grad()
def choose(
    layers: Sequence[RaggedLayer],
    plan: Plan,
    tokens: Sequence[int],
    due: Sequence[bool],
    query_positions: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Which entries stay under `plan`.

    Args:
        layers: the layers that compete; all have entries.
        tokens: real tokens each row has seen.
        due: the rows that evict; the others keep everything.
        query_positions: `(batch, size)` positions of the remembered queries, for policies that read them.

    Returns:
        A bool tensor `(batch, num_kv_heads, n)` a layer, in the order of the layer's segments.
    Raises:
        ValueError: the policy's scores have the wrong shape or are not numbers.
    """
    time = torch.tensor(list(tokens), device=layers[0].device)
    limits = [plan.protected(count) for count in tokens]
    sinks, recent = torch.tensor(limits, device=time.device).view(-1, 2, 1, 1).unbind(1)
    scores, positions = [], []
    for layer in layers:
        view = LayerView(layer, time, query_positions, plan.policy.window_size)
        score = _checked(plan, layer.layer_idx, plan.policy.score(view), view.valid)
        kept_anyway = (view.positions < sinks) | (view.positions >= time.view(-1, 1, 1) - recent)
        scores.append(score.masked_fill(kept_anyway, torch.inf).masked_fill(~view.valid, -torch.inf))
        positions.append(view.positions)
    allowed = [plan.budget.per_head(count) if now else None for count, now in zip(tokens, due, strict=True)]
    if plan.scope == "global":
        return _compete(scores, positions, allowed)
    if plan.scope == "layer":
        return [_compete([score], [place], allowed)[0] for score, place in zip(scores, positions, strict=True)]
    return [_alone(score, place, allowed) for score, place in zip(scores, positions, strict=True)]


def _checked(plan: Plan, layer_idx: int, score: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The policy's scores as finite fp32, so that infinities can mark the protected and the missing."""
    name = type(plan.policy).__name__
    if score.shape != valid.shape:
        raise ValueError(f"{name}.score gave {tuple(score.shape)} in layer {layer_idx}, expected {tuple(valid.shape)}")
    if bool((score.isnan() & valid).any()):
        raise ValueError(f"{name}.score gave NaN in layer {layer_idx}")
    limit = torch.finfo(torch.float32).max
    return score.float().clamp(-limit, limit)


def _compete(
    scores: list[torch.Tensor], positions: list[torch.Tensor], allowed: list[int | None]
) -> list[torch.Tensor]:
    """All heads of the given layers compete within each row."""
    batch = scores[0].shape[0]
    segments = sum(score.shape[1] for score in scores)
    flat = torch.cat([score.flatten(1) for score in scores], dim=1)

    def order() -> torch.Tensor:
        """Newer first, then the lower layer and head."""
        parts, before = [], 0
        for place in positions:
            number = before + torch.arange(place.shape[1], device=place.device)
            parts.append((place * segments + (segments - 1 - number).view(1, -1, 1)).flatten(1))
            before += place.shape[1]
        return torch.cat(parts, dim=1)

    keep = select_top(flat, [flat.shape[1] if k is None else k * segments for k in allowed], order)
    sizes = [score[0].numel() for score in scores]
    parts = keep.split(sizes, dim=1)
    return [part.view(batch, *score.shape[1:]) for part, score in zip(parts, scores, strict=True)]


def _alone(score: torch.Tensor, positions: torch.Tensor, allowed: list[int | None]) -> torch.Tensor:
    """Every head keeps its own number."""
    _, heads, n = score.shape
    k = [n if one is None else one for one in allowed for _ in range(heads)]
    return select_top(score.flatten(0, 1), k, lambda: positions.flatten(0, 1)).view(score.shape)
