"""The reading side of a cache: what it holds, where, and whether it is sound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache

from .layer import RaggedLayer
from .marks import Marks
from .report import Meter, Report
from .rows import Rows
from .store import SegmentStore
from .view import LayerView


class Contents(Cache):
    """Rows and layers of a cache, with everything that can be asked of them; nothing here changes any of it.

    Attributes:
        layers: one a decoder layer.
        ragged: those of them that evict, in the same order.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.ragged = [layer for layer in layers if isinstance(layer, RaggedLayer)]
        self._rows = Rows()
        self._meter = Meter()
        self._marks = Marks()

    @property
    def stores(self) -> list[SegmentStore]:
        """The storage of each layer of `ragged` that has entries."""
        return [layer.store for layer in self.ragged if layer.store is not None]

    @property
    def columns_seen(self) -> int:
        """Columns the model has run over, padding included."""
        return self._rows.columns

    @property
    def tokens_seen(self) -> torch.Tensor:
        """int64 `(batch,)`: real tokens of each row, evicted ones included."""
        return torch.tensor(self._rows.tokens, dtype=torch.long)

    @property
    def query_positions(self) -> torch.Tensor:
        """int64 `(batch, size)`: positions of the remembered queries in any order, -1 for none."""
        recorded = self._rows.window_positions
        return torch.empty(len(self._rows.tokens), 0, dtype=torch.long) if recorded is None else recorded

    @property
    def entries(self) -> int:
        """Entries stored in all rows, layers and heads."""
        return sum(self._rows.stored)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for entries; storage shared with a fork is counted in full."""
        return sum(store.nbytes for store in self.stores)

    def lengths(self) -> torch.Tensor:
        """int64 `(batch, layers, heads)`: entries of every segment, layers as in `report().layer_indices`."""
        rows = [store.lengths for store in self.stores]
        if not rows:
            return torch.zeros(0, len(self.ragged), 0, dtype=torch.long)
        return torch.tensor(rows).view(len(rows), len(self._rows.tokens), -1).transpose(0, 1).contiguous()

    def positions(self, layer_idx: int) -> torch.Tensor:
        """int64 `(batch, heads, n)`: positions of a layer's entries among the row's real tokens, padded with -1."""
        layer = self.layers[layer_idx] if 0 <= layer_idx < len(self.layers) else None
        if not isinstance(layer, RaggedLayer):
            known = ", ".join(str(one.layer_idx) for one in self.ragged)
            raise ValueError(f"layer {layer_idx} does not evict; those that do: {known}")
        if layer.store is None:
            raise ValueError("the cache is empty: run the model with it first")
        return LayerView(layer, self.tokens_seen.to(layer.device)).positions

    def kept(self, layer_idx: int) -> list[list[torch.Tensor]]:
        """Positions of a layer's entries, one ascending int64 tensor for each `[row][head]`."""
        return [[head[head >= 0] for head in row] for row in self.positions(layer_idx)]

    def report(self) -> Report:
        """Counts what is stored and what was evicted."""
        layer_indices = tuple(layer.layer_idx for layer in self.ragged)
        return self._meter.report(self.stores, sum(self._rows.tokens), self.lengths(), layer_indices)

    def check(self) -> None:
        """Proves the cache's integrity, under `python -O` too.

        Raises:
            AssertionError: storage that does not add up, positions out of order or range, or wrong counts.
        """
        for fault in self.faults():
            raise AssertionError(fault)

    def faults(self) -> Iterator[str]:
        """What is wrong with the cache; read no further than the first."""
        yield from self._rows.faults()
        if not 0 <= self._marks.floor <= self.columns_seen:
            yield "the last eviction was at a column that was not seen"
        tokens = self.tokens_seen
        new = torch.tensor(self._rows.since(self._marks.floor), dtype=torch.long)
        for layer in self.ragged:
            store = layer.store
            if store is None:
                continue
            if store.batch != len(self._rows.tokens):
                yield "there is not one row a sequence"
            yield from store.faults()
            positions = self.positions(layer.layer_idx).cpu()
            if not bool((positions < tokens.view(-1, 1, 1)).all()):
                yield "positions are not of tokens seen"
            # They ascend, so the tokens since the last eviction are all there if there are as many.
            if not bool(((positions >= (tokens - new).view(-1, 1, 1)).sum(2) == new.unsqueeze(1)).all()):
                yield "entries of tokens since the last eviction are missing"
        if self._count() != self._rows.stored:
            yield "stored entries are not counted right"

    def _count(self) -> list[int]:
        """Entries of each row, counted in the storage."""
        stores = self.stores
        return [sum(store.row_entries(row) for store in stores) for row in range(len(self._rows.tokens))]
