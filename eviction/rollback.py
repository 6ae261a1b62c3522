"""Taking tokens back, and going on from one place in two ways."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .layer import RaggedLayer
from .marks import Marks
from .rows import Rows


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
