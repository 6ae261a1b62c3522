"""What the caches of lm-eval's requests held, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...eviction import RaggedCache


@dataclass
class Meter:
    """Sums over the contexts that were compressed.

    Attributes:
        contexts: rows counted.
        entries: entries they held after the compression, in all layers and heads.
        full_entries: what a cache that evicts nothing would have held.
        bytes: bytes allocated for the entries.
        peak_bytes: the most bytes that one call's cache, a batch, held at any time.
        tokens: tokens of the contexts.
    """

    contexts: int = 0
    entries: int = 0
    full_entries: int = 0
    bytes: int = 0
    peak_bytes: int = 0
    tokens: int = 0

    def compressed(self, cache: RaggedCache, lengths: list[int]) -> None:
        """Counts a cache right after its contexts were read and compressed.

        Args:
            lengths: the contexts' real tokens, one number a row.
        """
        report = cache.report()
        self.contexts += len(lengths)
        self.tokens += sum(lengths)
        self.entries += report.entries
        self.full_entries += report.full_entries
        self.bytes += report.bytes
        self.seen(cache)

    def full(self, cache: RaggedCache, lengths: list[int]) -> None:
        """Counts contexts that were read together with what follows them, so that nothing could be counted between.

        Args:
            cache: of the last of them, which evicts nothing: it says what an entry takes.
            lengths: the contexts' real tokens.
        """
        report = cache.report()
        heads = report.lengths.shape[1] * report.lengths.shape[2]
        entries = sum(lengths) * heads
        self.contexts += len(lengths)
        self.tokens += sum(lengths)
        self.entries += entries
        self.full_entries += entries
        self.bytes += round(entries * report.bytes / max(1, report.entries))
        self.seen(cache)

    def seen(self, cache: RaggedCache) -> None:
        """Notes the peak of a cache that has been used."""
        self.peak_bytes = max(self.peak_bytes, cache.report().peak_bytes)

    def summary(self) -> dict[str, Any]:
        """Means over the contexts by name: `contexts, context_tokens, entries, bytes, kept_share`; and `peak_bytes`."""
        count = max(1, self.contexts)
        return {
            "contexts": self.contexts,
            "context_tokens": self.tokens / count,
            "entries": self.entries / count,
            "bytes": self.bytes / count,
            "kept_share": self.entries / self.full_entries if self.full_entries else 1.0,
            "peak_bytes": self.peak_bytes,
        }
