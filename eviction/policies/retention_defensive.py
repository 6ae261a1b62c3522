"""Defensive aggregation with learned retention in place of the flat prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from ..layer_view import LayerView
from .common import Share, ranks
from .defensive import Defensive, defensive_aggregate, flat_prior
from .retention import log_retention

Combination = Literal["prior", "max", "product", "rank"]
COMBINATIONS: tuple[str, ...] = get_args(Combination)


@dataclass(frozen=True)
class RetentionDefensive(Defensive):
    """Layer-DefensiveKV with gates for entries that no window has attended to yet.

    Defensive aggregation gives an entry that was never attended to the mean m of the head's worst cases w: all such
    entries are equal. Here the retention `r_i = β_i^(T+1-i)` distinguishes them. The value term and the protected
    entries are those of `Defensive`. With means and maxima over the head's entries outside the window, the risk of
    entry i is

    * "prior": `max(w_i, m · r_i / mean(r))`: the prior keeps its mean and follows the retention;
    * "max": `max(w_i, max(w) · r_i / max(r))`: the entry retained most counts as much as the one attended to most;
    * "product": `max(w_i, m) · r_i`: the defensive risk, discounted by the retention;
    * "rank": `max(u_i, v_i)`, the shares of the head's entries whose w, and whose r, are no greater than the entry's:
      only the ranks count, and all heads are equal.

    The defaults come from the study in the documentation.

    Attributes:
        mass: as in `Defensive`, but 0 by default: the entries that the window attends to would fill a small budget and
            displace those that the gates favour.
        protection: as in `Defensive`, but "cumulative" by default: the window is always kept.
        combine: how retention and worst case are combined, one of these.
    """

    mass: Share = 0.0
    protection: Literal["released", "cumulative"] = "cumulative"
    combine: Combination = "product"

    name: ClassVar[str] = "retention_defensive"
    needs: ClassVar[frozenset[str]] = Defensive.needs | {"log_beta"}
    default_scope: ClassVar[str] = "global"

    def aggregate(self, view: LayerView, worst: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        return combine(self.combine, worst, log_retention(view), counted)


def combine(how: str, worst: torch.Tensor, log_retention: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The risk of evicting each entry by one of `COMBINATIONS`; see `RetentionDefensive`.

    Args:
        worst, log_retention: fp32 `(batch, num_kv_heads, n)`.
        counted: bool of that shape: entries outside the window.
    """
    if how == "rank":
        return defensive_aggregate(_percentile(worst, counted), _percentile(log_retention, counted))
    flat = flat_prior(worst, counted)
    if how == "product":
        return defensive_aggregate(worst, flat) * log_retention.exp()
    # Relative to the highest, so that the entries of a head whose retentions are all tiny are still ranked.
    highest = log_retention.masked_fill(~counted, -torch.inf).amax(2, keepdim=True)
    relative = (log_retention - highest.clamp(min=torch.finfo(torch.float32).min)).exp().masked_fill(~counted, 0.0)
    if how == "max":
        return defensive_aggregate(worst, worst.masked_fill(~counted, 0.0).amax(2, keepdim=True) * relative)
    mean = flat_prior(relative, counted).clamp(min=torch.finfo(torch.float32).tiny)
    return defensive_aggregate(worst, flat * (relative / mean))


def _percentile(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The share of the head's counted entries whose value is no greater, in (0, 1]."""
    ahead = ranks(values, counted)
    # Equal values have the rank of the first of them.
    order = ahead.argsort(2)
    ranked = values.gather(2, order)
    changes = torch.ones_like(ranked, dtype=torch.bool)
    changes[:, :, 1:] = ranked[:, :, 1:] != ranked[:, :, :-1]
    places = torch.arange(values.shape[2], device=values.device).expand_as(order)
    first = places.masked_fill(~changes, 0).cummax(2).values
    place = torch.empty_like(first).scatter_(2, order, first)
    total = counted.sum(2, keepdim=True).clamp(min=1)
    return (total - place).float() / total
