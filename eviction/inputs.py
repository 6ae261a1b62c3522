"""What went into the attention layers as long as nothing was evicted: for policies that score a prompt from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .rotary import Rotary
from .step import Step

if TYPE_CHECKING:
    from .layer import RaggedLayer
    from .policies.base import Policy


@dataclass(frozen=True)
class Part:
    """One forward's new columns.

    Attributes:
        hidden_states: `(batch, q_len, hidden_size)`, what the layer's attention was given.
        positions: int64 `(batch, q_len)`, the positions that RoPE gave them; the same tensor for all layers.
        valid: bool `(batch, q_len)`, False for padding; None if all are real tokens.
    """

    hidden_states: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None

    def first(self, count: int) -> Part:
        """The first `count` columns."""
        valid = None if self.valid is None else self.valid[:, :count]
        return Part(self.hidden_states[:, :count], self.positions[:, :count], valid)

    def select(self, rows: torch.Tensor) -> Part:
        own = rows.to(self.positions.device)
        valid = None if self.valid is None else self.valid[own]
        return Part(self.hidden_states[own], self.positions[own], valid)


@dataclass(frozen=True)
class Inputs:
    """The inputs of one layer's attention from its first token on; nothing is written in place, so forks may share it.

    They are held from a cache's first forward until every row has had its first eviction: hidden_size numbers for each
    layer and token. Afterwards only `evicted_by` is left.

    Attributes:
        rotary: the model's RoPE.
        evicted_by: for each row the policy of its first eviction; None while all its entries are there.
        parts: what each forward brought; empty once no row needs it.
    """

    rotary: Rotary
    evicted_by: tuple[Policy | None, ...]
    parts: tuple[Part, ...] = ()

    @property
    def complete(self) -> bool:
        """Some row still has all its entries."""
        return None in self.evicted_by

    def row(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a row that has all its entries: those of its real tokens, in the order of its entries.

        Returns:
            hidden states `(1, n, hidden_size)`, and positions int64 `(1, n)`.
        """
        assert self.evicted_by[row] is None, "the row has all its entries"
        hidden = torch.cat([part.hidden_states[row] for part in self.parts])
        positions = torch.cat([part.positions[row] for part in self.parts])
        if any(part.valid is not None for part in self.parts):
            real = [torch.ones_like(p.positions[row]).bool() if p.valid is None else p.valid[row] for p in self.parts]
            hidden, positions = hidden[torch.cat(real)], positions[torch.cat(real)]
        return hidden.unsqueeze(0), positions.unsqueeze(0)

    def added(self, part: Part) -> Inputs:
        """With one more forward."""
        return replace(self, parts=(*self.parts, part)) if self.complete else self

    def first(self, columns: int) -> Inputs:
        """Without what came after the first `columns` columns."""
        parts, left = [], columns
        for part in self.parts:
            if left <= 0:
                break
            parts.append(part if part.positions.shape[1] <= left else part.first(left))
            left -= part.positions.shape[1]
        return replace(self, parts=tuple(parts))

    def select(self, rows: torch.Tensor) -> Inputs:
        """Row `i` becomes a copy of the former row `rows[i]`."""
        evicted_by = tuple(self.evicted_by[row] for row in rows.tolist())
        chosen = replace(self, evicted_by=evicted_by, parts=tuple(part.select(rows) for part in self.parts))
        return chosen if chosen.complete else replace(chosen, parts=())

    def evicted(self, due: Sequence[bool], policy: Policy) -> Inputs:
        """After an eviction of the rows that were `due` under `policy`."""
        rows = zip(self.evicted_by, due, strict=True)
        left = replace(self, evicted_by=tuple(policy if now and before is None else before for before, now in rows))
        return left if left.complete else replace(left, parts=())


class InputRecorder:
    """Follows the forwards of a session's model; costs nothing if no policy needs hidden states.

    Attributes:
        rotary: the model's RoPE; None if nothing is recorded.
    """

    def __init__(self, rotary: Rotary | None = None) -> None:
        self.rotary = rotary
        self._positions: torch.Tensor | None = None
        self._step: Step | None = None

    def begin(self, step: Step, position_ids: torch.Tensor | None, columns: int) -> None:
        """Opens a forward.

        Args:
            position_ids: `(batch or 1, q_len)` as given to the model; None for the model's default, which counts
                columns.
            columns: columns seen before this forward.

        Raises:
            ValueError: position ids of another form.
        """
        if self.rotary is None:
            return
        batch, q_len = step.positions.shape
        if position_ids is None:
            position_ids = torch.arange(columns, columns + q_len).unsqueeze(0)
        elif position_ids.ndim != 2 or position_ids.shape[1] != q_len:
            raise ValueError(f"hidden states are recorded with position_ids (batch, {q_len}), got "
                             f"{tuple(position_ids.shape)}")  # fmt: skip
        self._step, self._positions = step, position_ids.to(step.positions.device).long().expand(batch, q_len)

    def record(self, layer: RaggedLayer, hidden_states: torch.Tensor) -> None:
        """Notes what the attention of `layer` is about to be given, `(batch, q_len, hidden_size)`."""
        step, positions = self._step, self._positions
        if self.rotary is None or step is None or positions is None:
            return
        if step.first:
            layer.inputs = Inputs(self.rotary, (None,) * len(step.counts))
        if layer.inputs is not None:
            layer.inputs = layer.inputs.added(Part(hidden_states.detach(), positions, step.valid))
