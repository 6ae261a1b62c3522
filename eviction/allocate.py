"""How a row's budget is shared out to those who compete for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

SCOPES = ("global", "layer", "head", "pyramid")
PYRAMID_BETA = 20


@dataclass(frozen=True)
class Layout:
    """What a row's budget is shared among.

    Attributes:
        heads: key/value heads of each layer that evicts.
        entry_bytes: bytes of one entry: key, value, position and per-entry state; of the layer where it is largest.
        spare: entries a segment that the storage may have room for beyond the slack.
    """

    heads: tuple[int, ...]
    entry_bytes: int
    spare: int = 1

    @property
    def segments(self) -> int:
        """Heads of all layers."""
        return sum(self.heads)


@dataclass(frozen=True)
class Allocation:
    """The entries of one row that each group of competitors keeps.

    Attributes:
        groups: one number a group: the row (scope "global"), its layers ("layer"), or its heads layer by layer.
        shares: for each layer, how many entries every one of its heads can be promised; tokens that must stay in all
            heads have to fit in it.
        average: entries per head, rounded down.
    """

    groups: list[int]
    shares: list[int]
    average: int


def allocate(scope: str, total: int, tokens: int, layout: Layout, window: int = 0) -> Allocation:
    """Shares `total` entries out; the groups' numbers add up to it exactly.

    Args:
        scope: one of `SCOPES`.
        tokens: tokens the row has seen.
        window: tokens of the policy's observation window, for "pyramid".
    """
    average = total // layout.segments
    if scope == "global":
        return Allocation([total], [average] * len(layout.heads), average)
    if scope == "layer":
        groups = apportion(total, layout.heads)
        return Allocation(groups, [k // h for k, h in zip(groups, layout.heads, strict=True)], average)
    weights = [1.0] * len(layout.heads)
    if scope == "pyramid":
        weights = pyramid(total / layout.segments, tokens, len(layout.heads), window)
    per_layer = apportion(total, [w * h for w, h in zip(weights, layout.heads, strict=True)])
    per_head = [apportion(k, [1] * heads) for k, heads in zip(per_layer, layout.heads, strict=True)]
    return Allocation([k for layer in per_head for k in layer], [min(layer) for layer in per_head], average)


def pyramid(average: float, tokens: int, layers: int, window: int = 0) -> list[float]:
    """Entries per head of each layer, falling linearly from the bottom layer to the top one; `average` on average.

    Source: PyramidKV (Cai et al., 2024), with β = 20, as computed by kvpress's `PyramidKVPress.get_layer_budget`: the
    top layer gets average/β, unless the bottom one would exceed `tokens - window`, which then is its share and the top
    one's grows. Where the top layer would not hold the window, or nothing, all layers get the same.

    Args:
        average: entries per head on average over the layers.
        tokens: tokens the row has seen.
        window: tokens of the observation window, which every layer keeps.
    """
    low = average / PYRAMID_BETA
    high = 2 * average - low
    if high >= tokens - window:
        high = float(tokens - window)
        low = 2 * average - high
    if layers == 1 or not tokens >= high >= low >= max(1, window):
        return [average] * layers
    return [high - (high - low) * layer / (layers - 1) for layer in range(layers)]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole shares proportional to `weights`, each rounded so that they add up to it exactly.

    The running sum of the shares is the running sum of the exact ones, rounded: no share is off by a whole entry.
    """
    whole = sum(weights)
    ends = [int(total * part / whole + 0.5) for part in accumulate(weights)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
