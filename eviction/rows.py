"""What a cache knows of its rows, and one forward of the decoder as the cache sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Step:
    """The new tokens of one forward, the same for all layers.

    Attributes:
        q_len: new columns.
        first: the cache was empty before.
        counts: real new tokens of each row.
        valid: bool `(batch, q_len)`, False for padding; None if all new tokens are real.
        positions: int32 `(batch, q_len)`: index among the row's real tokens (arbitrary for padding).
        longest: no segment of any layer is longer after this forward; 0 where no mask is needed.
        window_index: `(row, column, slot)` index tensors of the queries to remember, or None.
    """

    q_len: int
    first: bool
    counts: list[int]
    valid: torch.Tensor | None
    positions: torch.Tensor
    longest: int
    window_index: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    _mask: torch.Tensor | None = field(default=None, repr=False)
    _flat: torch.Tensor | None = field(default=None, repr=False)
    _columns: list[torch.Tensor] | None = field(default=None, repr=False)

    def causal_mask(self, count: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask `(count, length)` for the last `count` of `length` entries attending causally.

        Built once for the longest segment of the forward; every segment's mask is its lower right corner.
        """
        if self._mask is None or self._mask.dtype != dtype:
            seen = torch.ones(self.q_len, self.longest, dtype=torch.bool, device=self.positions.device)
            hidden = ~seen.tril(self.longest - self.q_len)
            self._mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        return self._mask[self.q_len - count :, self.longest - length :]

    def flat_positions(self, num_kv_heads: int) -> torch.Tensor:
        """Positions of the new entries, int32, in the order (row, head, real token)."""
        if self._flat is None or self.valid is not None or len(self._flat) != num_kv_heads * self.positions.numel():
            batch, n = self.positions.shape
            spread = self.positions.unsqueeze(1).expand(batch, num_kv_heads, n)
            flat = spread.reshape(-1) if self.valid is None else spread[self.valid.unsqueeze(1).expand_as(spread)]
            self._flat = flat
        return self._flat

    def real_columns(self, row: int) -> torch.Tensor:
        """Indices of the row's real tokens among the new columns."""
        if self._columns is None:
            assert self.valid is not None
            self._columns = [one.nonzero().squeeze(1) for one in self.valid]
        return self._columns[row]


@dataclass(frozen=True)
class Input:
    """What the user gave in one call of the model, which may run in several forwards.

    Attributes:
        tokens: real tokens each row will have seen after it.
        new: how many of them it brings.
        columns: columns the cache had seen before it.
    """

    tokens: list[int]
    new: list[int]
    columns: int


class Rows:
    """The rows of a cache: how much each has seen and stored.

    Attributes:
        tokens: real tokens each row has seen, evicted ones included; empty before the first forward.
        stored: entries of each row in all layers and heads.
        window_positions: int64 `(batch, size)`: positions of the remembered queries, -1 for none. Never written in
            place, so forks may share it.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.stored: list[int] = []
        self.window_positions: torch.Tensor | None = None
        # Columns seen, padding included, run-length coded: (how many, which of them are real; None for all).
        self._runs: list[tuple[int, torch.Tensor | None]] = []
        self.columns = 0

    def input(self, counts: list[int]) -> Input:
        """The input that brings `counts[row]` real tokens to each row."""
        before = self.tokens or [0] * len(counts)
        return Input([n + more for n, more in zip(before, counts, strict=True)], counts, self.columns)

    def copy(self) -> Rows:
        other = Rows()
        other.__dict__.update(self.__dict__)
        other._runs = list(self._runs)
        return other

    def exported(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and plain values, that `restored` makes the same rows of; without `stored`."""
        tensors = {f"mask.{index}": valid for index, (_, valid) in enumerate(self._runs) if valid is not None}
        if self.window_positions is not None:
            tensors["window_positions"] = self.window_positions
        return tensors, {"tokens": self.tokens, "runs": [count for count, _ in self._runs]}

    @classmethod
    def restored(cls, document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Rows:
        """The rows that `exported` described; `stored` is left to the caller.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or no number.
        """
        rows = cls()
        rows.tokens = [int(count) for count in document["tokens"]]
        rows._runs = [(int(count), tensors.get(f"mask.{i}")) for i, count in enumerate(document["runs"])]
        rows.columns = sum(count for count, _ in rows._runs)
        rows.window_positions = tensors.get("window_positions")
        return rows

    def open(
        self, batch: int, q_len: int, valid: torch.Tensor | None, device: torch.device, longest: int, window: int
    ) -> Step:
        """The step that brings `q_len` new columns; nothing changes before `advance`.

        Args:
            valid: bool `(batch, q_len)`, False for padding; None if all new tokens are real.
            longest: entries of the longest segment.
            window: size of the ring of remembered queries, 0 for none.
        """
        before = self.tokens or [0] * batch
        counts = [q_len] * batch if valid is None else valid.sum(1).tolist()
        start = torch.tensor(before, dtype=torch.int32, device=device).unsqueeze(1)
        if valid is None:
            offsets = torch.arange(q_len, dtype=torch.int32, device=device)
        else:
            offsets = valid.cumsum(1, dtype=torch.int32) - 1
        step = Step(q_len, not self.tokens, counts, valid, start + offsets, longest + q_len)
        if window:
            after = torch.tensor([n + more for n, more in zip(before, counts, strict=True)], device=device)
            chosen = step.positions >= (after - window).unsqueeze(1)
            rows, columns = (chosen if valid is None else chosen & valid).nonzero(as_tuple=True)
            # A query's slot is its position modulo the ring's size: the newest overwrite the oldest.
            step.window_index = (rows, columns, step.positions[rows, columns].long() % window)
        return step

    def advance(self, step: Step, segments: int, window: int) -> None:
        """Counts a completed step; `segments` entries were stored for each token."""
        batch = len(step.counts)
        if step.window_index is not None:
            rows, columns, slots = step.window_index
            self._place(rows, slots, step.positions[rows, columns].long(), (batch, window))
        self.tokens = [n + more for n, more in zip(self.tokens or [0] * batch, step.counts, strict=True)]
        self.stored = [n + more * segments for n, more in zip(self.stored or [0] * batch, step.counts, strict=True)]
        self._add_run(step.q_len, step.valid)

    def abandon(self, step: Step) -> None:
        """Notes that a step which is not counted has overwritten some of the oldest remembered queries."""
        if step.window_index is not None and self.window_positions is not None:
            rows, _, slots = step.window_index
            self._place(rows, slots, slots.new_tensor(-1), tuple(self.window_positions.shape))

    def _place(self, rows: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, shape: tuple[int, ...]) -> None:
        old = self.window_positions
        placed = slots.new_full(shape, -1) if old is None else old.clone()
        placed[rows, slots] = positions
        self.window_positions = placed

    def select(self, rows: torch.Tensor) -> None:
        """Row `i` becomes a copy of the former row `rows[i]`."""
        chosen = rows.tolist()
        self.tokens = [self.tokens[row] for row in chosen]
        self.stored = [self.stored[row] for row in chosen]
        self._runs = [(n, None if valid is None else valid[rows.to(valid.device)]) for n, valid in self._runs]
        if self.window_positions is not None:
            self.window_positions = self.window_positions[rows.to(self.window_positions.device)]

    def drop(self, count: int) -> list[int]:
        """Forgets the newest `count` columns; returns how many real tokens each row had in them.

        `stored` is left to the caller, who knows what was evicted.
        """
        gone = [0] * len(self.tokens)
        self.columns -= count
        while count:
            size, valid = self._runs.pop()
            taken = min(size, count)
            real = [taken] * len(gone) if valid is None else valid[:, size - taken :].sum(1).tolist()
            gone = [n + more for n, more in zip(gone, real, strict=True)]
            if taken < size:
                self._runs.append((size - taken, None if valid is None else valid[:, : size - taken]))
            count -= taken
        self.tokens = [n - less for n, less in zip(self.tokens, gone, strict=True)]
        if self.window_positions is not None:
            limit = torch.tensor(self.tokens, device=self.window_positions.device).unsqueeze(1)
            self.window_positions = torch.where(self.window_positions < limit, self.window_positions, -1)
        return gone

    def _add_run(self, count: int, valid: torch.Tensor | None) -> None:
        self.columns += count
        if valid is None and self._runs and self._runs[-1][1] is None:
            self._runs[-1] = (self._runs[-1][0] + count, None)
        else:
            self._runs.append((count, valid))
