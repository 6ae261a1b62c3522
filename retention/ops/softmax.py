"""Variants of attention's softmax that models have: a cap on logits, and learned sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Softmax:
    """How a model turns the logits `scale · q·k` into weights; without arguments the ordinary softmax.

    Attributes:
        softcap: c > 0: logits become `c · tanh(logits / c)`, before masks, decays and biases (Gemma-2, section 2).
        sinks: `(num_heads,)`, the logit of one more entry of each query head, whose value is zero (gpt-oss model card,
            attention; StreamingLLM calls it a learnable sink token). It is neither capped nor does it decay.
    """

    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def ordinary(self) -> bool:
        return self.softcap is None and self.sinks is None

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `scale · q·k` with the cap, if there is one."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Weights of the entries, which sum to less than 1 if there are sinks.

        Args:
            logits: `(batch, num_heads, q_len, n)`, capped, masked by -inf.
        """
        if self.sinks is None:
            return torch.softmax(logits, dim=-1)
        sink = self.sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.softmax(torch.cat((logits, sink), dim=-1), dim=-1)[..., :-1]


ORDINARY = Softmax()
