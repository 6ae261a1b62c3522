"""Removing the newest tokens of a cache (`crop_layers`), and the points to which it can be returned exactly.

Positions and entries identify their tokens, so they can be removed token by token. Sums over tokens cannot: the states
that policies observe, and the statistics of queries. These tensors are replaced in every forward, never written to, so
a rollback point only holds references to the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from ..retention.decoder_layers import copy_cache_layer, replaces_tensors
from .cache_layer import RaggedLayer
from .forward_state import RollbackConfig, SequenceState
from .recorded import QueryStatistics
from .storage.segment_store import EntryLocations


@dataclass(frozen=True)
class LayerRollbackPoint:
    """The data that a layer had recorded at a rollback point, and the locations of its entries then."""

    locations: EntryLocations
    lengths: list[int]
    states: dict[str, torch.Tensor]
    statistics: QueryStatistics | None
    window: torch.Tensor | None

    @classmethod
    def of(cls, layer: RaggedLayer) -> LayerRollbackPoint:
        store = layer.store
        assert store is not None, "rollback points are set in caches that have seen tokens"
        # In these buffers `append` writes only after the current entries.
        states = {name: store.buffers[name] for name in layer.observers.observed_keys}
        return cls(store.locations(), store.lengths, states, layer.statistics, layer.share_window())

    def restore(self, layer: RaggedLayer, rows: Sequence[int] | None) -> None:
        """Restores `layer`, whose segments have been shortened to the entries of this point.

        Args:
            rows: for each current row the row at this point that it continues; None if they are the same.
        """
        store = layer.store
        assert store is not None, "the layer had entries at this point"
        order = range(len(self.lengths))
        if rows is not None:
            heads = range(store.num_kv_heads)
            order = [row * store.num_kv_heads + head for row in rows for head in heads]
        assert store.lengths == [self.lengths[segment] for segment in order], "nothing was evicted since"
        if self.states:
            old = self.locations.index(order, store.lengths)
            new = store.locations().index(range(len(store.lengths)), store.lengths)
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
class RollbackPoint:
    """A point in a cache's past to which it can be returned.

    Attributes:
        columns: columns the cache had seen.
        rows: for each current row the row at this point that it continues; None if they are the same.
        window_positions: as in `SequenceState`, of the rows at this point.
        layers: one per layer that evicts.
    """

    columns: int
    rows: tuple[int, ...] | None
    window_positions: torch.Tensor | None
    layers: tuple[LayerRollbackPoint, ...]

    def restore(self, layers: Sequence[RaggedLayer], rows: SequenceState) -> None:
        """Restores what layers and rows, which have been shortened to `columns`, had recorded at this point."""
        for point, layer in zip(self.layers, layers, strict=True):
            point.restore(layer, self.rows)
        rows.window_positions = self.window_positions
        if self.rows is not None and self.window_positions is not None:
            rows.window_positions = self.window_positions[list(self.rows)]


class RollbackPoints:
    """The rollback points of a cache.

    They are set before and after a forward of several tokens, after an eviction, and where a fork or a file was made:
    the points to which a user may want to return. An eviction discards those before it.

    Attributes:
        floor: columns the cache had seen at its last eviction; earlier points cannot be restored.
        due: the next forward sets a point first, even if it has one token.
        limit: points that are kept: the oldest since the last eviction and the newest ones.
    """

    def __init__(self, floor: int = 0, limit: int = RollbackConfig.max_points) -> None:
        self.floor = floor
        self.due = True
        self.limit = limit
        self._points: tuple[RollbackPoint, ...] = ()

    def copy(self) -> RollbackPoints:
        other = RollbackPoints(self.floor, self.limit)
        other._points = self._points
        return other

    def add(self, layers: Sequence[RaggedLayer], rows: SequenceState) -> None:
        """Sets a point here, unless there is one or the cache is empty."""
        self.due = False
        if rows.columns == 0 or self.at(rows.columns) is not None:
            return
        states = tuple(LayerRollbackPoint.of(layer) for layer in layers)
        point = RollbackPoint(rows.columns, None, rows.window_positions, states)
        self._points = (*self._points[:1], *self._points[1:][-(self.limit - 2) :], point)

    def at(self, columns: int) -> RollbackPoint | None:
        return next((point for point in self._points if point.columns == columns), None)

    @property
    def columns(self) -> list[int]:
        """Columns at which there are points."""
        return [point.columns for point in self._points]

    def evicted(self, columns: int) -> None:
        """Discards all points: at `columns` entries were evicted, or a policy updated its states."""
        self.floor, self.due, self._points = columns, True, ()

    def cropped(self, columns: int) -> None:
        """Discards the points after `columns`."""
        self._points = tuple(point for point in self._points if point.columns <= columns)
        self.due = True

    def select(self, rows: Sequence[int]) -> None:
        """Row `i` becomes a copy of the former row `rows[i]`."""
        self._points = tuple(
            replace(point, rows=tuple(rows if point.rows is None else (point.rows[row] for row in rows)))
            for point in self._points
        )


def fork_layer(layer: Any) -> Any:
    """A cache layer that continues independently of `layer`, sharing its tensors where that is safe."""
    return layer.fork() if isinstance(layer, RaggedLayer) else copy_cache_layer(layer)


class ForwardSnapshot:
    """The state needed to undo a forward that raises; no tensor is copied.

    New entries are at the ends of their segments, so the old lengths are enough for ragged layers. Transformers' own
    layers replace their tensors at every update, so their old attributes are enough.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        ragged = [layer for layer in layers if isinstance(layer, RaggedLayer)]
        self._lengths = [layer.store.lengths if layer.store else None for layer in ragged]
        self._attributes = [dict(vars(layer)) for layer in layers if replaces_tensors(layer)]

    def restore(self, layers: Sequence[Any], columns: int) -> bool:
        """Returns `layers` to `columns` columns; False if a layer writes in place (state space) and cannot be."""
        lengths, attributes, complete = iter(self._lengths), iter(self._attributes), True
        for layer in layers:
            if isinstance(layer, RaggedLayer):
                layer.rewind(next(lengths), columns)
            elif replaces_tensors(layer):
                vars(layer).clear()
                vars(layer).update(next(attributes))
            else:
                complete = False
        return complete


def crop_layers(
    layers: Sequence[Any], rows: SequenceState, count: int, points: RollbackPoints, window: int, deferred: int
) -> SequenceState:
    """Removes the newest `count` columns from `layers`, which then are as if these columns had never been read.

    If it raises, ragged layers are unchanged.

    Args:
        points: those of the cache; updating them is left to the caller.
        window: number of the last queries that the policies read.
        deferred: number of the newest columns that have not been observed yet.

    Returns:
        The state of the rows afterwards; `stored` is left to the caller.
    Raises:
        ValueError: entries were evicted since, there are fewer columns, or a sum was accumulated over them and there is
            no rollback point.
    """
    before = rows.columns - count
    if before < 0:
        raise ValueError(f"cannot remove {count} of {rows.columns} columns")
    if count and before < points.floor:
        raise ValueError(
            f"entries were evicted in the meantime, at {points.floor} columns: cannot go back to {before}; fork() the "
            "cache before the part that you want to undo (and let no model inside evict() draft for another one)"
        )
    ragged = [layer for layer in layers if isinstance(layer, RaggedLayer)]
    rows = rows.copy()
    removed = rows.remove_columns(count)
    point = points.at(before) if count else None
    if count > deferred and point is None:
        accumulated = ragged[0].observers.accumulated
        if not accumulated and not rows.has_window(window):
            accumulated = f"the window of the last {window} queries"
        if accumulated:
            known = ", ".join(map(str, points.columns)) or "nowhere"
            raise ValueError(
                f"cannot go back to {before} columns: {accumulated} can be restored only where an input began or "
                f"ended (at {known}); go back to one of these, or fork() before the part that you want to undo"
            )
    for layer in layers:
        if type(layer) is DynamicLayer:
            continue  # cross-attention: its columns are an image's, not the tokens'
        if not isinstance(layer, RaggedLayer) and (count or getattr(layer, "record_past", False)):
            layer.crop(-count)  # 0 trims a recording layer; older transformers would empty other layers
    for layer in ragged:
        store = layer.store
        if store is not None and count:
            less = [n for n in removed for _ in range(store.num_kv_heads)]
            # New entries are at the ends of their segments, and nothing was evicted since.
            layer.rewind([n - k for n, k in zip(store.lengths, less, strict=True)], rows.columns)
    if point is not None:
        point.restore(ragged, rows)
    return rows
