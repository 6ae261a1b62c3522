"""The interface of an eviction policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from ..layer_view import LayerView

NEEDS = ("keys", "values", "log_beta", "queries", "output_weight", "query_statistics", "hidden_states")


class Policy(ABC):
    """Scores a layer's entries; a subclass is a frozen dataclass of its options, which are plain numbers and strings.

    A policy keeps nothing between calls and writes to nothing it is shown: what it wants remembered of an entry it
    names in `states` and gives back from `observe` or `conclude`. Rows must be scored independently: a row's scores may
    depend only on that row's entries.

    Attributes:
        name: the name in the registry.
        needs: what the runtime must record or show, out of `NEEDS`.
        states: what is kept of every entry between calls, fp32 by name; 0 when the entry is written.
        default_scope: the scope used when the user names none.
        default_floor: the share of the per-head budget that every head is guaranteed in the scopes "layer" and "global"
            when the user names none (`Plan.floor`).
        evicts: False for a policy that keeps everything.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    states: ClassVar[tuple[str, ...]] = ()
    default_scope: ClassVar[str] = "head"
    default_floor: ClassVar[float] = 0.0
    evicts: ClassVar[bool] = True

    @property
    def window_size(self) -> int:
        """How many of the last queries it reads; 0 unless it needs `queries`."""
        return 0

    @abstractmethod
    def score(self, view: LayerView) -> torch.Tensor:
        """Scores the entries of one layer.

        Returns:
            fp32 `(batch, num_kv_heads, n)`, higher = keep, no NaN where `view.valid`; arbitrary elsewhere. +inf stays
            before everything but the sinks and recent tokens of the plan. -inf means "never keep": such an entry goes
            at the next eviction of its row even if the budget has room, unless the plan protects it.
        """

    def observe(self, view: LayerView, queries: torch.Tensor, query_positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Called in every forward, once the layer's new entries are stored, if the policy overrides it.

        Queries of drafted tokens come when it is known which of them stay, and then perhaps in two pieces.

        It costs time at every decoded token; what an eviction can find out by itself belongs into `conclude`.

        Args:
            view: the layer with its new entries; `view.state(name)` is what was kept so far. The log β of a single
                new token may still be missing.
            queries: `(batch, num_heads, q_len, head_dim)`, post-RoPE, of this forward.
            query_positions: int64 `(batch, q_len)`: their positions among the row's real tokens, -1 for padding.

        Returns:
            The new values of those states that change, fp32 `(batch, num_kv_heads, n)`; arbitrary where not
            `view.valid`.
        """
        return {}

    @property
    def observes(self) -> bool:
        """Whether it wants to see every forward."""
        return type(self).observe is not Policy.observe

    def conclude(self, view: LayerView) -> dict[str, torch.Tensor]:
        """Called before `score` at each eviction: what the policy wants kept of the entries for the evictions to come.

        Returns:
            The new values of those states that change, as `observe`; `view.state` then gives them to `score`.
        """
        return {}

    def state_key(self, state: str) -> str:
        """Under which name the storage keeps one of `states`: policies that differ in an option do not share it."""
        return f"{self!r}.{state}"
