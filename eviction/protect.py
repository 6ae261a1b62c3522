"""Tokens that the user wants kept whatever the policy says: a system prompt, a tool's description."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Ranges = tuple[tuple[int, int], ...]
_ACCEPTED = "give token ranges [(start, stop), …] or a bool mask (tokens,) or (batch, tokens)"


@dataclass(frozen=True)
class Protected:
    """Ranges of positions among each row's real tokens; padding has no position.

    Positions beyond what a row has seen protect nothing yet: ranges may be given before the prompt is known, and cover
    generated tokens once they reach them.

    Attributes:
        rows: sorted, disjoint `(start, stop)` ranges for each row; a single element is meant for all rows.
        shared: the single element is for all rows.
    """

    rows: tuple[Ranges, ...]
    shared: bool = True

    @classmethod
    def of(cls, given: Any) -> Protected:
        """From token ranges `[(start, stop), …]`, the same for all rows, or a bool mask `(tokens,)`, `(batch, tokens)`.

        Raises:
            ValueError: something else, a negative start, or a stop before its start.
        """
        if isinstance(given, Protected):
            return given
        if isinstance(given, torch.Tensor):
            if given.dtype != torch.bool or given.ndim not in (1, 2):
                raise ValueError(f"protect is a {given.dtype} tensor of shape {tuple(given.shape)}; {_ACCEPTED}")
            rows = given.reshape(-1, given.shape[-1])
            return cls(tuple(_runs(row) for row in rows), shared=given.ndim == 1)
        return cls((_merged(given),))

    def for_rows(self, rows: Sequence[int]) -> Protected:
        """For a batch whose row `i` was row `rows[i]`."""
        return self if self.shared else Protected(tuple(self.rows[row] for row in rows), shared=False)

    def check_rows(self, batch: int) -> None:
        """Raises ValueError if a mask was given for another number of rows."""
        if not self.shared and len(self.rows) != batch:
            raise ValueError(
                f"protect is a mask for {len(self.rows)} rows, the cache has {batch}; beams and return sequences are "
                "rows of their own"
            )

    def _ranges(self, row: int) -> Ranges:
        return self.rows[0 if self.shared else row]

    def count(self, row: int, tokens: int) -> int:
        """How many of the row's `tokens` tokens are protected."""
        return sum(max(0, min(stop, tokens) - start) for start, stop in self._ranges(row))

    def table(self, tokens: Sequence[int], device: torch.device) -> torch.Tensor:
        """bool `(batch, max(tokens))`: which tokens of each row are protected."""
        table = torch.zeros(len(tokens), max(tokens, default=0), dtype=torch.bool, device=device)
        for row in range(len(tokens)):
            for start, stop in self._ranges(row):
                table[row, start:stop] = True
        return table

    def limits(self, row: int, tokens: int, share: int, sinks: int, recent: int) -> tuple[int, int]:
        """(sinks, recent) that fit beside the protected tokens of a row.

        Args:
            tokens: tokens the row has seen.
            share: how many entries each of its heads may keep.
            sinks, recent: how many first and last tokens are wanted. Sinks come first, recent ones take what is left.

        Raises:
            ValueError: the protected tokens alone are more than `share`.
        """
        left = share - self.count(row, tokens)
        if left < 0:
            raise ValueError(
                f"{share - left} of the {tokens} tokens of row {row} are protected, the budget leaves each head "
                f"{share}: raise the budget or protect fewer tokens"
            )
        inside = {place for start, stop in self._ranges(row) for place in range(start, min(stop, sinks))}
        first = _reach(range(min(sinks, tokens)), inside, left)
        left -= sum(place not in inside for place in range(first))
        newest = range(max(first, tokens - recent), tokens)
        inside = {p for a, b in self._ranges(row) for p in range(max(a, newest.start), min(b, newest.stop))}
        return first, _reach(reversed(newest), inside, left)


def _reach(places: Iterable[int], inside: set[int], left: int) -> int:
    """How many of `places`, in order, fit in `left` where those `inside` are counted already."""
    reached = 0
    for place in places:
        left -= place not in inside
        if left < 0:
            break
        reached += 1
    return reached


def _merged(given: Any) -> Ranges:
    try:
        pairs = sorted((int(start), int(stop)) for start, stop in given)
    except (TypeError, ValueError):
        raise ValueError(f"protect is {given!r}; {_ACCEPTED}") from None
    for start, stop in pairs:
        if start < 0 or stop < start:
            raise ValueError(f"protect has the range {(start, stop)}: 0 <= start <= stop is needed")
    merged: list[tuple[int, int]] = []
    for start, stop in pairs:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)


def _runs(mask: torch.Tensor) -> Ranges:
    """The runs of True in a bool `(tokens,)`."""
    edge = mask.new_zeros(1)
    change = torch.cat([edge, mask, edge]).diff().nonzero().squeeze(1).tolist()
    return tuple(zip(change[::2], change[1::2], strict=True))
