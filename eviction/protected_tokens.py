"""Tokens that the user protects from eviction: ranges of positions, or masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from tenure.checked import verify
from tenure.documents import plain_line, shown

MAX_TOKENS = 2**62
TokenRanges = tuple[tuple[int, int], ...]
PROTECT_FORMS = "give token ranges [(start, stop), …] or a bool mask (tokens,) or (batch, tokens)"


@dataclass(frozen=True)
class ProtectedTokens:
    """Tokens that are never evicted (a system prompt, a tool's description): ranges of positions in each row.

    Padding has no position. Ranges may exceed the tokens that a row has seen: they apply to later tokens, including
    generated ones.

    Attributes:
        rows: sorted, disjoint `(start, stop)` ranges for each row; a single element if `shared`.
        shared: the single element is for all rows.
    """

    rows: tuple[TokenRanges, ...]
    shared: bool = True

    def __post_init__(self) -> None:
        verify(self)
        if not self.rows or (self.shared and len(self.rows) > 1):
            raise ValueError(f"protect has ranges for {len(self.rows)} rows; {PROTECT_FORMS}")
        for ranges in self.rows:
            ends = [0, *(end for pair in ranges for end in pair)]
            if any(later < earlier for earlier, later in pairwise(ends)) or ends[-1] > MAX_TOKENS:
                raise ValueError(
                    f"protect has the ranges {plain_line(ranges, 60)}: sorted and disjoint ones are needed, with "
                    "0 <= start <= stop"
                )

    @classmethod
    def of(cls, given: Any) -> ProtectedTokens:
        """From token ranges `[(start, stop), …]`, the same for all rows, or a bool mask `(tokens,)`, `(batch, tokens)`.

        Raises:
            ValueError: something else, a negative start, or a stop before its start.
        """
        if isinstance(given, ProtectedTokens):
            return given
        if isinstance(given, torch.Tensor):
            if given.dtype != torch.bool or given.ndim not in (1, 2):
                raise ValueError(f"protect is a {given.dtype} tensor of shape {tuple(given.shape)}; {PROTECT_FORMS}")
            rows = given.reshape(-1, given.shape[-1])
            return cls(tuple(_runs(row) for row in rows), shared=given.ndim == 1)
        return cls((_merged(given),))

    def for_rows(self, rows: Sequence[int]) -> ProtectedTokens:
        """A copy for a batch whose row `i` was row `rows[i]`."""
        return self if self.shared else ProtectedTokens(tuple(self.rows[row] for row in rows), shared=False)

    def check_rows(self, batch: int) -> None:
        """Raises ValueError if a mask was given for another number of rows."""
        if not self.shared and len(self.rows) != batch:
            raise ValueError(
                f"protect is a mask for {len(self.rows)} rows, the cache has {batch}; beams and return sequences are "
                "rows of their own"
            )

    def _ranges(self, row: int) -> TokenRanges:
        return self.rows[0 if self.shared else row]

    def count(self, row: int, tokens: int) -> int:
        """Number of protected tokens among the row's `tokens` tokens."""
        return sum(max(0, min(stop, tokens) - start) for start, stop in self._ranges(row))

    def table(self, tokens: Sequence[int], device: torch.device) -> torch.Tensor:
        """bool `(batch, max(tokens))`: True for the protected tokens of each row."""
        table = torch.zeros(len(tokens), max(tokens, default=0), dtype=torch.bool, device=device)
        for row in range(len(tokens)):
            for start, stop in self._ranges(row):
                table[row, start:stop] = True
        return table

    def limits(
        self, row: int, tokens: int, share: int, sinks: int, recent: int, floors: int = 0
    ) -> tuple[int, int]:  # fmt: skip
        """(sinks, recent) that fit into a row's share together with its protected tokens.

        Args:
            tokens: tokens the row has seen.
            share: entries that each of its heads may keep.
            sinks, recent: requested numbers of first and last tokens. Sinks take precedence over recent tokens.
            floors: entries of the share that floors of other tokens claim before sinks and recent tokens.

        Raises:
            ValueError: the protected tokens alone are more than `share`.
        """
        left = share - self.count(row, tokens)
        if left < 0:
            raise ValueError(
                f"{share - left} of the {tokens} tokens of row {row} are protected, the budget leaves each head "
                f"{share}: raise the budget or protect fewer tokens"
            )
        left = max(0, left - floors)
        inside = {position for start, stop in self._ranges(row) for position in range(start, min(stop, sinks))}
        first = _fitting(range(min(sinks, tokens)), inside, left)
        left -= sum(position not in inside for position in range(first))
        newest = range(max(first, tokens - recent), tokens)
        inside = {p for a, b in self._ranges(row) for p in range(max(a, newest.start), min(b, newest.stop))}
        return first, _fitting(reversed(newest), inside, left)


def _fitting(positions: Iterable[int], inside: set[int], left: int) -> int:
    """Number of `positions`, in order, that fit into `left` entries; those `inside` are counted already."""
    count = 0
    for position in positions:
        left -= position not in inside
        if left < 0:
            break
        count += 1
    return count


def _shown_range(start: int, stop: int) -> str:
    """`(3, 1)`, for messages."""
    return f"({shown(start)}, {shown(stop)})"


def _merged(given: Any) -> TokenRanges:
    try:
        pairs = sorted((int(start), int(stop)) for start, stop in given)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"protect is {plain_line(repr(given), 60)}; {PROTECT_FORMS}") from None
    for start, stop in pairs:
        if start < 0 or stop < start or stop > MAX_TOKENS:
            raise ValueError(f"protect has the range {_shown_range(start, stop)}: 0 <= start <= stop is needed")
    merged: list[tuple[int, int]] = []
    for start, stop in pairs:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)


def _runs(mask: torch.Tensor) -> TokenRanges:
    """The runs of True in a bool `(tokens,)`."""
    edge = mask.new_zeros(1)
    change = torch.cat([edge, mask, edge]).diff().nonzero().squeeze(1).tolist()
    return tuple(zip(change[::2], change[1::2], strict=True))
