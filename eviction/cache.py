"""The reading side of a cache: what it holds, where, and whether it is sound.

A cache while the model runs: inputs and forwards are opened and closed, and evictions happen at their ends.

A transformers cache whose full-attention layers are ragged and evict under one plan.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from ..retention.seams import AttentionCall
from .cache_layer import RaggedLayer
from .forward_state import Input, Rows, Step, ring_size
from .layer_view import LayerView
from .plan import Layout, Plan, Protected, with_budget
from .policies.base import Policy
from .policies.registry import get_policy
from .report import Meter, Report
from .rollback import Marks, Snapshot, fork_layer, take_back
from .selection import choose, layout_of
from .serialization import save_cache
from .storage.segments import SegmentStore

if TYPE_CHECKING:
    from .session import Session



class Contents(Cache):
    """Rows and layers of a cache, with everything that can be asked of them; nothing here changes any of it.

    Attributes:
        layers: one a decoder layer.
        ragged: those of them that evict, in the same order.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.ragged = [layer for layer in layers if isinstance(layer, RaggedLayer)]
        self._rows = Rows()
        self._meter = Meter()
        self._marks = Marks()

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
        """Proves the cache's integrity, under `python -O` too.

        Raises:
            AssertionError: storage that does not add up, positions out of order or range, or wrong counts.
        """
        for fault in self.faults():
            raise AssertionError(fault)

    def faults(self) -> Iterator[str]:
        """What is wrong with the cache; read no further than the first."""
        yield from self._rows.faults()
        if not 0 <= self._marks.floor <= self.columns_seen:
            yield "the last eviction was at a column that was not seen"
        tokens = self.tokens_seen
        new = torch.tensor(self._rows.since(self._marks.floor), dtype=torch.long)
        for layer in self.ragged:
            store = layer.store
            if store is None:
                continue
            if store.batch != len(self._rows.tokens):
                yield "there is not one row a sequence"
            yield from store.faults()
            positions = self.positions(layer.layer_idx).cpu()
            if not bool((positions < tokens.view(-1, 1, 1)).all()):
                yield "positions are not of tokens seen"
            # They ascend, so the tokens since the last eviction are all there if there are as many.
            if not bool(((positions >= (tokens - new).view(-1, 1, 1)).sum(2) == new.unsqueeze(1)).all()):
                yield "entries of tokens since the last eviction are missing"
        if self._count() != self._rows.stored:
            yield "stored entries are not counted right"

    def _count(self) -> list[int]:
        """Entries of each row, counted in the storage."""
        stores = self.stores
        return [sum(store.row_entries(row) for store in stores) for row in range(len(self._rows.tokens))]


WAITING = 256  # columns of a long forward that `crop` can take back one by one while transformers drafts tokens


class Running(Contents):
    """The forwards of a cache, how they are taken back, and the evictions in between.

    Attributes:
        session: the block it belongs to.
        plan: what is evicted and when.
        observed: its queries are shown to the session's policies; not those of a stack (see `stacking.stack`).
        of_generate: made in place of the cache that `generate` brought.
        drafting: transformers drafts tokens: see `activate_past_recording`.
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
        self.observed = True
        self.of_generate = self.drafting = False
        self._held: tuple[Step, list[int]] | None = None  # a step that waits, and the rows' tokens before its input

    # One call of the model: begin_input, its forwards, end_input. A call that is one forward needs neither.

    def begin_input(self, counts: list[int]) -> None:
        """Opens an input of `counts[row]` real tokens, without drafts, that comes in several forwards.

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
        if self._held is not None:
            self.drafting = self._input is not None  # no crop() came: these were no drafts
            self._settle(0)
        if not self._rows.tokens and self._input is None and self.plan.protect is not None:
            counts = [q_len] * batch if valid is None else valid.sum(1).tolist()
            self.plan.require_room(counts, self.session.layout)
        masked = q_len > 1 or valid is not None
        longest = max((max(store.lengths) for store in self.stores), default=0) if masked else 0
        if self._marks.due or (q_len > 1 and not self.drafting):
            self._mark()
        self._snapshot = Snapshot(self.layers)
        self._step = self._rows.open(batch, q_len, valid, device, longest, ring_size(self._window_size))
        self._step.waits = min(q_len, WAITING) if self.drafting and q_len > 1 else 0
        return self._step

    @property
    def _window_size(self) -> int:
        return self.session.window_size if self.observed else 0

    def _mark(self) -> None:
        """Notes where `crop` may come back to, if there is something that it could not undo without."""
        wanted = self._window_size or (self.observed and self.session.observers.accumulated)
        if wanted and (self._input is None or self._input.columns == self.columns_seen):
            self._marks.set(self.ragged, self._rows)

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
        rows.advance(step, self._layout.segments)
        self._marks.due |= step.q_len > 1 and not step.waits
        self._meter.note(self.entries, self.nbytes)
        given = self._input or Input(rows.tokens, step.counts, rows.columns - step.q_len)
        if step.waits:
            self._held = step, [n - new for n, new in zip(given.tokens, given.new, strict=True)]
        else:
            self._evict_if_due(given)

    def _evict_if_due(self, given: Input) -> None:
        assert self._layout is not None, "a forward was completed"
        due = [
            self.plan.due(stored, tokens, new, self._layout)
            for stored, tokens, new in zip(self._rows.stored, given.tokens, given.new, strict=True)
        ]
        if any(due):
            self._evict(self.plan, due, given.tokens)

    def _settle(self, rejected: int) -> None:
        """Does what waited: observes the step's columns but the last `rejected`, which are gone, and evicts if due."""
        if self._held is None:
            return
        (step, before), self._held = self._held, None
        stays = step.waits - rejected
        watched = step.waiting.part(0, stays) if stays > 0 else None
        for layer in self.ragged:
            layer.watch_waiting(watched)
        self._rows.remember(watched)
        tokens = self._rows.tokens
        self._evict_if_due(self._input or Input(tokens, [n - m for n, m in zip(tokens, before, strict=True)], 0))

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
        for layer in layers:
            layer.inputs = layer.inputs and layer.inputs.evicted(due, plan.policy)
        self._rows.stored = self._count()
        self._marks.evicted(self.columns_seen)
        self._meter.evicted(entries - self.entries)

    # Taking back.

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest columns back: the cache is as if they had never come.

        Args:
            tokens_to_remove: negative: that many columns go; positive (older transformers): that many stay.

        Raises:
            ValueError: something was evicted meanwhile, there are not so many, or a policy has accumulated something
                over them that cannot be told apart (see docs/eviction.md). Nothing is changed then.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns_seen - tokens_to_remove)
        if 0 < count == self.columns_seen and self._marks.floor == 0:
            return self.reset()
        waiting = self._held[0].waits if self._held is not None else 0
        self._rows = take_back(self.layers, self._rows, count, self._marks, self._window_size, waiting)
        if count:
            self._rows.stored = self._count()
            self._marks.taken_back(self.columns_seen)
            self._marks.due |= not self.drafting
        self._settle(count)

    def activate_past_recording(self) -> None:
        """Called by transformers when it drafts tokens: until `crop` has said which stay, they count for nothing.

        What policies observe and evictions wait for it then, or for the next forward.
        """
        super().activate_past_recording()
        self._settle(0)
        self.drafting = self._marks.due = True

    def reset(self) -> None:
        super().reset()
        self._rows, self._layout, self._broken = Rows(), None, ""
        self._marks, self._held = Marks(), None


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
