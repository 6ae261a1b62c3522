"""What the tiers have done so far, in numbers.

What a scheduler has done so far, in numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .request import RequestOutput

if TYPE_CHECKING:
    from .kvcache.base import Link


@dataclass
class TierMetrics:
    """Counts since the tiers were made.

    Attributes:
        tokens_asked, tokens_found: of the prompts opened, and how many of them the tree had.
        inserted, refused: prompts stored, and those there was no room for.
        bytes_moved, bytes_wasted: by link, of copies that were finished, and of those that were not.
        evicted_copies: copies that left a tier because others needed the room; the data may lie in another tier.
        dropped: of these, the ones that were the last.
        copies_failed, copies_lost, copies_cancelled: copies that ended so. A lost one could not be read back: its file
            is missing or damaged.
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
        """Share of the tokens asked for that were found; 0 before anything was asked for."""
        return self.tokens_found / self.tokens_asked if self.tokens_asked else 0.0

    def moved(self, link: Link, nbytes: int, finished: bool) -> None:
        counts = self.bytes_moved if finished else self.bytes_wasted
        counts[link] = counts.get(link, 0) + nbytes


@dataclass
class SchedulerMetrics:
    """Counts since the scheduler was made.

    Attributes:
        submitted: requests taken; `ended`: by outcome.
        batches, prefilled, decoded: pieces of work, and tokens computed in them.
        cached_tokens, loaded_tokens: of prompts, used from the tree, and of these brought to the device on demand.
        recomputed_late, recomputed_refused: requests that computed what lay below the device: the load would have
            ended later, or it was given up, failed or lost. `recomputed_tokens`: of them.
        stalled_s: seconds that requests waited for copies.
        refusals: how often a request found no room.
        stores, stores_refused: KV that became the tree's, and that it had no room for.
        events: arrivals, admissions, loads, chunks, tokens decoded, stores and ends.
    """

    submitted: int = 0
    ended: dict[RequestOutput, int] = field(default_factory=lambda: dict.fromkeys(RequestOutput, 0))
    batches: int = 0
    prefilled: int = 0
    decoded: int = 0
    cached_tokens: int = 0
    loaded_tokens: int = 0
    recomputed_late: int = 0
    recomputed_refused: int = 0
    recomputed_tokens: int = 0
    stalled_s: float = 0.0
    refusals: int = 0
    stores: int = 0
    stores_refused: int = 0
    events: int = 0
