"""A transformers cache whose full-attention layers are ragged and evict under one plan."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from ..retention.seams import AttentionCall
from .budget import Plan
from .compress import choose
from .layer import RaggedLayer
from .policies import Policy, get_policy
from .report import Meter, Report
from .rollback import Snapshot, fork_layer, take_back
from .rows import Rows, Step
from .store import SegmentStore
from .view import LayerView

if TYPE_CHECKING:
    from .session import Session


class RaggedCache(Cache):
    """Made by `session.new_cache()`; pass it as `past_key_values` to the block's model or its `generate`.

    Rows are independent. Layers that are not full attention have the cache layer transformers gives them.

    Attributes:
        session: the block it belongs to.
        plan: what is evicted and when.
        layers: one a decoder layer.
        ragged: those of them that evict, in the same order.
    """

    def __init__(self, session: Session, plan: Plan, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.session = session
        self.plan = plan
        self.ragged = [layer for layer in layers if isinstance(layer, RaggedLayer)]
        self._rows = Rows()
        self._meter = Meter()
        self._step: Step | None = None
        self._snapshot: Snapshot | None = None
        self._broken = ""

    # What it holds.

    @property
    def stores(self) -> list[SegmentStore]:
        """The storage of each layer of `ragged` that has entries."""
        return [layer.store for layer in self.ragged if layer.store is not None]

    @property
    def columns_seen(self) -> int:
        """Columns the model has run over, padding included."""
        return self._rows.columns

    @property
    def tokens_seen(self) -> torch.Tensor:
        """int64 `(batch,)`: real tokens of each row, evicted ones included."""
        return torch.tensor(self._rows.tokens, dtype=torch.long)

    @property
    def query_positions(self) -> torch.Tensor:
        """int64 `(batch, size)`: positions of the remembered queries in any order, -1 for none."""
        recorded = self._rows.window_positions
        return torch.empty(len(self._rows.tokens), 0, dtype=torch.long) if recorded is None else recorded

    @property
    def entries(self) -> int:
        """Entries stored in all rows, layers and heads."""
        return sum(self._rows.stored)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for entries; storage shared with a fork is counted in full."""
        return sum(store.nbytes for store in self.stores)

    def lengths(self) -> torch.Tensor:
        """int64 `(batch, layers, heads)`: entries of every segment, layers as in `report().layer_indices`."""
        rows = [store.lengths for store in self.stores]
        if not rows:
            return torch.zeros(0, len(self.ragged), 0, dtype=torch.long)
        return torch.tensor(rows).view(len(rows), len(self._rows.tokens), -1).transpose(0, 1).contiguous()

    def positions(self, layer_idx: int) -> torch.Tensor:
        """int64 `(batch, heads, n)`: positions of a layer's entries among the row's real tokens, padded with -1."""
        layer = self.layers[layer_idx] if 0 <= layer_idx < len(self.layers) else None
        if not isinstance(layer, RaggedLayer):
            known = ", ".join(str(one.layer_idx) for one in self.ragged)
            raise ValueError(f"layer {layer_idx} does not evict; those that do: {known}")
        if layer.store is None:
            raise ValueError("the cache is empty: run the model with it first")
        return LayerView(layer, self.tokens_seen.to(layer.device)).positions

    def kept(self, layer_idx: int) -> list[list[torch.Tensor]]:
        """Positions of a layer's entries, one ascending int64 tensor for each `[row][head]`."""
        return [[head[head >= 0] for head in row] for row in self.positions(layer_idx)]

    def report(self) -> Report:
        """Counts what is stored and what was evicted."""
        layer_indices = tuple(layer.layer_idx for layer in self.ragged)
        return self._meter.report(self.stores, sum(self._rows.tokens), self.lengths(), layer_indices)

    def check(self) -> None:
        """Proves the cache's integrity.

        Raises:
            AssertionError: storage that does not add up, positions out of order or range, or wrong counts.
        """
        tokens = self.tokens_seen.view(-1, 1, 1)
        for layer in self.ragged:
            if layer.store is not None:
                assert layer.store.batch == len(self._rows.tokens), "one row a sequence"
                layer.store.check()
                assert bool((self.positions(layer.layer_idx).cpu() < tokens).all()), "positions are of tokens seen"
        assert self._count() == self._rows.stored, "stored entries are counted right"

    def _count(self) -> list[int]:
        stores = self.stores
        return [sum(store.row_entries(row) for store in stores) for row in range(len(self._rows.tokens))]

    # A forward: begin_step, open_layer for each layer, end_step.

    def begin_step(self, batch: int, q_len: int, valid: torch.Tensor | None, device: torch.device) -> Step:
        """Opens a forward of `q_len` new columns and returns it.

        Args:
            valid: bool `(batch, q_len)`, False for padding; None if all new tokens are real.

        Raises:
            ValueError: another number of rows than before, or an earlier forward left the cache unusable.
        """
        if self._broken:
            raise ValueError(self._broken)
        if self._rows.tokens and len(self._rows.tokens) != batch:
            raise ValueError(f"the cache holds {len(self._rows.tokens)} rows, the model got {batch}")
        masked = q_len > 1 or valid is not None
        longest = max((max(store.lengths) for store in self.stores), default=0) if masked else 0
        self._snapshot = Snapshot(self.layers)
        self._step = self._rows.open(batch, q_len, valid, device, longest, self.session.window_size)
        return self._step

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
            layer.close()
        if not completed:
            if not snapshot.restore(self.layers, self._rows.columns):
                self._broken = (
                    "an earlier forward with this cache raised and its state-space layers cannot be taken back; start "
                    "with a new cache"
                )
            self._rows.abandon(step)
            return
        segments = sum(store.num_kv_heads for store in self.stores)
        rows = self._rows
        rows.advance(step, segments, self.session.window_size)
        self._meter.note(self.entries, self.nbytes)
        due = [
            self.plan.due(stored, tokens, new, segments)
            for stored, tokens, new in zip(rows.stored, rows.tokens, step.counts, strict=True)
        ]
        if any(due):
            self._evict(due)

    def _evict(self, due: list[bool]) -> None:
        layers = [layer for layer in self.ragged if layer.store is not None]
        keeps = choose(layers, self.plan, self._rows.tokens, due, self._rows.window_positions)
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
        budget: float | int | None = None,
        scope: str | None = None,
        gates: Any = None,
        sinks: int | None = None,
        recent: int | None = None,
        buffer: int | None = None,
    ) -> RaggedCache:
        """Evicts down to the budget now, and goes on under the changed plan.

        Args:
            policy: another policy; the session must have recorded what it needs (see `observe` of `evict`).
            scope: None for the new policy's default, or the plan's if the policy stays.
            gates: only the session's own gates are accepted: log β is recorded as tokens are written.
            budget, sinks, recent, buffer: as in `evict`; None leaves the plan's.

        Returns:
            The cache itself.
        Raises:
            ValueError: a wrong option, or something the policy needs was not recorded.
        """
        if gates is not None and gates is not self.session.gates:
            raise ValueError("log β is recorded as tokens are written: give the gates to evict(..., gates=...) instead")
        chosen = None if policy is None else get_policy(policy)
        plan = self.plan.changed(chosen, budget, scope, sinks=sinks, recent=recent, buffer=buffer)
        self.session.require_recorded(plan.policy)
        self.plan = plan
        if self.plan.evicts and self.stores:
            self._evict([True] * len(self._rows.tokens))
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

    def reset(self) -> None:
        super().reset()
        self._rows, self._broken = Rows(), ""
