"""Counters of a scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import RequestOutput


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
