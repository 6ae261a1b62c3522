"""Places that a cache can be taken back to exactly, whatever its policies have accumulated since.

Positions and entries know by themselves which tokens they are of. Sums do not: states that policies observe, and the
statistics of queries. They are replaced in every forward, never written to, so a mark only holds on to the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .layer import RaggedLayer
from .rows import Rows
from .statistics import QueryStatistics

if TYPE_CHECKING:
    from .places import Places

KEPT = 4  # marks of a cache: the oldest since the last eviction and the newest


@dataclass(frozen=True)
class LayerMark:
    """What a layer's observers had made of the tokens so far, and where its entries lay then."""

    places: Places
    lengths: list[int]
    states: dict[str, torch.Tensor]
    statistics: QueryStatistics | None
    window: torch.Tensor | None

    @classmethod
    def of(cls, layer: RaggedLayer) -> LayerMark:
        store = layer.store
        assert store is not None, "a cache that has seen something is marked"
        # In these buffers `append` writes only behind the entries of now.
        states = {name: store.buffers[name] for name in layer.observers.observed_keys}
        return cls(store.places(), store.lengths, states, layer.statistics, layer.share_window())

    def restore(self, layer: RaggedLayer, rows: Sequence[int] | None) -> None:
        """Gives it back to `layer`, whose segments have been shortened to the entries of then.

        Args:
            rows: which row of then each row of now continues; None if they are the same.
        """
        store = layer.store
        assert store is not None, "the layer was marked"
        order = range(len(self.lengths))
        if rows is not None:
            heads = range(store.num_kv_heads)
            order = [row * store.num_kv_heads + head for row in rows for head in heads]
        assert store.lengths == [self.lengths[segment] for segment in order], "nothing was evicted since"
        if self.states:
            old = self.places.index(order, store.lengths)
            new = store.places().index(range(len(store.lengths)), store.lengths)
            for name, buffer in self.states.items():
                store.buffers[name] = store.buffers[name].index_copy(0, new, buffer[old])
        layer.statistics, layer.window = self.statistics, self.window
        if rows is not None:
            chosen = torch.tensor(list(rows))
            if self.statistics is not None:
                layer.statistics = self.statistics.select(chosen)
            if self.window is not None:
                layer.window = self.window.index_select(0, chosen.to(self.window.device))
        layer.share_window()


@dataclass(frozen=True)
class Mark:
    """A place in a cache's past.

    Attributes:
        columns: columns the cache had seen.
        rows: which row of then each row of now continues; None if they are the same.
        window_positions: as in `Rows`, of the rows of then.
        layers: one a layer that evicts.
    """

    columns: int
    rows: tuple[int, ...] | None
    window_positions: torch.Tensor | None
    layers: tuple[LayerMark, ...]

    def restore(self, layers: Sequence[RaggedLayer], rows: Rows) -> None:
        """Gives layers and rows, which have been shortened to `columns`, what they remembered then."""
        for mark, layer in zip(self.layers, layers, strict=True):
            mark.restore(layer, self.rows)
        rows.window_positions = self.window_positions
        if self.rows is not None and self.window_positions is not None:
            rows.window_positions = self.window_positions[list(self.rows)]


class Marks:
    """The marks of a cache.

    They are set where a user may want to come back to: before a forward of several tokens, and behind it; behind an
    eviction, and where a fork or a file was made. An eviction forgets those before it.

    Attributes:
        floor: columns the cache had seen at its last eviction; nothing before can be restored.
        due: the next forward begins at a mark, even if it has one token.
    """

    def __init__(self, floor: int = 0) -> None:
        self.floor = floor
        self.due = True
        self._marks: tuple[Mark, ...] = ()

    def copy(self) -> Marks:
        other = Marks(self.floor)
        other._marks = self._marks
        return other

    def set(self, layers: Sequence[RaggedLayer], rows: Rows) -> None:
        """Marks this place."""
        self.due = False
        if rows.columns == 0 or self.at(rows.columns) is not None:
            return
        mark = Mark(rows.columns, None, rows.window_positions, tuple(LayerMark.of(layer) for layer in layers))
        self._marks = (*self._marks[:1], *self._marks[1:][-(KEPT - 2) :], mark)

    def at(self, columns: int) -> Mark | None:
        return next((mark for mark in self._marks if mark.columns == columns), None)

    @property
    def places(self) -> list[int]:
        """Columns at which there are marks."""
        return [mark.columns for mark in self._marks]

    def evicted(self, columns: int) -> None:
        """Forgets all: at `columns` something was evicted, or concluded about the entries."""
        self.floor, self.due, self._marks = columns, True, ()

    def taken_back(self, columns: int) -> None:
        """Forgets what is behind `columns`."""
        self._marks = tuple(mark for mark in self._marks if mark.columns <= columns)
        self.due = True

    def select(self, rows: Sequence[int]) -> None:
        """Row `i` becomes a copy of the former row `rows[i]`."""
        self._marks = tuple(
            replace(mark, rows=tuple(rows if mark.rows is None else (mark.rows[row] for row in rows)))
            for mark in self._marks
        )

