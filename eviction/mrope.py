"""M-RoPE's position offsets, kept with the caches they belong to.

Models of the Qwen-VL family count an image as fewer positions than it has tokens. They keep the difference,
`rope_deltas`, on one of their modules, where the next prompt overwrites it: a cache that is continued later would get
positions of another prompt. Within a block every cache has its own (`SequenceState.rope_deltas`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from .forward_state import SequenceState


class RopeDeltas:
    """The module of a model that holds `rope_deltas`; without one, nothing is done."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._holder: Any = next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)

    @property
    def kept(self) -> bool:
        """Whether the model has such offsets."""
        return self._holder is not None

    def load(self, rows: SequenceState | None, positions_given: bool) -> None:
        """Before a call of the model: the offsets become those of the cache, whatever ran before.

        Args:
            rows: of the cache that is continued; None for a new or an empty one.
            positions_given: the call has position ids. For a new cache `generate` has then set its offsets already.
        """
        if self._holder is None or (rows is None and positions_given):
            return
        self._holder.rope_deltas = None if rows is None else rows.rope_deltas

    def store(self, rows: SequenceState) -> None:
        """After a call of the model: its offsets are those of the cache it wrote to."""
        deltas = None if self._holder is None else self._holder.rope_deltas
        if deltas is not None:
            rows.rope_deltas = deltas.repeat_interleave(len(rows.tokens) // len(deltas), dim=0)

    @contextmanager
    def in_generate(self) -> Iterator[None]:
        """Within the block `generate` computes the positions of a filled cache from the cache's own offsets."""
        name = "_prepare_position_ids_for_generation"
        prepare = getattr(self._model, name, None)
        if self._holder is None or prepare is None:
            yield
            return

        def with_own_offsets(inputs: torch.Tensor, model_kwargs: dict[str, Any]) -> torch.Tensor:
            cache = model_kwargs.get("past_key_values")
            rows = getattr(cache, "rows", None)
            if isinstance(rows, SequenceState) and rows.tokens:
                self.load(rows, positions_given=False)
            return prepare(inputs, model_kwargs)

        setattr(self._model, name, with_own_offsets)
        try:
            yield
        finally:
            delattr(self._model, name)
