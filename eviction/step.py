"""One forward of the decoder as the cache sees it, and the call of the model that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
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
        ring: slots for remembered queries, 0 if none are.
        waits: what is observed of the newest columns waits until `crop` has told how many of them stay.
        rope_positions: int64 `(batch, q_len)`, the positions that RoPE has given the new tokens; None if nobody asks.
        angles: cosines and sines of these, each fp32 `(batch, q_len, rotary_dim)`.
    """

    q_len: int
    first: bool
    counts: list[int]
    valid: torch.Tensor | None
    positions: torch.Tensor
    longest: int
    ring: int = 0
    waits: int = 0
    rope_positions: torch.Tensor | None = field(default=None, repr=False)
    angles: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)
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

    @cached_property
    def ranks(self) -> torch.Tensor:
        """int32 `(batch, q_len)`: a token's place among the real new ones of its row; -1 for padding."""
        if self.valid is None:
            ranks = torch.arange(self.q_len, dtype=torch.int32, device=self.positions.device)
            return ranks.expand(self.positions.shape).contiguous()
        return torch.where(self.valid, self.valid.cumsum(1, dtype=torch.int32) - 1, -1)

    @cached_property
    def hidden(self) -> torch.Tensor:
        """int32 `(batch, q_len)`: how many real new tokens come behind each; -1 for padding."""
        behind = self.ranks.amax(1, keepdim=True) - self.ranks
        return torch.where(self.ranks < 0, -1, behind)

    def added(self, num_kv_heads: int) -> torch.Tensor:
        """int32 `(batch * num_kv_heads,)`: new entries of each segment."""
        return (self.ranks.amax(1) + 1).repeat_interleave(num_kv_heads)

    @cached_property
    def slots(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """`(row, column, slot)` index tensors of the queries to remember; None if none are."""
        if not self.ring:
            return None
        if self.valid is None:
            end = self.positions[:, -1:] + 1
            chosen = self.positions >= end - self.ring
        else:
            end = self.positions.masked_fill(~self.valid, -1).amax(1, keepdim=True) + 1
            chosen = (self.positions >= end - self.ring) & self.valid
        rows, columns = chosen.nonzero(as_tuple=True)
        # A query's slot is its position modulo the ring's size: the newest overwrite the oldest.
        return rows, columns, self.positions[rows, columns].long() % self.ring

    @property
    def watched(self) -> Step | None:
        """The columns that are observed in this forward, as a step of their own; None if all of them wait."""
        # A step that kept itself would live, and its mask with it, until Python's collector comes.
        return self._watched if self.waits else self

    @cached_property
    def _watched(self) -> Step | None:
        count = self.q_len - self.waits
        return self.part(0, count) if count else None

    @cached_property
    def waiting(self) -> Step:
        """The columns that wait, as a step of their own."""
        return self.part(self.q_len - self.waits, self.q_len)

    def part(self, start: int, stop: int) -> Step:
        """Columns `start` to `stop` as what is observed of them in one go; not for attention, which is over."""
        if (start, stop) == (0, self.q_len):
            return replace(self, waits=0) if self.waits else self
        columns = slice(start, stop)
        valid = None if self.valid is None else self.valid[:, columns]
        return replace(
            self,
            q_len=stop - start,
            counts=[stop - start] * len(self.counts) if valid is None else valid.sum(1).tolist(),
            valid=valid,
            positions=self.positions[:, columns],
            waits=0,
            rope_positions=None if self.rope_positions is None else self.rope_positions[:, columns],
            angles=None if self.angles is None else (self.angles[0][:, columns], self.angles[1][:, columns]),
            _mask=None,
            _flat=None,
            _columns=None,
        )


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


def new_tokens(mask: Any, batch: int, q_len: int, seen: int) -> torch.Tensor | None:
    """Which of the new tokens are real: bool `(batch, q_len)`, or None if all are."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"evict() needs a 2-D attention_mask (batch, tokens), got {shape}")
    if mask.shape != (batch, seen + q_len):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}, expected {(batch, seen + q_len)}: one column for each of the "
            f"{seen} tokens the cache has seen and the {q_len} new ones"
        )
    valid = mask[:, seen:].bool()
    return None if bool(valid.all()) else valid
