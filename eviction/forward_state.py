"""State of a forward (`ForwardStep`), of a call of the model (`ModelInput`) and of a cache's rows (`SequenceState`).

A *column* is an index along the token dimension of the model's input, padding included; a *position* counts a row's
real tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import pad

from ..retention.attention_arguments import is_causal


@dataclass(frozen=True)
class RollbackConfig:
    """Limits on how far back `RaggedCache.crop` can go; larger values cost memory.

    Attributes:
        spare_queries: queries per row recorded in addition to the policies' window, so that up to this many tokens can
            be removed and the window still be complete.
        deferred_columns: columns of a multi-token forward whose observation is deferred while transformers drafts
            tokens, so that `crop` can remove them one by one.
        max_points: rollback points per cache: the oldest since the last eviction, and the newest ones.
    """

    spare_queries: int = 32
    deferred_columns: int = 256
    max_points: int = 4

    def ring_size(self, window: int) -> int:
        """Slots of the ring buffer that records the last `window` queries of a row; 0 for none."""
        return window + self.spare_queries if window else 0


@dataclass
class ForwardStep:
    """The new tokens of one forward of the decoder, the same for all layers.

    Attributes:
        q_len: new columns.
        first: the cache was empty before this forward.
        counts: real new tokens of each row.
        valid: bool `(batch, q_len)`, False for padding; None if all new tokens are real.
        positions: int32 `(batch, q_len)`: index among the row's real tokens (arbitrary for padding).
        longest: upper bound of every layer's segment lengths after this forward; 0 where no mask is needed.
        ring: slots for recorded queries, 0 if none are recorded.
        deferred: number of the newest columns whose observation is deferred until `crop` or the next forward.
        rope_positions: int64 `(batch, q_len)`, the positions at which RoPE is applied to the new tokens; None unless an
            observer reads them.
        angles: cosines and sines of these, each fp32 `(batch, q_len, rotary_dim)`.
    """

    q_len: int
    first: bool
    counts: list[int]
    valid: torch.Tensor | None
    positions: torch.Tensor
    longest: int
    ring: int = 0
    deferred: int = 0
    rope_positions: torch.Tensor | None = field(default=None, repr=False)
    angles: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)
    _mask: torch.Tensor | None = field(default=None, repr=False)
    _flat: torch.Tensor | None = field(default=None, repr=False)
    _columns: list[torch.Tensor] | None = field(default=None, repr=False)
    _model_mask: Any = field(default=None, repr=False)
    _copies: dict[torch.device, ForwardStep] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> ForwardStep:
        """This step for layers on `device`, where its tensors are copied to once; the step itself if it is there."""
        if device == self.positions.device:
            return self
        if device not in self._copies:
            self._copies[device] = self._changed(
                valid=None if self.valid is None else self.valid.to(device),
                positions=self.positions.to(device),
                rope_positions=None if self.rope_positions is None else self.rope_positions.to(device),
                angles=None if self.angles is None else (self.angles[0].to(device), self.angles[1].to(device)),
            )
        return self._copies[device]

    def _changed(self, **fields: Any) -> ForwardStep:
        """A step with these fields, which derives everything else anew."""
        return replace(self, **fields, _mask=None, _flat=None, _columns=None, _model_mask=None, _copies={})

    def require_causal(self, mask: Any) -> None:
        """Raises ValueError if the model's attention mask is not causal, as attention over entries is."""
        if mask is not self._model_mask and not is_causal(mask, self.q_len):
            raise ValueError(
                "got a mask by which new tokens see later ones (an image or a prefix that attends in both directions) "
                "in an input after the cache's first, or after its first chunk; accepted there: causal masks"
            )
        self._model_mask = mask  # the layers of a forward share it

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
        """Positions of the new entries, contiguous int32, in the order (row, head, real token)."""
        if self._flat is None or self.valid is not None or self._flat.numel() != num_kv_heads * self.positions.numel():
            batch, n = self.positions.shape
            spread = self.positions.unsqueeze(1).expand(batch, num_kv_heads, n)
            flat = spread.reshape(-1) if self.valid is None else spread[self.valid.unsqueeze(1).expand_as(spread)]
            self._flat = flat.contiguous()
        return self._flat

    def real_columns(self, row: int) -> torch.Tensor:
        """Indices of the row's real tokens among the new columns."""
        if self._columns is None:
            assert self.valid is not None
            self._columns = [one.nonzero().squeeze(1) for one in self.valid]
        return self._columns[row]

    @cached_property
    def ranks(self) -> torch.Tensor:
        """int32 `(batch, q_len)`: a token's index among the real new ones of its row; -1 for padding."""
        if self.valid is None:
            ranks = torch.arange(self.q_len, dtype=torch.int32, device=self.positions.device)
            return ranks.expand(self.positions.shape).contiguous()
        return torch.where(self.valid, self.valid.cumsum(1, dtype=torch.int32) - 1, -1)

    @cached_property
    def newer_tokens(self) -> torch.Tensor:
        """int32 `(batch, q_len)`: the number of real new tokens after each one; -1 for padding."""
        behind = self.ranks.amax(1, keepdim=True) - self.ranks
        return torch.where(self.ranks < 0, -1, behind)

    def added(self, num_kv_heads: int) -> torch.Tensor:
        """int32 `(batch * num_kv_heads,)`: new entries of each segment."""
        return (self.ranks.amax(1) + 1).repeat_interleave(num_kv_heads)

    @cached_property
    def slots(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """`(row, column, slot)` index tensors of the queries to record; None if none are."""
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
    def observed_part(self) -> ForwardStep | None:
        """The columns that are observed during this forward, as a step of their own; None if all are deferred."""
        # Not cached for a step without deferred columns: a step that references itself would live, and its mask with
        # it, until Python's garbage collector runs.
        return self._observed_part if self.deferred else self

    @cached_property
    def _observed_part(self) -> ForwardStep | None:
        count = self.q_len - self.deferred
        return self.part(0, count) if count else None

    @cached_property
    def deferred_part(self) -> ForwardStep:
        """The columns whose observation is deferred, as a step of their own."""
        return self.part(self.q_len - self.deferred, self.q_len)

    def part(self, start: int, stop: int) -> ForwardStep:
        """Columns `start` to `stop` as a step for observers; it has no attention mask."""
        if (start, stop) == (0, self.q_len):
            return replace(self, deferred=0) if self.deferred else self
        columns = slice(start, stop)
        valid = None if self.valid is None else self.valid[:, columns]
        return self._changed(
            q_len=stop - start,
            counts=[stop - start] * len(self.counts) if valid is None else valid.sum(1).tolist(),
            valid=valid,
            positions=self.positions[:, columns],
            deferred=0,
            rope_positions=None if self.rope_positions is None else self.rope_positions[:, columns],
            angles=None if self.angles is None else (self.angles[0][:, columns], self.angles[1][:, columns]),
        )


@dataclass(frozen=True)
class ModelInput:
    """The input of one call of the model, which may run in several forwards.

    Attributes:
        tokens: real tokens each row will have seen after it.
        new: real tokens of each row in it.
        columns: columns the cache had seen before it.
    """

    tokens: list[int]
    new: list[int]
    columns: int


def new_tokens(mask: Any, batch: int, q_len: int, seen: int) -> torch.Tensor | None:
    """Validity of the new tokens by the model's attention mask `(batch, seen + q_len)`.

    Returns:
        bool `(batch, q_len)`, False for padding; None if all are real.
    Raises:
        ValueError: not a 2-D tensor, or of another shape.
    """
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


class SequenceState:
    """The tokens that each row of a cache has seen and stored.

    Attributes:
        tokens: real tokens each row has seen, evicted ones included; empty before the first forward.
        stored: entries of each row in all layers and heads, also those of other processes in tensor parallel.
        window_positions: int64 `(batch, size)`: positions of the recorded queries, -1 for none. Never written in
            place, so forks may share it.
        columns: columns seen, padding included.
        rope_deltas: int64 `(batch, 1)`, added to a token's position to get that of M-RoPE; None for other models.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.stored: list[int] = []
        self.window_positions: torch.Tensor | None = None
        self.rope_deltas: torch.Tensor | None = None
        # Columns seen, padding included, run-length coded: (number, validity; None if all are real).
        self._runs: list[tuple[int, torch.Tensor | None]] = []
        self.columns = 0

    def new_input(self, counts: list[int]) -> ModelInput:
        """The input that adds `counts[row]` real tokens to each row."""
        before = self.tokens or [0] * len(counts)
        return ModelInput([n + more for n, more in zip(before, counts, strict=True)], counts, self.columns)

    def copy(self) -> SequenceState:
        other = SequenceState()
        other.__dict__.update(self.__dict__)
        other._runs = list(self._runs)
        return other

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and plain values, from which `restore` makes an equal state, except for `stored`."""
        tensors = {f"mask.{index}": valid for index, (_, valid) in enumerate(self._runs) if valid is not None}
        if self.window_positions is not None:
            tensors["window_positions"] = self.window_positions
        if self.rope_deltas is not None:
            tensors["rope_deltas"] = self.rope_deltas
        return tensors, {"tokens": self.tokens, "runs": [count for count, _ in self._runs]}

    @classmethod
    def restore(cls, document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> SequenceState:
        """The state that `export` described; `stored` is left to the caller.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or not a number.
        """
        rows = cls()
        rows.tokens = [_whole(count) for count in document["tokens"]]
        rows._runs = [(_whole(count), tensors.get(f"mask.{i}")) for i, count in enumerate(document["runs"])]
        rows.columns = sum(count for count, _ in rows._runs)
        rows.window_positions = tensors.get("window_positions")
        rows.rope_deltas = tensors.get("rope_deltas")
        return rows

    @classmethod
    def stacked(cls, several: Sequence[SequenceState], columns: int) -> SequenceState:
        """The rows of all states in order, padded on the left to `columns` columns; without recorded queries."""
        rows = cls()
        rows.tokens = [count for one in several for count in one.tokens]
        rows.stored = [count for one in several for count in one.stored]
        masks = torch.cat([pad(one.mask(), (columns - one.columns, 0)) for one in several])
        rows._add_run(columns, None if bool(masks.all()) else masks)
        deltas = [
            torch.zeros(len(one.tokens), 1, dtype=torch.long) if one.rope_deltas is None else one.rope_deltas
            for one in several
        ]
        if any(one.rope_deltas is not None for one in several):
            rows.rope_deltas = torch.cat([one.to(deltas[0].device) for one in deltas])
        return rows

    def mask(self) -> torch.Tensor:
        """bool `(batch, columns)` on the CPU: True for columns that are real tokens."""
        batch, host = len(self.tokens), {"dtype": torch.bool, "device": "cpu"}
        runs = [torch.ones(batch, n, **host) if valid is None else valid.cpu() for n, valid in self._runs]
        return torch.cat([torch.zeros(batch, 0, **host), *runs], dim=1)

    @property
    def padded(self) -> bool:
        """Some row has seen padding."""
        return any(count != self.columns for count in self.tokens)

    # A forward: new_step, then advance, or abandon if it raised.

    def new_step(
        self, batch: int, q_len: int, valid: torch.Tensor | None, device: torch.device, longest: int, ring: int
    ) -> ForwardStep:
        """The step that adds `q_len` columns; this state is unchanged until `advance`.

        Args:
            valid: bool `(batch, q_len)`, False for padding; None if all new tokens are real.
            longest: entries of the longest segment.
            ring: size of the ring of recorded queries, 0 for none.
        """
        before = self.tokens or [0] * batch
        counts = [q_len] * batch if valid is None else valid.sum(1).tolist()
        valid = None if valid is None else valid.to(device)
        start = torch.tensor(before, dtype=torch.int32, device=device).unsqueeze(1)
        if valid is None:
            offsets = torch.arange(q_len, dtype=torch.int32, device=device)
        else:
            offsets = valid.cumsum(1, dtype=torch.int32) - 1
        return ForwardStep(q_len, not self.tokens, counts, valid, start + offsets, longest + q_len, ring)

    def advance(self, step: ForwardStep, segments: int) -> None:
        """Counts a completed step, which stored `segments` entries for each real token."""
        batch = len(step.counts)
        self.record_queries(step.observed_part)
        self.tokens = [n + more for n, more in zip(self.tokens or [0] * batch, step.counts, strict=True)]
        self.stored = [n + more * segments for n, more in zip(self.stored or [0] * batch, step.counts, strict=True)]
        self._add_run(step.q_len, step.valid)

    def record_queries(self, step: ForwardStep | None) -> None:
        """Records the positions of the queries that the layers have written to their rings in this step."""
        if step is not None and step.slots is not None:
            rows, columns, slots = step.slots
            self._set_positions(rows, slots, step.positions[rows, columns].long(), (len(step.counts), step.ring))

    def abandon(self, step: ForwardStep) -> None:
        """Accounts for a one-token step that raised: it may have overwritten the oldest recorded query."""
        if step.q_len == 1 and step.slots is not None and self.window_positions is not None:
            rows, _, slots = step.slots
            self._set_positions(rows, slots, slots.new_tensor(-1), tuple(self.window_positions.shape))

    def _set_positions(
        self, rows: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, shape: tuple[int, ...]
    ) -> None:
        old = self.window_positions
        new = slots.new_full(shape, -1) if old is None else old.clone()
        new[rows, slots] = positions
        self.window_positions = new

    def has_window(self, window: int) -> bool:
        """Whether the last `window` queries of every row, or all if it has fewer, are recorded."""
        if not window or not self.tokens:
            return True
        if self.window_positions is None:
            return False
        ends = torch.tensor(self.tokens, device=self.window_positions.device)
        newest = (self.window_positions >= (ends - window).clamp(min=0).unsqueeze(1)).sum(1)
        return bool((newest == ends.clamp(max=window)).all())

    def faults(self) -> Iterator[str]:
        """Descriptions of inconsistent counts; read no further than the first."""
        if any(count < 0 for count in self.tokens) or self.columns < 0 or any(count < 0 for count, _ in self._runs):
            yield "token counts are negative"
        batch = (len(self.tokens),)
        for count, valid in self._runs:
            if valid is not None and (valid.dtype != torch.bool or valid.shape != (*batch, count)):
                yield "padding masks are not bool (batch, columns)"
        deltas = self.rope_deltas
        if deltas is not None and (deltas.shape != (*batch, 1) or deltas.dtype != torch.int64):
            yield "rope_deltas are not int64 (batch, 1)"
        elif deltas is not None and bool((deltas.abs() >= 2**31).any()):
            yield "rope_deltas are no offsets of positions"
        if self.columns != sum(count for count, _ in self._runs) or self.tokens_since(0) != self.tokens:
            yield "token counts and padding masks disagree"

    def tokens_since(self, columns: int) -> list[int]:
        """Real tokens of each row in the columns from `columns` on."""
        return self.copy().remove_columns(self.columns - columns)

    def select(self, rows: torch.Tensor) -> None:
        """Row `i` becomes a copy of the former row `rows[i]`."""
        chosen = rows.tolist()
        self.tokens = [self.tokens[row] for row in chosen]
        self.stored = [self.stored[row] for row in chosen]
        self._runs = [(n, None if valid is None else valid[rows.to(valid.device)]) for n, valid in self._runs]
        if self.window_positions is not None:
            self.window_positions = self.window_positions[rows.to(self.window_positions.device)]
        if self.rope_deltas is not None:
            self.rope_deltas = self.rope_deltas[rows.to(self.rope_deltas.device)]

    def remove_columns(self, count: int) -> list[int]:
        """Removes the newest `count` columns; returns the number of real tokens of each row in them.

        `stored` is left to the caller, which knows what was evicted.
        """
        removed = [0] * len(self.tokens)
        self.columns -= count
        while count:
            size, valid = self._runs.pop()
            taken = min(size, count)
            real = [taken] * len(removed) if valid is None else valid[:, size - taken :].sum(1).tolist()
            removed = [n + more for n, more in zip(removed, real, strict=True)]
            if taken < size:
                self._runs.append((size - taken, None if valid is None else valid[:, : size - taken]))
            count -= taken
        self.tokens = [n - less for n, less in zip(self.tokens, removed, strict=True)]
        if self.window_positions is not None:
            limit = torch.tensor(self.tokens, device=self.window_positions.device).unsqueeze(1)
            self.window_positions = torch.where(self.window_positions < limit, self.window_positions, -1)
        return removed

    def _add_run(self, count: int, valid: torch.Tensor | None) -> None:
        self.columns += count
        if valid is None and self._runs and self._runs[-1][1] is None:
            self._runs[-1] = (self._runs[-1][0] + count, None)
        else:
            self._runs.append((count, valid))


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r:.40} is not a whole number")
    return value
