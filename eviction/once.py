"""What is computed of keys and values that nobody writes any more: once for all forks that share them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch.utils.weak import WeakTensorKeyDictionary

from .store import SegmentStore

_known: Any = WeakTensorKeyDictionary()  # by the buffer of the values; goes with it
Made = TypeVar("Made")


def once(store: SegmentStore, name: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` gives, of the entries of `store`; of a fork with the same entries perhaps what it gave before.

    Nobody may write to it. `name` says what it is, and whatever else than the entries it depends on.
    """
    # A buffer that was shared once is never written again: whoever writes takes a copy. Pages move between heads by
    # tables on the device, which are not compared here.
    if not store.shared or type(store) is not SegmentStore:
        return make()
    if store.value not in _known:
        _known[store.value] = {}
    known = _known[store.value]
    key = name, tuple(store.starts), tuple(store.lengths)
    if key not in known:
        known[key] = make()
    return known[key]


def forget() -> None:
    """All is computed anew from now on; for measurements."""
    _known.clear()
