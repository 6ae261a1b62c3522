"""The interface of an eviction policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from tenure.checked import Range, verify

from ..cache_layer import RaggedLayer
from ..layer_view import LayerView

NEEDS = ("keys", "values", "log_beta", "queries", "output_weight", "query_statistics", "hidden_states")


@dataclass(frozen=True)
class Protection:
    """First and last tokens that are kept regardless of their score.

    Attributes:
        sinks, recent: their numbers.
        share: they take at most this share of a head's entries; recent tokens are given up first.
        later_share: that share while a text continues: in evictions after a later input than the first one, and while
            an answer is decoded. None for `share`.

    Raises:
        ValueError: a number out of range.
    """

    sinks: Annotated[int, Range(0, 2**62)] = 4
    recent: Annotated[int, Range(0, 2**62)] = 32
    share: Annotated[float, Range(0, 1)] = 1.0
    later_share: Annotated[float, Range(0, 1)] | None = None

    def __post_init__(self) -> None:
        verify(self, "protection")

    def room(self, entries: int, later: bool) -> int:
        """Protected tokens for which a head of so many entries has room."""
        share = self.later_share if later and self.later_share is not None else self.share
        return int(share * entries + 1e-6)  # 0.29 * 100 is 28.999… in floats


class Policy(ABC):
    """Scores a layer's entries; a subclass is a frozen dataclass of its options, which are plain numbers and strings.

    The options are checked against their annotations (`tenure.checked`) when an instance is made. A subclass with
    further rules has a `__post_init__` that begins with `super().__post_init__()`.

    A policy holds no state between calls and writes to no tensor of a view: per-entry state is named in `states` and
    returned from `observe` or `conclude`. Rows must be scored independently: a row's scores may depend only on that
    row's entries.

    Attributes:
        name: the name in the registry.
        needs: data that the runtime must record or provide, out of `NEEDS`.
        states: names of fp32 numbers stored with every entry between calls; 0 for a new entry.
        default_scope: the scope if the user gives none.
        default_floor: the share of the per-head budget that every head is guaranteed in the scopes "layer" and "global"
            if the user gives none (`EvictionPlan.floor`).
        default_protection: the sinks and recent tokens that are protected if the user gives no numbers.
        evicts: False for a policy that keeps everything.
        scores_heads_alone: False if a head's scores depend on other heads in ways that `LayerView.of_all_heads` does
            not cover; such a policy is refused where tensor parallelism divides the heads.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    states: ClassVar[tuple[str, ...]] = ()
    default_scope: ClassVar[str] = "head"
    default_floor: ClassVar[float] = 0.0
    default_protection: ClassVar[Protection] = Protection()
    evicts: ClassVar[bool] = True
    scores_heads_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        verify(self, self.name)

    @property
    def window_size(self) -> int:
        """Number of the last queries that it reads; 0 unless it needs `queries`."""
        return 0

    @property
    def discards(self) -> bool:
        """Whether it may score entries -inf, so that they are evicted without any budget."""
        return False

    @abstractmethod
    def score(self, view: LayerView) -> torch.Tensor:
        """Scores the entries of one layer.

        Returns:
            fp32 `(batch, num_kv_heads, n)`, higher = keep, no NaN where `view.valid`; arbitrary elsewhere. Entries with
            +inf rank above all but those that the plan protects. -inf means "never keep": such an entry is evicted at
            the next eviction of its row even if the budget is not used up, unless the plan protects it.
        """

    def observe(self, view: LayerView, queries: torch.Tensor, query_positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Called in every forward, once the layer's new entries are stored, if the policy overrides it.

        Queries of drafted tokens are observed once it is known which of them were accepted, perhaps in two calls.

        This costs time at every decoded token; whatever can be computed at an eviction belongs into `conclude`.

        Args:
            view: the layer with its new entries; `view.state(name)` is the state so far. The log β of a single new
                token may not be available yet.
            queries: `(batch, num_heads, q_len, head_dim)`, post-RoPE, of this forward.
            query_positions: int64 `(batch, q_len)`: their positions among the row's real tokens, -1 for padding.

        Returns:
            The new values of those states that change, fp32 `(batch, num_kv_heads, n)`; arbitrary where not
            `view.valid`.
        """
        return {}

    @property
    def observes(self) -> bool:
        """Whether it overrides `observe`."""
        return type(self).observe is not Policy.observe

    def conclude(self, view: LayerView) -> dict[str, torch.Tensor]:
        """Called before `score` at each eviction: updates the states for this eviction and later ones.

        Returns:
            The new values of those states that change, as in `observe`; `score` reads them by `view.state`.
        """
        return {}

    def layer_preference(self, view: LayerView) -> torch.Tensor:
        """The weight of the layer in the scope "preference", fp32 `(batch,)`, not negative, if the policy has that."""
        raise NotImplementedError(f"policy {self.name!r} has no layer preferences")

    @property
    def prefers_layers(self) -> bool:
        """Whether it overrides `layer_preference`."""
        return type(self).layer_preference is not Policy.layer_preference

    def state_key(self, state: str) -> str:
        """The name under which a layer stores one of `states`; policies that differ in an option do not share it."""
        return f"{self!r}.{state}"

    def state_keys(self) -> dict[str, str]:
        """`state_key` of each of `states`."""
        return {state: self.state_key(state) for state in self.states}

    def view(
        self, layer: RaggedLayer, time: torch.Tensor, recorded: torch.Tensor | None = None,
        budget: torch.Tensor | None = None, horizon: torch.Tensor | None = None,
    ) -> LayerView:  # fmt: skip
        """The view of `layer` that `observe`, `conclude` and `score` take; see `LayerView`."""
        return LayerView(layer, time, recorded, self.state_keys(), self.window_size, budget, horizon)
