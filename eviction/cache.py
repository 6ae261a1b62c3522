"""The KV cache of an `evict` block: a transformers cache whose full-attention layers are ragged and evict by a plan."""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from tenure.documents import shown

from ..retention.gates import RetentionGates
from ..retention.seams import AttentionCall
from .cache_layer import RaggedLayer, without_autocast
from .cache_report import CacheCounters, Report
from .forward_state import ForwardStep, ModelInput, RollbackConfig, SequenceState
from .layer_view import LayerView
from .plan import BudgetLayout, EvictionPlan, with_budget
from .policies.policy import Policy
from .policies.registry import get_policy
from .protected_tokens import ProtectedTokens
from .recorders import Observers
from .rollback import ForwardSnapshot, RollbackPoints, crop_layers, fork_layer
from .selection import choose, layout_of
from .storage.segment_store import SegmentStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Recording:
    """Shared by the caches of one session: the model, the data they record, and calls of the session.

    Attributes:
        model: the block's model.
        gates: source of log β, if any.
        policies: the session's policies, whose needs are recorded.
        window_size: number of the last queries that every cache records.
        observers: states and statistics that every cache records.
        entry_states: names of the fp32 numbers stored with every entry in addition to key, value and position.
        layout: the heads that share a row's budget; its `entry_bytes` includes only key and position.
        new_cache: makes an empty cache.
        require: raises ValueError if a policy needs data that is not recorded.
        track: called with every new fork.
        save: writes a cache to a file; see `serialization.save_cache`.
        rollback: limits of `RaggedCache.crop`.
    """

    model: PreTrainedModel
    gates: RetentionGates | None
    policies: tuple[Policy, ...]
    window_size: int
    observers: Observers
    entry_states: tuple[str, ...]
    layout: BudgetLayout
    new_cache: Callable[[], RaggedCache]
    require: Callable[[Policy], None]
    track: Callable[[RaggedCache], None]
    save: Callable[[RaggedCache, Path], None]
    rollback: RollbackConfig = field(default_factory=RollbackConfig)


class RaggedCache(Cache):
    """Made by `session.new_cache()`; pass it as `past_key_values` to the block's model or its `generate`.

    Rows are independent. Layers without full attention have the cache layer that transformers gives them.

    Attributes:
        recording: shared by all caches of the session.
        plan: which entries are evicted and when.
        layers: one per decoder layer.
        ragged: those of them that evict, in the same order.
        rows: the tokens that each row has seen and stored.
        counters: evictions and peaks so far.
        rollback_points: columns to which `crop` can return.
        observed: policies observe its queries; False for a stacked cache (see `stacking.stack`).
        made_by_generate: it replaces the cache that `generate` created.
        drafting: transformers drafts tokens: see `activate_past_recording`.
    """

    def __init__(self, recording: Recording, plan: EvictionPlan, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.recording = recording
        self.plan = plan
        self.ragged = [layer for layer in layers if isinstance(layer, RaggedLayer)]
        self.rows = SequenceState()
        self.counters = CacheCounters()
        self.rollback_points = RollbackPoints(limit=recording.rollback.max_points)
        self.observed = True
        self.made_by_generate = self.drafting = False
        self._step: ForwardStep | None = None
        self._snapshot: ForwardSnapshot | None = None
        self._input: ModelInput | None = None
        self._layout: BudgetLayout | None = None
        self._unusable = ""  # the reason, after an input that could not be undone
        # A step whose observation and eviction are deferred, and the rows' tokens before its input.
        self._deferred: tuple[ForwardStep, list[int]] | None = None

    # Contents.

    @property
    def stores(self) -> list[SegmentStore]:
        """The storage of each layer of `ragged` that has entries."""
        return [layer.store for layer in self.ragged if layer.store is not None]

    @property
    def columns_seen(self) -> int:
        """Columns that the model has run over, padding included."""
        return self.rows.columns

    @property
    def tokens_seen(self) -> torch.Tensor:
        """int64 `(batch,)`: real tokens of each row, evicted ones included."""
        return torch.tensor(self.rows.tokens, dtype=torch.long)

    @property
    def query_positions(self) -> torch.Tensor:
        """int64 `(batch, size)`: positions of the recorded queries in any order, -1 for none."""
        recorded = self.rows.window_positions
        return torch.empty(len(self.rows.tokens), 0, dtype=torch.long) if recorded is None else recorded

    @property
    def entries(self) -> int:
        """Entries stored in all rows, layers and heads, of all processes if tensor parallelism divides the heads."""
        return sum(self.rows.stored)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for entries; storage shared with a fork is counted in full."""
        return sum(store.nbytes for store in self.stores)

    def lengths(self) -> torch.Tensor:
        """int64 `(batch, layers, heads)`: entries of every segment, layers as in `report().layer_indices`."""
        rows = [store.lengths for store in self.stores]
        if not rows:
            return torch.zeros(0, len(self.ragged), 0, dtype=torch.long)
        return torch.tensor(rows).view(len(rows), len(self.rows.tokens), -1).transpose(0, 1).contiguous()

    def positions(self, layer_idx: int) -> torch.Tensor:
        """int64 `(batch, heads, n)`: positions of a layer's entries among the row's real tokens, padded with -1.

        Raises:
            ValueError: not a layer that evicts, or an empty cache.
        """
        layer = next((one for one in self.ragged if one.layer_idx == layer_idx), None)
        if layer is None:
            known = ", ".join(str(one.layer_idx) for one in self.ragged)
            raise ValueError(f"layer {shown(layer_idx)} does not evict; those that do: {known}")
        if layer.store is None:
            raise ValueError("the cache is empty: run the model with it first")
        return LayerView(layer, self.tokens_seen.to(layer.device)).positions

    def kept(self, layer_idx: int) -> list[list[torch.Tensor]]:
        """Positions of a layer's entries, one ascending int64 tensor for each `[row][head]`."""
        return [[head[head >= 0] for head in row] for row in self.positions(layer_idx)]

    def report(self) -> Report:
        """Counts the stored and the evicted entries."""
        layer_indices = tuple(layer.layer_idx for layer in self.ragged)
        others = [layer for layer in self.layers if not isinstance(layer, RaggedLayer)]
        return self.counters.report(self.stores, sum(self.rows.tokens), self.lengths(), layer_indices, others)

    def check(self) -> None:
        """Checks the cache's invariants, under `python -O` too.

        Raises:
            AssertionError: inconsistent storage, positions out of order or range, or wrong counts.
        """
        for fault in self.faults():
            raise AssertionError(fault)

    def faults(self) -> Iterator[str]:
        """Descriptions of violated invariants; read no further than the first."""
        yield from self.rows.faults()
        if not 0 <= self.rollback_points.floor <= self.columns_seen:
            yield "the last eviction is after the last column seen"
        tokens = self.tokens_seen
        new = torch.tensor(self.rows.tokens_since(self.rollback_points.floor), dtype=torch.long)
        for layer in self.ragged:
            store = layer.store
            if store is None:
                continue
            if store.batch != len(self.rows.tokens):
                yield "a layer has another number of rows than the cache"
            yield from store.faults()
            positions = self.positions(layer.layer_idx).cpu()
            if not bool((positions < tokens.view(-1, 1, 1)).all()):
                yield "a position exceeds the tokens seen"
            # They ascend, so the tokens since the last eviction are all there if there are as many.
            if not bool(((positions >= (tokens - new).view(-1, 1, 1)).sum(2) == new.unsqueeze(1)).all()):
                yield "entries of tokens since the last eviction are missing"
        if self._stored_entries() != self.rows.stored:
            yield "stored entries are counted wrong"

    def _stored_entries(self) -> list[int]:
        """Entries of each row, counted in the storage of all processes."""
        stores = self.stores
        own = [sum(store.row_entries(row) for store in stores) for row in range(len(self.rows.tokens))]
        return self.ragged[0].attention.shards.summed(own)

    def adopt(self, rows: SequenceState, floor: int) -> None:
        """Completes a new cache whose layers were filled with the entries of `rows`.

        Args:
            rows: `stored` is counted here.
            floor: columns at the last eviction.
        """
        self.rows, self.rollback_points = rows, RollbackPoints(floor, self.recording.rollback.max_points)
        rows.stored = self._stored_entries()
        self._layout = layout_of([layer for layer in self.ragged if layer.store is not None])

    # One call of the model: begin_input, its forwards, end_input. A call of a single forward needs neither.

    def begin_input(self, counts: list[int]) -> None:
        """Opens an input of `counts[row]` real tokens, drafts excluded, that is read in several forwards.

        Until `end_input` the budget is counted from the tokens seen at the end of the input, and if it is the prompt
        every forward ends with an eviction down to it.

        Raises:
            ValueError: as `begin_step`.
        """
        self._require_ready(len(counts))
        given = self.rows.new_input(counts)
        self.plan.require_room(given.tokens, self.recording.layout)
        self._input = given

    def end_input(self, completed: bool) -> None:
        """Closes the input; one that raised is undone as a whole, or else the cache becomes unusable."""
        given, self._input = self._input, None
        if given is None or completed:
            return
        try:
            if given.columns == 0:
                return self.reset()
            self.crop(given.columns - self.columns_seen)
        except (ValueError, RuntimeError):  # transformers' sliding layers raise the latter
            self._unusable = (
                "an earlier input to this cache raised after some of its chunks had been evicted and cannot be undone; "
                "continue with a fork made before it, or with a new cache"
            )

    # A forward: begin_step, open_layer for each layer, end_step.

    def begin_step(self, batch: int, q_len: int, valid: torch.Tensor | None, device: torch.device) -> ForwardStep:
        """Opens a forward of `q_len` new columns and returns it.

        Args:
            valid: bool `(batch, q_len)`, False for padding; None if all new tokens are real.

        Raises:
            ValueError: another number of rows than before, an earlier forward left the cache unusable, or the tokens to
                protect exceed the budget of the prompt.
        """
        self._require_ready(batch)
        if self._deferred is not None:
            self.drafting = self._input is not None  # there was no crop(): the deferred tokens were not drafts
            self.apply_deferred()
        if not self.rows.tokens:
            self.plan.check_rows(batch)
        if not self.rows.tokens and self._input is None and self.plan.protect is not None:
            counts = [q_len] * batch if valid is None else valid.sum(1).tolist()
            self.plan.require_room(counts, self.recording.layout)
        masked = q_len > 1 or valid is not None
        longest = max((max(store.lengths) for store in self.stores), default=0) if masked else 0
        if self.rollback_points.due or (q_len > 1 and not self.drafting):
            self._add_rollback_point()
        self._snapshot = ForwardSnapshot(self.layers)
        limits = self.recording.rollback
        self._step = self.rows.new_step(batch, q_len, valid, device, longest, limits.ring_size(self._window_size))
        self._step.deferred = min(q_len, limits.deferred_columns) if self.drafting and q_len > 1 else 0
        return self._step

    @property
    def _window_size(self) -> int:
        return self.recording.window_size if self.observed else 0

    def _add_rollback_point(self) -> None:
        """Sets a rollback point if something is recorded that `crop` could not undo without one."""
        needed = self._window_size or (self.observed and self.recording.observers.accumulated)
        if needed and (self._input is None or self._input.columns == self.columns_seen):
            self.rollback_points.add(self.ragged, self.rows)

    def _require_ready(self, batch: int) -> None:
        if self._unusable:
            raise ValueError(self._unusable)
        if self.rows.tokens and len(self.rows.tokens) != batch:
            raise ValueError(f"the cache holds {len(self.rows.tokens)} rows, the model got {batch}")

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
            if not snapshot.restore(self.layers, self.rows.columns):
                self._unusable = (
                    "an earlier forward with this cache raised and its state-space layers cannot be restored; start "
                    "with a new cache"
                )
            self.rows.abandon(step)
            return
        if self._layout is None:
            self._layout = layout_of([layer for layer in self.ragged if layer.store is not None])
        rows = self.rows
        rows.advance(step, self._layout.segments)
        self.rollback_points.due |= step.q_len > 1 and not step.deferred
        self.counters.record_size(self.entries, self.nbytes)
        given = self._input or ModelInput(rows.tokens, step.counts, rows.columns - step.q_len)
        if step.deferred:
            self._deferred = step, [n - new for n, new in zip(given.tokens, given.new, strict=True)]
        else:
            self._evict_if_due(given)

    # Evictions.

    def _evict_if_due(self, given: ModelInput) -> None:
        assert self._layout is not None, "a forward was completed"
        due = [
            self.plan.due(stored, tokens, new, self._layout)
            for stored, tokens, new in zip(self.rows.stored, given.tokens, given.new, strict=True)
        ]
        if any(due):
            later = [tokens != new for tokens, new in zip(given.tokens, given.new, strict=True)]
            self._evict(self.plan, due, given.tokens, later)

    def apply_deferred(self, rejected: int = 0) -> None:
        """Observes the deferred columns except the last `rejected`, which were removed, and evicts if due."""
        if self._deferred is None:
            return
        (step, before), self._deferred = self._deferred, None
        accepted = step.deferred - rejected
        part = step.deferred_part.part(0, accepted) if accepted > 0 else None
        for layer in self.ragged:
            layer.observe_deferred(part)
        self.rows.record_queries(part)
        tokens = self.rows.tokens
        self._evict_if_due(self._input or ModelInput(tokens, [n - m for n, m in zip(tokens, before, strict=True)], 0))

    def _evict(self, plan: EvictionPlan, due: list[bool], horizon: list[int], later: list[bool] | None = None) -> None:
        layers = [layer for layer in self.ragged if layer.store is not None]
        with without_autocast(layers[0].device):
            keeps = choose(layers, plan, self.rows.tokens, due, self.rows.window_positions, horizon, later)
        entries, nbytes = self.entries, self.nbytes
        for store, keep in zip(self.stores, keeps, strict=True):
            old = store.nbytes
            store.compact(keep)
            # The layer's old buffers were freed only after the new ones had been filled.
            self.counters.record_size(entries, nbytes + store.nbytes)
            nbytes += store.nbytes - old
        for layer in layers:
            layer.inputs = layer.inputs and layer.inputs.evicted(due, plan.policy)
        self.rows.stored = self._stored_entries()
        self.rollback_points.evicted(self.columns_seen)
        self.counters.record_eviction(entries - self.entries)

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
        token_floors: Any = None,
    ) -> RaggedCache:
        """Evicts down to the budget now, and continues under the changed plan.

        Args:
            policy: another policy; the session must have recorded what it needs (see `observe` of `evict`).
            scope, floor: None for the new policy's default, or the plan's if the policy is unchanged.
            gates: only the session's own gates are accepted: log β is recorded as tokens are written.
            budget, sinks, recent, buffer, protect, token_floors: as in `evict`; None leaves the plan's; `[]` protects
                no tokens, or sets no floors.
                The budget "calibrated" is that of the session's gates.

        Returns:
            The cache itself.
        Raises:
            ValueError: an invalid option, something the policy needs was not recorded, or the tokens to protect exceed
                the budget. The cache is unchanged then.
        """
        if gates is not None and gates is not self.recording.gates:
            raise ValueError("log β is recorded as tokens are written: give the gates to evict(..., gates=...) instead")
        self._require_observed("compressed")
        chosen = None if policy is None else get_policy(policy)
        guard = None if protect is None else ProtectedTokens.of(protect)
        plan = self.plan.changed(
            chosen,
            None,
            scope=scope,
            floor=floor,
            sinks=sinks,
            recent=recent,
            buffer=buffer,
            protect=guard,
            token_floors=None if token_floors is None else tuple(token_floors),
        )
        plan = with_budget(plan, budget, self.recording.gates)
        self.recording.require(plan.policy)
        self.apply_deferred()
        tokens = self.rows.tokens
        plan.check_rows(len(tokens) or 1)
        if self._layout is not None:
            plan.require_room(tokens, self._layout)
            if plan.evicts:
                self._evict(plan, [True] * len(tokens), tokens)
        self.plan = plan
        return self

    # Rollback.

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest columns: the cache is as if they had never been read.

        Args:
            tokens_to_remove: negative: the number of columns to remove; positive (older transformers): the number of
                columns to keep.

        Raises:
            ValueError: entries were evicted since, there are fewer columns, or a policy has accumulated a sum over them
                that cannot be undone. The cache is unchanged then.
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)
        except TypeError:
            raise ValueError(f"got {shown(tokens_to_remove)} columns to remove; accepted: a whole number") from None
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns_seen - tokens_to_remove)
        if 0 < count == self.columns_seen and self.rollback_points.floor == 0:
            return self.reset()
        deferred = self._deferred[0].deferred if self._deferred is not None else 0
        self.rows = crop_layers(self.layers, self.rows, count, self.rollback_points, self._window_size, deferred)
        if count:
            self.rows.stored = self._stored_entries()
            self.rollback_points.cropped(self.columns_seen)
            self.rollback_points.due |= not self.drafting
        self.apply_deferred(count)

    def activate_past_recording(self) -> None:
        """Called by transformers when it drafts tokens.

        Observations and evictions are then deferred until `crop` has removed the rejected tokens, or to the next
        forward.
        """
        super().activate_past_recording()
        self.apply_deferred()
        self.drafting = self.rollback_points.due = True

    def reset(self) -> None:
        super().reset()
        self.rows, self._layout, self._unusable = SequenceState(), None, ""
        self.rollback_points, self._deferred = RollbackPoints(limit=self.recording.rollback.max_points), None

    # Copies and rows.

    def fork(self) -> RaggedCache:
        """A cache that continues from here independently.

        Storage is shared until one side writes to it, layer by layer.
        """
        self.apply_deferred()
        self.rollback_points.due = True
        other = copy.copy(self)
        other.layers = [fork_layer(layer) for layer in self.layers]
        other.ragged = [layer for layer in other.layers if isinstance(layer, RaggedLayer)]
        other.rows, other.counters = self.rows.copy(), copy.copy(self.counters)
        other.rollback_points = self.rollback_points.copy()
        self.recording.track(other)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedCache:
        return self.fork()

    def clear_memo(self) -> None:
        """Discards the results that forks share (see `SegmentStore.memoised`); for measurements."""
        for store in self.stores:
            store.clear_memo()

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row `i` becomes a copy of the former row `rows[i]`, int64; rows may repeat or be left out."""
        batch = len(self.rows.tokens)
        if batch == 0 or rows.tolist() == list(range(batch)):
            return
        self.apply_deferred()
        for layer in self.layers:
            layer.reorder_cache(rows)  # type: ignore[arg-type]
        self.rows.select(rows)
        self.rollback_points.select(rows.tolist())
        self.plan = self.plan.for_rows(rows.tolist())
        self.counters.record_size(self.entries, self.nbytes)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(torch.arange(len(self.rows.tokens)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_rows(torch.arange(len(self.rows.tokens), device=indices.device)[indices])

    def save(self, path: str | os.PathLike) -> None:
        """Writes a file that `session.load_cache` reads.

        Raises:
            ValueError: the cache is empty or has state-space layers, or no file can have this path.
        """
        if not isinstance(path, str | os.PathLike) or Path(path).is_dir() or not Path(path).parent.is_dir():
            given = shown(str(path) if isinstance(path, os.PathLike) else path)
            raise ValueError(f"got {given} as path; accepted: that of a file, in a folder that exists")
        self._require_observed("saved")
        self.apply_deferred()
        self.recording.save(self, Path(path))

    def _require_observed(self, done: str) -> None:
        if not self.observed:
            raise ValueError(
                f"a stacked cache records nothing for policies and cannot be {done}: stack caches that have been"
            )
