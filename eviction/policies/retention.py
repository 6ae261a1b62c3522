"""Learned retention: how much of an entry's usefulness is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from .base import Policy

if TYPE_CHECKING:
    from ..view import LayerView


@dataclass(frozen=True)
class Retention(Policy):
    """`score_i = (T + 1 - i) · log β_i`, the log of the retention β^(T+1-i) at the next token.

    Source: TRIM-KV and DBTrimKV (Bui et al., "Cache What Lasts" and "Make Each Token Count"). Needs trained gates;
    scores of different layers and heads are comparable, hence the global scope.
    """

    name: ClassVar[str] = "retention"
    needs: ClassVar[frozenset[str]] = frozenset({"log_beta"})
    default_scope: ClassVar[str] = "global"

    def score(self, view: LayerView) -> torch.Tensor:
        age = view.time.view(-1, 1, 1) + 1 - view.positions
        return age.float() * view.log_beta
