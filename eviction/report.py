"""What a cache holds and what it has evicted, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .storage.segments import SegmentStore


@dataclass(frozen=True)
class Report:
    """The state of a cache; only the layers that evict are counted.

    Attributes:
        entries: entries stored now, in all rows, layers and heads.
        bytes: bytes allocated for them: keys, values, positions, per-entry state and free room. Storage shared with a
            fork is counted in full on both sides.
        kept_bytes: the part of `bytes` that entries fill.
        peak_entries, peak_bytes: the most there were at any time; compaction holds one layer twice and is counted.
        full_entries: what a cache that evicts nothing would hold: real tokens times layers times heads.
        kept_share: `entries / full_entries`.
        lengths: int64 `(batch, layers, heads)`: entries of every segment.
        layer_indices: the decoder layers that `lengths` is about.
        evictions: forwards and explicit compressions that evicted something.
        evicted_entries: entries evicted so far.
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


class Meter:
    """The counters of a cache that its present contents do not show."""

    def __init__(self) -> None:
        self.peak_entries = self.peak_bytes = self.evictions = self.evicted_entries = 0

    def note(self, entries: int, nbytes: int) -> None:
        """Notes what is held at this moment."""
        self.peak_entries = max(self.peak_entries, entries)
        self.peak_bytes = max(self.peak_bytes, nbytes)

    def evicted(self, entries: int) -> None:
        """Notes an eviction of `entries` entries."""
        self.evictions += entries > 0
        self.evicted_entries += entries

    def report(
        self, stores: list[SegmentStore], tokens: int, lengths: torch.Tensor, layer_indices: tuple[int, ...]
    ) -> Report:
        """The report of a cache with these stores whose rows have seen `tokens` real tokens together."""
        entries = sum(store.entries for store in stores)
        full = tokens * sum(store.num_kv_heads for store in stores)
        return Report(
            entries=entries,
            bytes=sum(store.nbytes for store in stores),
            kept_bytes=sum(store.entries * store.entry_bytes for store in stores),
            peak_entries=self.peak_entries,
            peak_bytes=self.peak_bytes,
            full_entries=full,
            kept_share=entries / full if full else 1.0,
            lengths=lengths,
            layer_indices=layer_indices,
            evictions=self.evictions,
            evicted_entries=self.evicted_entries,
        )
