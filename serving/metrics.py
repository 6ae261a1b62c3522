"""Counters of the scheduler since it was made."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import FinishReason


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
        waits_for_pages: waits of requests for pages that another request computed.
        predictions_failed: updates of predictions and prefetches that failed with an error, which is logged.
        preemptions: requests that gave up their memory for others, and were computed anew later.
        stalled_s: seconds that requests waited for loads.
        admissions_refused: admission attempts that found no memory.
        stores, stores_refused: payloads that were stored in the cache, and those that found no room.
        stores_failed: payloads that were not stored because of an error, which is logged; the request continued.
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
    waits_for_pages: int = 0
    predictions_failed: int = 0
    preemptions: int = 0
    stalled_s: float = 0.0
    admissions_refused: int = 0
    stores: int = 0
    stores_refused: int = 0
    stores_failed: int = 0
    events: int = 0
