"""Learned retention: keep the entries whose gates predict the most remaining usefulness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from tenure.checked import Range

from ..layer_view import LayerView
from .common import Tokens
from .policy import Policy, Protection


def log_retention(view: LayerView, age: int = 1) -> torch.Tensor:
    """`(T + age - i) · log β_i`, fp32 `(batch, num_kv_heads, n)`; T tokens have been seen, positions i begin at 0.

    The last token's position is T - 1 and the next one's T: with `age` 1, as in the released code, this is the log of
    the retention one position after the next token, β^(T+1-i).

    Between the chunks of a prompt T is the end of the prompt: an entry is scored by its retention after the whole
    prompt has been read, so that the evictions after all chunks work towards the same choice.
    """
    ages = view.horizon.view(-1, 1, 1) + age - view.positions
    return ages.float() * view.log_beta


@dataclass(frozen=True)
class Retention(Policy):
    """`score_i = (T + 1 - i) · log β_i`, the log of the retention β^(T+1-i), with T tokens seen and i from 0.

    Source: TRIM-KV and DBTrimKV (Bui et al., "Cache What Lasts" and "Make Each Token Count"). Needs trained gates;
    scores of different layers and heads are comparable, hence the global scope.

    Attributes:
        lookahead: n, the number of next tokens summed over: `log Σ_{s=1..n} β^(T+s-i)`, the retention expected over
            them; the larger, the more β counts relative to age.
        threshold: an entry whose retention β^(T+1-i) is below it, in (0, 1), is evicted at the next eviction even if
            the budget is not used up. Evictions run when the budget is exceeded, and with a budget of 1.0 after every
            forward; protected tokens of the plan are kept.
        age: the age of the entry at position T, 1; the released code adds 1 to it if there is a lookahead, which the
            preset "dbtrimkv" does too.
    """

    lookahead: Annotated[int, Range(1, 2**31)] = 1
    threshold: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
    age: Tokens = 1

    name: ClassVar[str] = "retention"
    needs: ClassVar[frozenset[str]] = frozenset({"log_beta"})
    default_scope: ClassVar[str] = "global"
    # Measured on the training texts (docs/results/studies.md): more costs behind a prompt, less while a text goes on.
    default_protection: ClassVar[Protection] = Protection(share=0.1, later_share=0.5)

    @property
    def discards(self) -> bool:
        return self.threshold is not None

    def score(self, view: LayerView) -> torch.Tensor:
        now = log_retention(view, self.age)
        score = now
        if self.lookahead > 1:
            score = now + log_geometric_sum(view.log_beta, self.lookahead)
        return score if self.threshold is None else score.masked_fill(now < math.log(self.threshold), -torch.inf)


def log_geometric_sum(log_beta: torch.Tensor, n: int) -> torch.Tensor:
    """`log (1 + β + … + β^(n-1))`, shaped as `log_beta`; log n at β = 1."""
    rate = log_beta.double().clamp(max=-1e-12)  # below this the quotient is n to double precision
    return (torch.expm1(n * rate) / torch.expm1(rate)).log().to(log_beta.dtype)
