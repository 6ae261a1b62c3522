"""Expected attention: attention expected from future queries, estimated from the statistics of past ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from tenure.checked import NotNegative, Range

from ..layer_view import LayerView
from ..recorded import StatisticsConfig
from .policy import Policy


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Attention expected from the next queries if they are Gaussian with the mean and covariance of those so far.

    `E[exp(q·k/√d)] = exp(k·μ/√d + k·Σk/2d)` with μ and Σ before RoPE, rotated by the average rotation of the next
    positions; normalised over the head's entries, mean over the heads of a group, times the norm of the value. The
    first four tokens are kept and excluded from statistics and normalisation.

    Source: "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution" (Devoto
    et al., 2025), section 3; defaults as in kvpress.

    Attributes:
        future: number of next positions that are averaged over.
        covariance: use Σ; otherwise only the mean.
        value_norm: multiply by `‖v_i‖₂`.
        epsilon: added to the attention before that.
    """

    future: Annotated[int, Range(1, 1 << 20)] = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: NotNegative = 0.0

    name: ClassVar[str] = "expected_attention"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "query_statistics"})

    def score(self, view: LayerView) -> torch.Tensor:
        statistics = view.expected_queries
        mean, covariance = view.rotary.average(
            statistics.mean, statistics.covariance, statistics.next_position, self.future
        )
        keys = view.keys.float() * view.scaling
        first = view.positions < StatisticsConfig.skipped_tokens
        expected = torch.zeros(view.shape, dtype=torch.float32, device=keys.device)
        for group in range(view.num_kv_groups):
            heads = slice(group, None, view.num_kv_groups)  # this group's query head of every key/value head
            logits = (keys @ mean[:, heads].unsqueeze(3)).squeeze(3)
            if self.covariance:
                logits = logits + ((keys @ covariance[:, heads]) * keys).sum(3) / 2
            logits = logits.masked_fill(first | ~view.valid, -torch.inf)
            expected += logits.softmax(2).nan_to_num(0.0) / view.num_kv_groups  # NaN: a head with first tokens only
        if self.value_norm:
            expected = (expected + self.epsilon) * torch.linalg.vector_norm(view.values.float(), dim=3)
        return expected.masked_fill(first, torch.inf)
