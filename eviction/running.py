"""A cache while the model runs: inputs and forwards are opened and closed, and evictions happen at their ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..retention.seams import AttentionCall
from .allocate import Layout
from .budget import Plan
from .compress import choose, layout_of
from .contents import Contents
from .marks import Marks
from .rollback import Snapshot, take_back
from .rows import Rows, ring_size
from .step import Input, Step

if TYPE_CHECKING:
    from .session import Session

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
