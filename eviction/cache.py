"""A transformers cache whose full-attention layers are ragged and evict under one plan."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch

from .calibrated import with_budget
from .layer import RaggedLayer
from .persist import save_cache
from .policies import Policy, get_policy
from .protect import Protected
from .rollback import fork_layer
from .running import Running


class RaggedCache(Running):
    """Made by `session.new_cache()`; pass it as `past_key_values` to the block's model or its `generate`.

    Rows are independent. Layers that are not full attention have the cache layer transformers gives them.

    Attributes:
        session: the block it belongs to.
        plan: what is evicted and when.
    """

    def compress(
        self,
        policy: str | Policy | None = None,
        budget: float | int | str | None = None,
        scope: str | None = None,
        gates: Any = None,
        sinks: int | None = None,
        recent: int | None = None,
        buffer: int | None = None,
        floor: float | None = None,
        protect: Any = None,
    ) -> RaggedCache:
        """Evicts down to the budget now, and goes on under the changed plan.

        Args:
            policy: another policy; the session must have recorded what it needs (see `observe` of `evict`).
            scope, floor: None for the new policy's default, or the plan's if the policy stays.
            gates: only the session's own gates are accepted: log β is recorded as tokens are written.
            budget, sinks, recent, buffer, protect: as in `evict`; None leaves the plan's, `protect=[]` frees all.
                The budget "calibrated" is that of the session's gates.

        Returns:
            The cache itself.
        Raises:
            ValueError: a wrong option, something the policy needs was not recorded, or the tokens to protect exceed the
                budget. Nothing is changed then.
        """
        if gates is not None and gates is not self.session.gates:
            raise ValueError("log β is recorded as tokens are written: give the gates to evict(..., gates=...) instead")
        self._refuse_unobserved("compressed")
        chosen = None if policy is None else get_policy(policy)
        guard = None if protect is None else Protected.of(protect)
        plan = self.plan.changed(
            chosen, None, scope=scope, floor=floor, sinks=sinks, recent=recent, buffer=buffer, protect=guard
        )
        plan = with_budget(plan, budget, self.session.gates)
        self.session.require_recorded(plan.policy)
        self._settle(0)
        tokens = self._rows.tokens
        if self._layout is not None:
            plan.require_room(tokens, self._layout)
            if plan.evicts:
                self._evict(plan, [True] * len(tokens), tokens)
        self.plan = plan
        return self

    # Copies, rows and rollback.

    def fork(self) -> RaggedCache:
        """A cache that continues from here on its own.

        Storage is shared until one side writes to it, layer by layer.
        """
        self._settle(0)
        self._marks.due = True
        other = copy.copy(self)
        other.layers = [fork_layer(layer) for layer in self.layers]
        other.ragged = [layer for layer in other.layers if isinstance(layer, RaggedLayer)]
        other._rows, other._meter, other._marks = self._rows.copy(), copy.copy(self._meter), self._marks.copy()
        self.session.track(other)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedCache:
        return self.fork()

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row `i` becomes a copy of the former row `rows[i]`, int64; rows may repeat or be left out."""
        batch = len(self._rows.tokens)
        if batch == 0 or rows.tolist() == list(range(batch)):
            return
        self._settle(0)
        for layer in self.layers:
            layer.reorder_cache(rows)  # type: ignore[arg-type]
        self._rows.select(rows)
        self._marks.select(rows.tolist())
        self.plan = self.plan.for_rows(rows.tolist())
        self._meter.note(self.entries, self.nbytes)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(torch.arange(len(self._rows.tokens)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_rows(torch.arange(len(self._rows.tokens), device=indices.device)[indices])

    def save(self, path: str | os.PathLike) -> None:
        """Writes a file that `session.load_cache` reads; ValueError if the cache is empty or has state-space layers."""
        self._refuse_unobserved("saved")
        self._settle(0)
        save_cache(self, Path(path))

    def _refuse_unobserved(self, done: str) -> None:
        if not self.observed:
            raise ValueError(
                f"a stacked cache remembers nothing for policies and cannot be {done}: stack caches that have been"
            )
