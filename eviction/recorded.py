"""What went into the attention layers as long as nothing was evicted: for policies that score a prompt from it.

Mean and covariance of a layer's queries before RoPE, kept while the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .model_adapters import Rotary

if TYPE_CHECKING:
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


SINKS = 4  # the first tokens' queries are outliers and left out, as in kvpress
CHUNK = 1024  # queries that are held in fp32 at a time


@dataclass(frozen=True)
class QueryStatistics:
    """Statistics of the queries that each row has seen so far; nothing is written in place, so forks may share it.

    Attributes:
        count: fp32 `(batch,)`: queries counted, all but the first `SINKS` of each row.
        mean: fp32 `(batch, num_heads, head_dim)`.
        scatter: fp32 `(batch, num_heads, head_dim, head_dim)`: sum of the outer products of deviations from the mean.
        next_position: int64 `(batch,)`: the position that RoPE will give each row's next token.
    """

    count: torch.Tensor
    mean: torch.Tensor
    scatter: torch.Tensor
    next_position: torch.Tensor

    @classmethod
    def empty(cls, batch: int, num_heads: int, head_dim: int, device: torch.device) -> QueryStatistics:
        """Of rows that have seen nothing."""
        mean = torch.zeros(batch, num_heads, head_dim, device=device)
        scatter = torch.zeros(batch, num_heads, head_dim, head_dim, device=device)
        start = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(torch.zeros(batch, device=device), mean, scatter, start)

    @property
    def covariance(self) -> torch.Tensor:
        """fp32 `(batch, num_heads, head_dim, head_dim)`, divided by the count; zeros before the first query counts."""
        return self.scatter / self.count.clamp(min=1).view(-1, 1, 1, 1)

    def seen(self, queries: torch.Tensor, counts: torch.Tensor, next_position: torch.Tensor) -> QueryStatistics:
        """With more queries.

        Means and scatter are merged without subtracting large numbers (Chan et al., "Updating Formulae and a Pairwise
        Algorithm for Computing Sample Variances", 1979).

        Args:
            queries: `(batch, num_heads, n, head_dim)` before RoPE.
            counts: bool `(batch, n)`: which of them count.
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
