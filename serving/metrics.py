"""Counters of the cache's tiers and of the scheduler, since each was made; read them under the cache's lock."""

from __future__ import annotations

from dataclasses import dataclass, field

from .kvcache.base import Link
from .request import FinishReason


@dataclass
class TierMetrics:
    """Counts since the tiers were made.

    Attributes:
        tokens_asked, tokens_found: tokens of the prompts that were looked up, and those that were cached in some tier.
        inserted, refused: prompts that were stored, and those that found no room.
        bytes_moved, bytes_wasted: bytes per link of finished copies, and of copies that did not finish.
        evicted_copies: copies evicted from a tier for lack of room; the data may remain in another tier.
        dropped: of these, the last copies of their data.
        copies_failed, copies_lost, copies_cancelled: transfers that ended so. A lost one could not be read back: its
            file is missing or damaged.
    """

    tokens_asked: int = 0
    tokens_found: int = 0
    inserted: int = 0
    refused: int = 0
    bytes_moved: dict[Link, int] = field(default_factory=dict)
    bytes_wasted: dict[Link, int] = field(default_factory=dict)
    evicted_copies: int = 0
    dropped: int = 0
    copies_failed: int = 0
    copies_lost: int = 0
    copies_cancelled: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the looked-up tokens that were cached; 0 before the first lookup."""
        return self.tokens_found / self.tokens_asked if self.tokens_asked else 0.0

    def moved(self, link: Link, nbytes: int, finished: bool) -> None:
        """Counts the bytes of a transfer that has ended."""
        counts = self.bytes_moved if finished else self.bytes_wasted
        counts[link] = counts.get(link, 0) + nbytes


@dataclass
class SchedulerMetrics:
    """Counts since the scheduler was made.

    Attributes:
        submitted: requests accepted. finished: requests by finish reason.
        batches: batches completed. prefill_tokens, decode_tokens: tokens computed in them.
        cached_tokens: prompt tokens of finished requests whose cached KV was used. loaded_tokens: of these, loaded to
            the device on demand. recomputed_tokens: cached below the device, but computed.
        recomputed_late: admissions that recomputed because loading would have finished later.
        recomputed_refused: admissions that recomputed because loads had been given up, or had failed or been lost.
        stalled_s: seconds that requests waited for loads.
        admissions_refused: admission attempts that found no memory.
        stores, stores_refused: payloads that were stored in the cache, and those that found no room.
        events: arrivals, admissions, loads, chunks, decoded tokens, stores and ends.
    """

    submitted: int = 0
    finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))
    batches: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    loaded_tokens: int = 0
    recomputed_late: int = 0
    recomputed_refused: int = 0
    recomputed_tokens: int = 0
    stalled_s: float = 0.0
    admissions_refused: int = 0
    stores: int = 0
    stores_refused: int = 0
    events: int = 0
