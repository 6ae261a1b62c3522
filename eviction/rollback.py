"""Taking tokens back, and going on from one place in two ways."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .layer import RaggedLayer
from .rows import Rows
from .store import SegmentStore


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


def take_back(layers: Sequence[Any], rows: Rows, count: int) -> Rows:
    """Removes the newest `count` columns from `layers`; all or nothing as far as ragged layers are concerned.

    Returns:
        The rows as they are then; `stored` is left to the caller.
    Raises:
        ValueError: entries of these tokens were evicted, or there are not so many columns.
    """
    if count > rows.columns:
        raise ValueError(f"cannot take back {count} columns of {rows.columns}")
    rows = rows.copy()
    gone = rows.drop(count)
    ragged = [layer for layer in layers if _is_ragged(layer)]
    lengths = [_shortened(layer.store, gone, rows.tokens) if layer.store else None for layer in ragged]
    for layer in layers:
        if not _is_ragged(layer) and (count or getattr(layer, "record_past", False)):
            layer.crop(-count)  # 0 trims what a recording layer holds; older transformers would empty the layer
    for layer, shorter in zip(ragged, lengths, strict=True):
        layer.rewind(shorter, rows.columns)
    return rows


def _shortened(store: SegmentStore, gone: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """The lengths of a layer's segments without the newest tokens.

    Args:
        gone: how many of its newest real tokens each row loses.
        tokens: how many real tokens each row has left then.

    Raises:
        ValueError: some of these tokens' entries were evicted.
    """
    heads = range(store.num_kv_heads)
    removed = [count for count in gone for _ in heads]
    expected = [count for count in tokens for _ in heads]
    lengths = [n - less for n, less in zip(store.lengths, removed, strict=True)]
    for start, length, less, position in zip(store.starts, lengths, removed, expected, strict=True):
        # Positions ascend: if the oldest of the newest tokens is at its place, so are the ones behind it.
        if less and (length < 0 or int(store.position[start + length]) != position):
            raise ValueError(
                "entries of the tokens to take back were evicted in the meantime; fork() the cache before the part "
                "that you want to undo"
            )
    return lengths


def _is_ragged(layer: Any) -> bool:
    return isinstance(layer, RaggedLayer)
