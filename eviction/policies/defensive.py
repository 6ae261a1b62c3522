"""DefensiveKV and Layer-DefensiveKV: entries are kept by the worst case of their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..layer_view import LayerView
from ..ops.naive import mean_over_queries, pool_and_renormalise, top_by_mass
from ..ops.radix_select import top_of_each_head
from ..ops.value_norms import value_norms
from .common import Share, Window, check_kernel, own_entries
from .policy import Policy


def flat_prior(worst: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean of the worst case over the head's entries outside the window: `(batch, num_kv_heads, 1)`."""
    total = worst.masked_fill(~counted, 0.0).sum(2, keepdim=True)
    return total / counted.sum(2, keepdim=True).clamp(min=1)


def defensive_aggregate(worst: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """The risk of evicting an entry: the worst case of its attention, but no less than the prior."""
    return torch.maximum(worst, prior)


def mass_protection(
    mean: torch.Tensor, needed: torch.Tensor, counted: torch.Tensor, most: torch.Tensor
) -> torch.Tensor:
    """The fewest entries of each head that cover a mass of the mean attention.

    Entries are taken in the order of their mean attention, of equal ones the last.

    Args:
        mean: fp32 `(batch, num_kv_heads, n)`: attention, mean over queries and heads of the group.
        needed: fp32 `(batch, num_kv_heads)`: the mass to cover: `Defensive.mass` minus the mass within the window. The
            released code measures the latter after it has cut the window off; here it is that of the window.
        counted: bool `(batch, num_kv_heads, n)`: entries outside the window.
        most: int64 `(batch,)`: maximal number of entries per head.

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


def released_protection(
    mean: torch.Tensor, mass: float, counted: torch.Tensor, bias: torch.Tensor, most: torch.Tensor
) -> torch.Tensor:
    """The entries that the released code protects beside the window.

    The mean attention is normalised to sum to 1 over a head's entries outside the window. Entries are taken in its
    order while their sum stays below `mass` less the bias of the layer: the entry that would cross it is not taken. The
    bias is meant to be the window's own attention, but the code has cut the window off before it sums the last columns:
    what it subtracts is the attention to the `window` tokens before the window, one number for all heads of a layer.

    Args:
        mean: fp32 `(batch, num_kv_heads, n)`: attention, mean over queries and heads of the group.
        mass: `Defensive.mass`.
        counted: bool `(batch, num_kv_heads, n)`: entries outside the window.
        bias: fp32 `(batch, 1)`: the mean attention to the last `window` tokens before the window, mean over all heads.
        most: int64 `(batch,)`: maximal number of entries per head; none are taken if it is negative, where the released
            code would protect all but that many.

    Returns:
        bool `(batch, num_kv_heads, n)`.
    """
    mean = mean.masked_fill(~counted, 0.0)
    shares = (mean / mean.sum(2, keepdim=True)).nan_to_num(0.0)
    crossing = (top_by_mass(shares, (mass - bias).expand(mean.shape[:2])) & counted).sum(2)
    taken = torch.minimum(crossing - 1, most.view(-1, 1)).clamp(min=0)
    place = torch.arange(mean.shape[2], device=mean.device).expand(mean.shape)
    return top_of_each_head(shares.masked_fill(~counted, -torch.inf), place, taken.flatten().tolist())


@dataclass(frozen=True)
class Defensive(Policy):
    """Worst case of the attention of a window's queries, no less than its mean, times `‖v_i W_O‖₁`.

    Source: "Taming the Fragility of KV Cache Eviction" (Feng et al., ICLR 2026), section 4; defaults as in the released
    code, whose kept sets are reproduced to the entry. In addition to the window, the entries that cover `mass` of its
    attention are protected.

    The paper compresses a prompt once. Here the worst case is a running maximum over the windows of all evictions: at
    each, the last `window` queries observe the entries outside the window, so that a prompt may be read in chunks, and
    decoding costs nothing between evictions. For a prompt that is evicted once both are equal.

    Attributes:
        window: number of the last queries that observe; their own entries are kept.
        kernel: width of the pooling along the entries, odd.
        value_norm: normalisation of the value term: "heads", by its sum over the heads of the token (the released
            code); "tokens", by its sum over the entries of the head (the paper); "raw", not at all. "none": no value
            term.
        mass: the share of the window's mean attention, in [0, 1], that the protected entries of each head cover (0.9 in
            the paper), up to a head's average budget. 0 protects the window alone.
        protection: "released": as the released code does (see `released_protection`); protected entries and the window
            get the layer's largest score, so that layers still compete for them. "cumulative": as the paper reads:
            window and entries, with the one that crosses, cover `mass` of each head's attention together
            (`mass_protection`), and are kept regardless of their risk.
        aggregation: "max", the worst case over queries and heads of the group; "mean", the mean of the paper's
            comparison.
        prior: the least risk of an entry: "mean", the mean of its head's risks; "none"; or a number (the fixed
            thresholds of the paper's comparison are 1e-3, 1e-4 and 1e-5).
    """

    window: Window = 32
    kernel: Window = 5
    value_norm: Literal["heads", "tokens", "raw", "none"] = "heads"
    mass: Share = 0.9
    protection: Literal["released", "cumulative"] = "released"
    aggregation: Literal["max", "mean"] = "max"
    prior: Literal["mean", "none"] | Share = "mean"

    name: ClassVar[str] = "defensive"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "queries", "output_weight"})
    states: ClassVar[tuple[str, ...]] = ("worst", "value")
    default_scope: ClassVar[str] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(type(self).__name__, self.kernel)

    @property
    def window_size(self) -> int:
        return self.window

    def conclude(self, view: LayerView) -> dict[str, torch.Tensor]:
        now = view.worst_attention(self.kernel) if self.aggregation == "max" else self._mean_attention(view)
        new = {"worst": torch.maximum(view.state("worst"), now)}
        if self.value_norm != "none":
            new["value"] = self._values(view)
        return new

    def _mean_attention(self, view: LayerView) -> torch.Tensor:
        """The mean in place of `worst_attention`: over queries and heads of the group, pooled and renormalised."""
        counted = view.valid & ~own_entries(view, self.window)
        pooled = pool_and_renormalise(view.window_attention, counted, self.kernel)
        return mean_over_queries(pooled, view.query_positions)

    def _values(self, view: LayerView) -> torch.Tensor:
        """The state `value`, completed for the entries since the last eviction, which all heads still store."""
        value, n = view.state("value"), view.shape[2]
        index = torch.arange(n, device=value.device)
        known = ((index + 1) * (view.valid & (value > 0))).amax(2)
        stored = view.valid.sum(2)
        added = (stored - known).amin(1)
        most = int(added.max())
        if most == 0:
            return value
        if most == n and bool((added == n).all()):
            return self._normalised(view, view.value_norms)
        first = (stored - added.view(-1, 1)).unsqueeze(2)
        newest = (first + torch.arange(most, device=first.device)).clamp(max=n - 1)
        values = view.values.gather(2, newest.unsqueeze(3).expand(-1, -1, -1, view.values.shape[3]))
        new = self._normalised(view, value_norms(values, view.output_weight))
        slot = index - first
        return torch.where(slot >= 0, new.gather(2, slot.clamp(0, most - 1)), value)

    def _normalised(self, view: LayerView, norms: torch.Tensor) -> torch.Tensor:
        """Normalised norms of values that belong to the same token in all heads, fp32 `(batch, num_kv_heads, n)`."""
        if self.value_norm != "heads":
            return norms
        return (norms / view.of_all_heads(norms, 0.0).sum(1, keepdim=True)).nan_to_num(0.0)

    def score(self, view: LayerView) -> torch.Tensor:
        own = own_entries(view, self.window)
        counted = view.valid & ~own
        score = self.aggregate(view, view.state("worst"), counted)
        if self.value_norm != "none":
            value = view.state("value")
            if self.value_norm == "tokens":
                total = value.masked_fill(~counted, 0.0).sum(2, keepdim=True)
                value = value / total.clamp(min=torch.finfo(torch.float32).tiny)
            score = score * value
        if self.protection == "cumulative":
            return score.masked_fill(own | self._covering(view, own, counted), torch.inf)
        highest = score.masked_fill(~counted, 0.0).amax(2, keepdim=True)
        highest = view.of_all_heads(highest, 0.0).amax(1, keepdim=True)
        return torch.where(own | self._covering(view, own, counted), highest, score)

    def _covering(self, view: LayerView, own: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """The entries outside the window that are protected, bool `(batch, num_kv_heads, n)`."""
        if self.mass == 0:
            return torch.zeros_like(counted)
        mean, most = view.mean_attention, view.budget - self.window
        if self.protection == "released":
            before = counted & own_entries(view, 2 * self.window)
            bias = view.of_all_heads(mean.masked_fill(~before, 0.0).sum(2, keepdim=True), 0.0).mean(1)
            return released_protection(mean, self.mass, counted, bias, most)
        window_mass = mean.masked_fill(~own, 0.0).sum(2)
        return mass_protection(mean, self.mass - window_mass, counted, most)

    def aggregate(self, view: LayerView, worst: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """The risk of evicting each entry, fp32 `(batch, num_kv_heads, n)`.

        Args:
            worst: the worst case, of that shape.
            counted: bool of that shape: entries outside the window.
        """
        if self.prior == "none":
            return worst
        if self.prior == "mean":
            return defensive_aggregate(worst, flat_prior(worst, counted))
        return worst.clamp(min=float(self.prior))


@dataclass(frozen=True)
class LayerDefensive(Defensive):
    """`Defensive` with one budget for all layers and heads (the paper's Layer-DefensiveKV)."""

    name: ClassVar[str] = "layer_defensive"
    default_scope: ClassVar[str] = "global"
