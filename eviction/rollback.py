"""Places that a cache can be taken back to exactly, whatever its policies have accumulated since.

Positions and entries know by themselves which tokens they are of. Sums do not: states that policies observe, and the
statistics of queries. They are replaced in every forward, never written to, so a mark only holds on to the old ones.

Taking tokens back, and going on from one place in two ways.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .cache_layer import RaggedLayer
from .forward_state import Rows
from .recorded import QueryStatistics

if TYPE_CHECKING:
    from .storage.segments import Places



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


def replaces_tensors(layer: Any) -> bool:
    """Whether a transformers cache layer makes new tensors at every update, so that its attributes are its state.

    State-space layers, and those that join attention and state space, write in place.
    """
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def fork_layer(layer: Any) -> Any:
    """A cache layer that continues independently of `layer`, sharing its tensors where that is safe."""
    if _is_ragged(layer):
        return layer.fork()
    return copy.copy(layer) if replaces_tensors(layer) else copy.deepcopy(layer)


class Snapshot:
    """What it takes to undo a forward that raises. Costs nothing: no tensor is copied.

    New entries stand at the ends of their segments, so the old lengths are enough for ragged layers. Transformers' own
    layers replace their tensors at every update, so their old attributes are enough.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._lengths = [layer.store.lengths if layer.store else None for layer in layers if _is_ragged(layer)]
        self._foreign = [dict(vars(layer)) for layer in layers if replaces_tensors(layer)]

    def restore(self, layers: Sequence[Any], columns: int) -> bool:
        """Puts `layers` back to `columns` columns; False if there is a layer that writes in place (state space)."""
        lengths, foreign, complete = iter(self._lengths), iter(self._foreign), True
        for layer in layers:
            if _is_ragged(layer):
                layer.rewind(next(lengths), columns)
            elif replaces_tensors(layer):
                vars(layer).clear()
                vars(layer).update(next(foreign))
            else:
                complete = False
        return complete


def take_back(layers: Sequence[Any], rows: Rows, count: int, marks: Marks, window: int, waiting: int) -> Rows:
    """Removes the newest `count` columns from `layers`, which then are as if these columns had never come.

    All or nothing as far as ragged layers are concerned.

    Args:
        marks: those of the cache; left to the caller.
        window: how many of the last queries the policies read.
        waiting: so many of the newest columns have not been observed yet.

    Returns:
        The rows as they are then; `stored` is left to the caller.
    Raises:
        ValueError: something was evicted since, there are not so many columns, or what was accumulated over them cannot
            be told apart.
    """
    before = rows.columns - count
    if before < 0:
        raise ValueError(f"cannot take back {count} columns of {rows.columns}")
    if count and before < marks.floor:
        raise ValueError(
            f"entries were evicted in the meantime, at {marks.floor} columns: cannot go back to {before}; fork() the "
            "cache before the part that you want to undo (and let no model inside evict() draft for another one)"
        )
    ragged = [layer for layer in layers if _is_ragged(layer)]
    rows = rows.copy()
    gone = rows.drop(count)
    mark = marks.at(before) if count else None
    if count > waiting and mark is None:
        accumulated = ragged[0].observers.accumulated
        if not accumulated and not rows.remembers(window):
            accumulated = f"the window of the last {window} queries"
        if accumulated:
            places = ", ".join(map(str, marks.places)) or "nowhere"
            raise ValueError(
                f"cannot go back to {before} columns: {accumulated} can be restored only where an input began or "
                f"ended (at {places}); go back to one of these, or fork() before the part that you want to undo"
            )
    for layer in layers:
        if not _is_ragged(layer) and (count or getattr(layer, "record_past", False)):
            layer.crop(-count)  # 0 trims what a recording layer holds; older transformers would empty the layer
    for layer in ragged:
        store = layer.store
        if store is not None and count:
            less = [n for n in gone for _ in range(store.num_kv_heads)]
            # New entries stand at the ends of their segments, and nothing was evicted since.
            layer.rewind([n - k for n, k in zip(store.lengths, less, strict=True)], rows.columns)
    if mark is not None:
        mark.restore(ragged, rows)
    return rows


def _is_ragged(layer: Any) -> bool:
    return isinstance(layer, RaggedLayer)
