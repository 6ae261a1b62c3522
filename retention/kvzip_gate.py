"""Fast KVzip's gate: a token's own key against learned sinks, seen by the token's own queries."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

NORM_EPSILON = 1e-6


class KVzipGate(nn.Module):
    """Scores of one layer's tokens (Fast KVzip, Kim et al., arXiv 2601.17668; released `q{G}_dim16_sink16.pt` files).

    `score = mean_g 1 / (1 + Σ_s exp(c_s·q_g/√d − (k·q_g/√d + b_g)))`: the share of attention that a token would give
    to itself among sinks c, over the G query heads of its KV head; q and k are projections of the layer's input with
    root-mean-square norms.

    Args:
        hidden_size: of the input.
        num_kv_heads, num_groups: KV heads, and query heads that share each.
        dim: of queries, keys and sinks.
        num_sinks: sinks of each KV head.
    """

    def __init__(self, hidden_size: int, num_kv_heads: int, num_groups: int, dim: int, num_sinks: int) -> None:
        super().__init__()
        fp32 = torch.float32
        self.heads, self.groups, self.dim = num_kv_heads, num_groups, dim
        self.q_proj = nn.Linear(hidden_size, num_kv_heads * num_groups * dim, dtype=fp32)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * dim, bias=False, dtype=fp32)
        self.q_norm = nn.RMSNorm(dim, eps=NORM_EPSILON, dtype=fp32)
        self.k_norm = nn.RMSNorm(dim, eps=NORM_EPSILON, dtype=fp32)
        self.k_base = nn.Parameter(torch.zeros(num_kv_heads, num_sinks, dim, dtype=fp32))
        self.b = nn.Parameter(torch.zeros(num_kv_heads, num_groups, dtype=fp32))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Args:
            hidden_states: `(..., hidden_size)` fp32.

        Returns:
            `(..., num_kv_heads)`: the log-odds of the scores, whose logsigmoid is the log of the score.
        """
        queries = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (self.heads, self.groups, self.dim)))
        keys = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (self.heads, self.dim)))
        own = torch.einsum("...hgd,...hd->...hg", queries, keys) / self.dim**0.5 + self.b
        sinks = torch.einsum("...hgd,hsd->...hgs", queries, self.k_base) / self.dim**0.5
        odds = own - sinks.logsumexp(-1)  # of one group
        log_score, log_rest = (F.logsigmoid(one).logsumexp(-1) for one in (odds, -odds))
        return log_score - log_rest


class StackedKVzipGates(nn.Module):
    """The gates of all layers over `(layers, tokens, hidden_size)`."""

    def __init__(self, gates: list[KVzipGate]) -> None:
        super().__init__()
        self.gates = nn.ModuleList(gates)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.stack([gate(one) for gate, one in zip(self.gates, hidden_states, strict=True)])
