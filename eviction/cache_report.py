"""Statistics of a cache: entries and bytes stored, and evictions so far (`Report`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .storage.segment_store import SegmentStore


@dataclass(frozen=True)
class Report:
    """The state of a cache; only the layers that evict are counted.

    In tensor parallel a report counts the heads in this process, except for `peak_entries` and `evicted_entries`.

    Attributes:
        entries: entries stored now, in all rows, layers and heads.
        bytes: bytes allocated for them: keys, values, positions, per-entry state and free slots. Storage shared with a
            fork is counted in full on both sides.
        kept_bytes: the part of `bytes` that entries occupy.
        peak_entries, peak_bytes: maxima so far; during compaction one layer is stored twice, which is counted.
        full_entries: entries of a cache that evicts nothing: real tokens times layers times heads.
        kept_share: `entries / full_entries`.
        lengths: int64 `(batch, layers, heads)`: entries of every segment.
        layer_indices: the decoder layers of `lengths`.
        evictions: forwards and explicit compressions that evicted something.
        evicted_entries: entries evicted so far.
        other_bytes: bytes of the layers that do not evict, by the kind of their cache, e.g.
            `{"DynamicSlidingWindowLayer": …}`: sliding windows, states, and images that text attends to by layers of
            their own ("DynamicLayer", cross-attention as in Mllama), which are kept whole.
    """

    entries: int
    bytes: int
    kept_bytes: int
    peak_entries: int
    peak_bytes: int
    full_entries: int
    kept_share: float
    lengths: torch.Tensor
    layer_indices: tuple[int, ...]
    evictions: int
    evicted_entries: int
    other_bytes: dict[str, int] = field(default_factory=dict)


class CacheCounters:
    """Counters of a cache's past; their names are part of the file format (`serialization`)."""

    def __init__(self) -> None:
        self.peak_entries = self.peak_bytes = self.evictions = self.evicted_entries = 0

    def record_size(self, entries: int, nbytes: int) -> None:
        """Records the current size, for the peaks."""
        self.peak_entries = max(self.peak_entries, entries)
        self.peak_bytes = max(self.peak_bytes, nbytes)

    def record_eviction(self, entries: int) -> None:
        """Records an eviction of `entries` entries; 0 is not counted."""
        self.evictions += entries > 0
        self.evicted_entries += entries

    def report(
        self, stores: list[SegmentStore], tokens: int, lengths: torch.Tensor, layer_indices: tuple[int, ...],
        others: list[Any],
    ) -> Report:  # fmt: skip
        """The report of a cache with these stores whose rows have seen `tokens` real tokens together.

        Args:
            others: transformers' cache layers of the other layers.
        """
        entries = sum(store.entries for store in stores)
        full = tokens * sum(store.num_kv_heads for store in stores)
        return Report(
            entries=entries, bytes=sum(store.nbytes for store in stores),
            kept_bytes=sum(store.entries * store.entry_bytes for store in stores), peak_entries=self.peak_entries,
            peak_bytes=self.peak_bytes, full_entries=full, kept_share=entries / full if full else 1.0, lengths=lengths,
            layer_indices=layer_indices, evictions=self.evictions, evicted_entries=self.evicted_entries,
            other_bytes=_bytes_by_kind(others),
        )  # fmt: skip


def _bytes_by_kind(layers: list[Any]) -> dict[str, int]:
    """Bytes of the tensors of transformers' cache layers, by class; classes without any are left out."""
    found: dict[str, int] = {}
    for layer in layers:
        size = sum(tensor.nbytes for value in vars(layer).values() for tensor in _tensors(value))
        if size:
            found[type(layer).__name__] = found.get(type(layer).__name__, 0) + size
    return found


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in an attribute of a cache layer: itself, or those of a list or dict of states."""
    if isinstance(value, dict):
        value = list(value.values())
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, torch.Tensor)]
