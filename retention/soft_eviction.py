"""Eviction of a prompt under a global budget, made differentiable: the gates' task at run time, trained directly.

The runtime evicts a prompt of T tokens at its end by keeping the entries with the k highest scores
`s_i = (T+1-i)·log β_i` of all layers and heads. Here θ, the geometric mean of the k-th and the next score, becomes a
soft threshold: entry i gets the weight

    w_i = 1 / (1 + (s_i/θ)^(1/τ)),    τ the temperature,

which is 1/2 at the threshold, near 1 above and near 0 below, and tends to the hard choice as τ → 0. `log w_i` is added
to the attention logits of everything after the prompt. Only ratios of scores count, so the budget holds exactly,
whatever the gates' scale, and no capacity loss is needed. This objective is ours; TRIM-KV and DBTrimKV train with
decays and a capacity loss and evict by rank afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class SoftEviction:
    """Soft eviction of a prompt at its end.

    Attributes:
        budget: share of its entries that stay, in (0, 1].
        temperature: τ > 0, in units of log scores.
        sinks, recent: numbers of its first and last tokens, which stay and count in the budget; if they exceed it,
            fewer recent ones stay, then fewer sinks.

    Raises:
        ValueError: a budget outside (0, 1] or a temperature that is not positive.
    """

    budget: float
    temperature: float = 0.5
    sinks: int = 4
    recent: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1 or self.temperature <= 0:
            raise ValueError(
                f"budget {self.budget} and temperature {self.temperature}: a share in (0, 1] and a temperature above 0 "
                "are accepted"
            )

    def log_weight(self, log_beta: torch.Tensor) -> torch.Tensor:
        """log w of a prompt's entries.

        Args:
            log_beta: `(layers, batch, num_kv_heads, prompt_len)` fp32, of the prompt's tokens.

        Returns:
            `(layers, batch, num_kv_heads, prompt_len)` fp32 ≤ 0, differentiable in log_beta.
        """
        layers, batch, heads, prompt_len = log_beta.shape
        allowed = max(1, int(self.budget * prompt_len + 1e-6))
        first = min(self.sinks, allowed)
        last = prompt_len - min(self.recent, allowed - first)
        segments, free = layers * heads, last - first
        kept = (allowed - (prompt_len - free)) * segments
        if kept >= free * segments:
            return torch.zeros_like(log_beta)
        age = torch.arange(prompt_len + 1, 1, -1, device=log_beta.device, dtype=log_beta.dtype)
        # log(-s): ratios of scores become differences.
        decay = (-log_beta).clamp_min(torch.finfo(log_beta.dtype).tiny) * age
        log_score = decay[..., first:last].log()
        ranked = log_score.detach().transpose(0, 1).flatten(1)
        last_kept, first_evicted = (ranked.kthvalue(max(k, 1), dim=-1).values for k in (kept, kept + 1))
        threshold = ((last_kept + first_evicted) / 2).view(batch, 1, 1)
        threshold = threshold + _budget_gradient(log_score, threshold, self.temperature)
        return F.pad(F.logsigmoid((threshold - log_score) / self.temperature), (first, prompt_len - last))


def _budget_gradient(log_score: torch.Tensor, threshold: torch.Tensor, temperature: float) -> torch.Tensor:
    """Zero, with the gradient of the threshold that keeps `Σ w` as it is, `(batch, 1, 1)`.

    From `Σ dw = 0`: `dθ = Σ w(1-w) du / Σ w(1-w)`, u the log scores. An entry then gains weight only at the cost of
    others; with θ taken as given all of them could gain, and the gates would drift without changing the order.
    """
    with torch.no_grad():
        weight = torch.sigmoid((threshold - log_score) / temperature)
        share = weight * (1 - weight)
        share /= share.sum(dim=(0, 2, 3), keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    return ((log_score - log_score.detach()) * share).sum(dim=(0, 2, 3)).view(-1, 1, 1)
