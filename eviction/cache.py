"""A transformers cache whose full-attention layers are ragged and evict under one plan."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..retention.seams import AttentionCall
from .allocate import Layout
from .budget import Plan
from .compress import choose, layout_of
from .contents import Contents
from .layer import RaggedLayer
from .persist import save_cache
from .policies import Policy, get_policy
from .protect import Protected
from .rollback import Snapshot, fork_layer, take_back
from .rows import Input, Rows, Step

if TYPE_CHECKING:
    from .session import Session


class RaggedCache(Contents):
    """Made by `session.new_cache()`; pass it as `past_key_values` to the block's model or its `generate`.

    Rows are independent. Layers that are not full attention have the cache layer transformers gives them.

    Attributes:
        session: the block it belongs to.
        plan: what is evicted and when.
    """

    def __init__(self, session: Session, plan: Plan, layers: list[Any]) -> None:
        super().__init__(layers)
        self.session = session
        self.plan = plan
        self._step: Step | None = None
        self._snapshot: Snapshot | None = None
        self._input: Input | None = None
        self._layout: Layout | None = None
        self._broken = ""

    # One call of the model: begin_input, its forwards, end_input. A call that is one forward needs neither.

    def begin_input(self, counts: list[int]) -> None:
        """Opens an input of `counts[row]` real tokens that comes in several forwards.

        From now on the budget is counted from the tokens seen at the end of the input, and if it is the prompt every
        forward ends with an eviction down to it.

        Raises:
            ValueError: as `begin_step`.
        """
        self._refuse_unless_ready(len(counts))
        given = self._rows.input(counts)
        self.plan.require_room(given.tokens, self.session.layout)
        self._input = given

    def end_input(self, completed: bool) -> None:
        """Closes the input; one that raised is taken back as a whole, or the cache refuses to go on."""
        given, self._input = self._input, None
        if given is None or completed:
            return
        try:
            if given.columns == 0:
                return self.reset()
            self.crop(given.columns - self.columns_seen)
        except (ValueError, RuntimeError):  # transformers' sliding layers raise the latter
            self._broken = (
                "an earlier input to this cache raised after some of its chunks had been evicted and cannot be taken "
                "back; go on with a fork made before it, or with a new cache"
            )

    # A forward: begin_step, open_layer for each layer, end_step.

    def begin_step(self, batch: int, q_len: int, valid: torch.Tensor | None, device: torch.device) -> Step:
        """Opens a forward of `q_len` new columns and returns it.

        Args:
            valid: bool `(batch, q_len)`, False for padding; None if all new tokens are real.

        Raises:
            ValueError: another number of rows than before, an earlier forward left the cache unusable, or the tokens to
                protect exceed the budget of the prompt.
        """
        self._refuse_unless_ready(batch)
        if not self._rows.tokens and self._input is None and self.plan.protect is not None:
            counts = [q_len] * batch if valid is None else valid.sum(1).tolist()
            self.plan.require_room(counts, self.session.layout)
        masked = q_len > 1 or valid is not None
        longest = max((max(store.lengths) for store in self.stores), default=0) if masked else 0
        self._snapshot = Snapshot(self.layers)
        self._step = self._rows.open(batch, q_len, valid, device, longest, self.session.window_size)
        return self._step

    def _refuse_unless_ready(self, batch: int) -> None:
        if self._broken:
            raise ValueError(self._broken)
        if self._rows.tokens and len(self._rows.tokens) != batch:
            raise ValueError(f"the cache holds {len(self._rows.tokens)} rows, the model got {batch}")

    def open_layer(self, layer_idx: int, state: dict[str, torch.Tensor]) -> AttentionCall:
        """The call that computes a layer's attention in the running forward; see `RaggedLayer.open`."""
        assert self._step is not None, "begin_step came first"
        return self.layers[layer_idx].open(self._step, state)  # type: ignore[union-attr]

    def end_step(self, completed: bool) -> None:
        """Closes the forward: evicts where due, or undoes a forward that raised."""
        step, snapshot = self._step, self._snapshot
        assert step is not None and snapshot is not None, "begin_step came first"
        self._step = self._snapshot = None
        for layer in self.ragged:
            layer.close(completed)
        if not completed:
            if not snapshot.restore(self.layers, self._rows.columns):
                self._broken = (
                    "an earlier forward with this cache raised and its state-space layers cannot be taken back; start "
                    "with a new cache"
                )
            self._rows.abandon(step)
            return
        if self._layout is None:
            self._layout = layout_of([layer for layer in self.ragged if layer.store is not None])
        rows = self._rows
        rows.advance(step, self._layout.segments, self.session.window_size)
        self._meter.note(self.entries, self.nbytes)
        given = self._input or Input(rows.tokens, step.counts, rows.columns - step.q_len)
        due = [
            self.plan.due(stored, tokens, new, self._layout)
            for stored, tokens, new in zip(rows.stored, given.tokens, given.new, strict=True)
        ]
        if any(due):
            self._evict(self.plan, due, given.tokens)

    def _evict(self, plan: Plan, due: list[bool], horizon: list[int]) -> None:
        layers = [layer for layer in self.ragged if layer.store is not None]
        keeps = choose(layers, plan, self._rows.tokens, due, self._rows.window_positions, horizon)
        entries, held = self.entries, self.nbytes
        for store, keep in zip(self.stores, keeps, strict=True):
            old = store.nbytes
            store.compact(keep)
            # The layer's old buffers went only after the new ones were filled.
            self._meter.note(entries, held + store.nbytes)
            held += store.nbytes - old
        self._rows.stored = self._count()
        self._meter.evicted(entries - self.entries)

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

        Returns:
            The cache itself.
        Raises:
            ValueError: a wrong option, something the policy needs was not recorded, or the tokens to protect exceed the
                budget. Nothing is changed then.
        """
        if gates is not None and gates is not self.session.gates:
            raise ValueError("log β is recorded as tokens are written: give the gates to evict(..., gates=...) instead")
        chosen = None if policy is None else get_policy(policy)
        guard = None if protect is None else Protected.of(protect)
        plan = self.plan.changed(
            chosen, budget, scope=scope, floor=floor, sinks=sinks, recent=recent, buffer=buffer, protect=guard
        )
        self.session.require_recorded(plan.policy)
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
        other = copy.copy(self)
        other.layers = [fork_layer(layer) for layer in self.layers]
        other.ragged = [layer for layer in other.layers if isinstance(layer, RaggedLayer)]
        other._rows, other._meter = self._rows.copy(), copy.copy(self._meter)
        self.session.track(other)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedCache:
        return self.fork()

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row `i` becomes a copy of the former row `rows[i]`, int64; rows may repeat or be left out."""
        batch = len(self._rows.tokens)
        if batch == 0 or rows.tolist() == list(range(batch)):
            return
        for layer in self.layers:
            layer.reorder_cache(rows)  # type: ignore[arg-type]
        self._rows.select(rows)
        self.plan = self.plan.for_rows(rows.tolist())
        self._meter.note(self.entries, self.nbytes)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(torch.arange(len(self._rows.tokens)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_rows(torch.arange(len(self._rows.tokens), device=indices.device)[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest columns back.

        Args:
            tokens_to_remove: negative: that many columns go; positive (older transformers): that many stay.

        Raises:
            ValueError: entries of these tokens were evicted meanwhile, or there are not so many.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns_seen - tokens_to_remove)
        self._rows = take_back(self.layers, self._rows, count)
        self._rows.stored = self._count()

    def save(self, path: str | os.PathLike) -> None:
        """Writes a file that `session.load_cache` reads; ValueError if the cache is empty or has state-space layers."""
        save_cache(self, Path(path))

    def reset(self) -> None:
        super().reset()
        self._rows, self._layout, self._broken = Rows(), None, ""
