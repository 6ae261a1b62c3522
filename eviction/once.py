"""What is computed of keys and values that nobody writes any more: once for all forks that share them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .store import SegmentStore

_known = WeakTensorKeyDictionary()  # by the buffer of the values; goes with it


def once(store: SegmentStore, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` gives, of the values of `store` alone; of a fork with the same entries perhaps what it gave before.

    Nobody may write to it.
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
