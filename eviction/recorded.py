"""Data recorded per layer while the model runs: the attention's inputs, and statistics of its queries before RoPE."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .model_adapters import Rotary


@dataclass(frozen=True)
class RecordedForward:
    """The new columns of one forward.

    Attributes:
        hidden_states: `(batch, q_len, hidden_size)`, the input of the layer's attention.
        positions: int64 `(batch, q_len)`, the positions at which RoPE was applied; the same tensor for all layers.
        valid: bool `(batch, q_len)`, False for padding; None if all are real tokens.
    """

    hidden_states: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None

    def first(self, count: int) -> RecordedForward:
        """The first `count` columns."""
        valid = None if self.valid is None else self.valid[:, :count]
        return RecordedForward(self.hidden_states[:, :count], self.positions[:, :count], valid)

    def select(self, rows: torch.Tensor) -> RecordedForward:
        own = rows.to(self.positions.device)
        valid = None if self.valid is None else self.valid[own]
        return RecordedForward(self.hidden_states[own], self.positions[own], valid)


@dataclass(frozen=True)
class RecordedInputs:
    """The inputs of one layer's attention from its first token on; nothing is written in place, so forks may share it.

    Stored from a cache's first forward until every row has had its first eviction: hidden_size numbers per layer and
    token. Afterwards only `evicted_by` is left.

    Attributes:
        rotary: the model's RoPE.
        evicted_by: for each row the policy of its first eviction; None while all its entries are stored.
        forwards: the recorded forwards in order; empty once no row needs them.
    """

    rotary: Rotary
    evicted_by: tuple[Hashable | None, ...]
    forwards: tuple[RecordedForward, ...] = ()

    @property
    def complete(self) -> bool:
        """Some row still has all its entries."""
        return None in self.evicted_by

    def row(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The real tokens of a row that has all its entries, in the order of its entries.

        Returns:
            hidden states `(1, n, hidden_size)`, and positions int64 `(1, n)`.
        """
        assert self.evicted_by[row] is None, "the row has all its entries"
        hidden = torch.cat([one.hidden_states[row] for one in self.forwards])
        positions = torch.cat([one.positions[row] for one in self.forwards])
        if any(one.valid is not None for one in self.forwards):
            real = [torch.ones_like(one.positions[row]).bool() if one.valid is None else one.valid[row]
                    for one in self.forwards]  # fmt: skip
            hidden, positions = hidden[torch.cat(real)], positions[torch.cat(real)]
        return hidden.unsqueeze(0), positions.unsqueeze(0)

    def append(self, forward: RecordedForward) -> RecordedInputs:
        """A copy with one more forward."""
        return replace(self, forwards=(*self.forwards, forward)) if self.complete else self

    def first(self, columns: int) -> RecordedInputs:
        """A copy limited to the first `columns` columns."""
        forwards, left = [], columns
        for one in self.forwards:
            if left <= 0:
                break
            forwards.append(one if one.positions.shape[1] <= left else one.first(left))
            left -= one.positions.shape[1]
        return replace(self, forwards=tuple(forwards))

    def select(self, rows: torch.Tensor) -> RecordedInputs:
        """Row `i` becomes a copy of the former row `rows[i]`."""
        evicted_by = tuple(self.evicted_by[row] for row in rows.tolist())
        chosen = replace(self, evicted_by=evicted_by, forwards=tuple(one.select(rows) for one in self.forwards))
        return chosen if chosen.complete else replace(chosen, forwards=())

    def evicted(self, due: Sequence[bool], policy: Hashable) -> RecordedInputs:
        """A copy after an eviction of the rows that were `due` under `policy`."""
        rows = zip(self.evicted_by, due, strict=True)
        left = replace(self, evicted_by=tuple(policy if now and before is None else before for before, now in rows))
        return left if left.complete else replace(left, forwards=())


@dataclass(frozen=True)
class StatisticsConfig:
    """Parameters of the query statistics.

    Attributes:
        skipped_tokens: first tokens of each row whose queries are outliers and not counted, as in kvpress.
        chunk: queries per row converted to fp32 at a time; bounds the memory of a long prefill.
    """

    skipped_tokens: int = 4
    chunk: int = 1024


@dataclass(frozen=True)
class QueryStatistics:
    """Statistics of the queries that each row has seen so far; nothing is written in place, so forks may share it.

    Attributes:
        count: fp32 `(batch,)`: queries counted, all but the first `StatisticsConfig.skipped_tokens` of each row.
        mean: fp32 `(batch, num_heads, head_dim)`.
        scatter: fp32 `(batch, num_heads, head_dim, head_dim)`: sum of the outer products of deviations from the mean.
        next_position: int64 `(batch,)`: the position at which RoPE will be applied to each row's next token.
    """

    count: torch.Tensor
    mean: torch.Tensor
    scatter: torch.Tensor
    next_position: torch.Tensor

    @classmethod
    def empty(cls, batch: int, num_heads: int, head_dim: int, device: torch.device) -> QueryStatistics:
        """Statistics of rows that have seen nothing."""
        fp32: dict[str, Any] = {"dtype": torch.float32, "device": device}
        mean = torch.zeros(batch, num_heads, head_dim, **fp32)
        scatter = torch.zeros(batch, num_heads, head_dim, head_dim, **fp32)
        start = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(torch.zeros(batch, **fp32), mean, scatter, start)

    @property
    def covariance(self) -> torch.Tensor:
        """fp32 `(batch, num_heads, head_dim, head_dim)`, divided by the count; zeros before the first query counts."""
        return self.scatter / self.count.clamp(min=1).view(-1, 1, 1, 1)

    def updated(self, queries: torch.Tensor, counts: torch.Tensor, next_position: torch.Tensor) -> QueryStatistics:
        """A copy that includes more queries.

        Means and scatter are merged without subtracting large numbers (Chan et al., "Updating Formulae and a Pairwise
        Algorithm for Computing Sample Variances", 1979).

        Args:
            queries: `(batch, num_heads, n, head_dim)` before RoPE.
            counts: bool `(batch, n)`: True for queries to be counted.
            next_position: int64 `(batch,)`.
        """
        weight = counts.to(torch.float32)
        added = weight.sum(1)
        each = weight[:, None, :, None]
        queries = queries.float()
        mean = (queries * each).sum(2) / added.clamp(min=1).view(-1, 1, 1)
        centred = (queries - mean.unsqueeze(2)) * each
        scatter = centred.transpose(2, 3) @ centred

        total = self.count + added
        share = (added / total.clamp(min=1)).view(-1, 1, 1)
        shift = mean - self.mean
        between = shift.unsqueeze(3) * shift.unsqueeze(2) * (self.count.view(-1, 1, 1) * share).unsqueeze(3)
        return QueryStatistics(total, self.mean + shift * share, self.scatter + scatter + between, next_position)

    def select(self, rows: torch.Tensor) -> QueryStatistics:
        """Row `i` becomes a copy of the former row `rows[i]`, int64."""
        rows = rows.to(self.count.device)
        return QueryStatistics(self.count[rows], self.mean[rows], self.scatter[rows], self.next_position[rows])
