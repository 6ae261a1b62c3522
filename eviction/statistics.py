"""Mean and covariance of a layer's queries before RoPE, kept while the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
