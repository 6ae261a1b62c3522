"""The interface of an eviction policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from ..view import LayerView

NEEDS = ("keys", "values", "log_beta", "queries")


class Policy(ABC):
    """Scores a layer's entries; a subclass is a frozen dataclass of its options.

    A policy keeps nothing between calls and writes to nothing it is shown. Rows must be scored independently: a row's
    scores may depend only on that row's entries.

    Attributes:
        name: the name in the registry.
        needs: what the runtime must record or show, out of `NEEDS`.
        default_scope: the scope used when the user names none.
        evicts: False for a policy that keeps everything.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    default_scope: ClassVar[str] = "head"
    evicts: ClassVar[bool] = True

    @property
    def window_size(self) -> int:
        """How many of the last queries it reads; 0 unless it needs `queries`."""
        return 0

    @abstractmethod
    def score(self, view: LayerView) -> torch.Tensor:
        """Scores the entries of one layer.

        Returns:
            fp32 `(batch, num_kv_heads, n)`, higher = keep, no NaN where `view.valid`; arbitrary elsewhere.
        """
