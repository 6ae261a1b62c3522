"""What a cache knows of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from .step import Input, Step

SPARE = 32  # queries that are remembered beyond the window, so that as many tokens can be taken back


def ring_size(window: int) -> int:
    """Slots of the ring that holds the last `window` queries of a row; 0 for none."""
    return window + SPARE if window else 0


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

    @classmethod
    def stacked(cls, several: Sequence[Rows], columns: int) -> Rows:
        """The rows of all, one after the other, padded on the left to `columns` columns; no queries are remembered."""
        rows = cls()
        rows.tokens = [count for one in several for count in one.tokens]
        rows.stored = [count for one in several for count in one.stored]
        masks = torch.cat([pad(one.mask(), (columns - one.columns, 0)) for one in several])
        rows._add_run(columns, None if bool(masks.all()) else masks)
        return rows

    def mask(self) -> torch.Tensor:
        """bool `(batch, columns)`: which columns are real tokens."""
        batch = len(self.tokens)
        runs = [torch.ones(batch, n, dtype=torch.bool) if valid is None else valid.cpu() for n, valid in self._runs]
        return torch.cat([torch.zeros(batch, 0, dtype=torch.bool), *runs], dim=1)

    def open(
        self, batch: int, q_len: int, valid: torch.Tensor | None, device: torch.device, longest: int, ring: int
    ) -> Step:
        """The step that brings `q_len` new columns; nothing changes before `advance`.

        Args:
            valid: bool `(batch, q_len)`, False for padding; None if all new tokens are real.
            longest: entries of the longest segment.
            ring: size of the ring of remembered queries, 0 for none.
        """
        before = self.tokens or [0] * batch
        counts = [q_len] * batch if valid is None else valid.sum(1).tolist()
        start = torch.tensor(before, dtype=torch.int32, device=device).unsqueeze(1)
        if valid is None:
            offsets = torch.arange(q_len, dtype=torch.int32, device=device)
        else:
            offsets = valid.cumsum(1, dtype=torch.int32) - 1
        return Step(q_len, not self.tokens, counts, valid, start + offsets, longest + q_len, ring)

    def advance(self, step: Step, segments: int) -> None:
        """Counts a completed step; `segments` entries were stored for each token."""
        batch = len(step.counts)
        self.remember(step.watched)
        self.tokens = [n + more for n, more in zip(self.tokens or [0] * batch, step.counts, strict=True)]
        self.stored = [n + more * segments for n, more in zip(self.stored or [0] * batch, step.counts, strict=True)]
        self._add_run(step.q_len, step.valid)

    def remember(self, step: Step | None) -> None:
        """Notes whose queries the layers have written to their rings."""
        if step is not None and step.slots is not None:
            rows, columns, slots = step.slots
            self._place(rows, slots, step.positions[rows, columns].long(), (len(step.counts), step.ring))

    def abandon(self, step: Step) -> None:
        """Notes that a step of one token, which is not counted, has overwritten the oldest remembered query."""
        if step.q_len == 1 and step.slots is not None and self.window_positions is not None:
            rows, _, slots = step.slots
            self._place(rows, slots, slots.new_tensor(-1), tuple(self.window_positions.shape))

    def _place(self, rows: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, shape: tuple[int, ...]) -> None:
        old = self.window_positions
        placed = slots.new_full(shape, -1) if old is None else old.clone()
        placed[rows, slots] = positions
        self.window_positions = placed

    def remembers(self, window: int) -> bool:
        """Whether the last `window` queries of every row, or all if it has fewer, are remembered."""
        if not window or not self.tokens:
            return True
        if self.window_positions is None:
            return False
        ends = torch.tensor(self.tokens, device=self.window_positions.device)
        newest = (self.window_positions >= (ends - window).clamp(min=0).unsqueeze(1)).sum(1)
        return bool((newest == ends.clamp(max=window)).all())

    def faults(self) -> Iterator[str]:
        """What is wrong with the counts; read no further than the first."""
        if any(count < 0 for count in self.tokens) or self.columns < 0 or any(count < 0 for count, _ in self._runs):
            yield "tokens are counted below zero"
        batch = (len(self.tokens),)
        for count, valid in self._runs:
            if valid is not None and (valid.dtype != torch.bool or valid.shape != (*batch, count)):
                yield "masks of padding do not have one bool a row and column"
        if self.columns != sum(count for count, _ in self._runs) or self.since(0) != self.tokens:
            yield "tokens are not counted as padding says"

    def since(self, columns: int) -> list[int]:
        """How many real tokens each row has in the columns from `columns` on."""
        return self.copy().drop(self.columns - columns)

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
