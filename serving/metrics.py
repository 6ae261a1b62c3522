"""Counters of the scheduler: since it was made, and over the last minute."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

from .request import FinishReason

SAMPLE_S, MAX_SAMPLES = 1.0, 60  # seconds between two samples of the counters, and samples that are kept


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


@dataclass(frozen=True)
class Interval:
    """Counts between two samples.

    Attributes:
        seconds: its length. ended_s: seconds since its end.
        prefill_tokens, decode_tokens: computed. stalled_s: seconds that requests waited for loads.
        asked_tokens, found_tokens: of the prompts that were looked up, and of these in the cache.
        finished: requests that ended.
    """

    seconds: float
    ended_s: float
    prefill_tokens: int
    decode_tokens: int
    stalled_s: float
    asked_tokens: int
    found_tokens: int
    finished: int


@dataclass(frozen=True)
class Recent:
    """The last minute, or the time since the scheduler was made.

    Attributes:
        total: all of it. intervals: its parts, oldest first, each of about a second or as long as a step took.
    """

    total: Interval
    intervals: list[Interval]


_Sample = tuple[float, int, int, float, int, int, int]  # the time, then the counts of an `Interval` in their order


class RecentCounts:
    """Samples of the counters, one a second at most, for the last minute. Used under the cache's lock."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=MAX_SAMPLES + 1)
        self._due = -float("inf")

    def sample(self, now: float, metrics: SchedulerMetrics, asked_tokens: int, found_tokens: int) -> None:
        """Called as often as something may have changed."""
        if self._samples and now < self._samples[-1][0]:
            self._samples.clear()  # the clock was set back
        elif now < self._due:
            return
        self._due = now + SAMPLE_S
        counts = metrics.prefill_tokens, metrics.decode_tokens, metrics.stalled_s, asked_tokens, found_tokens
        self._samples.append((now, *counts, sum(metrics.finished.values())))

    def summary(self, now: float) -> Recent:
        """The samples of the last minute before `now`, as differences."""
        oldest = now - SAMPLE_S * (MAX_SAMPLES + 1)
        samples = [each for each in self._samples if oldest <= each[0] <= now]
        if len(samples) < 2:
            return Recent(Interval(0.0, 0.0, 0, 0, 0.0, 0, 0, 0), [])
        pairs = pairwise(samples)
        return Recent(_between(samples[0], samples[-1], now), [_between(*pair, now) for pair in pairs])


def _between(before: _Sample, after: _Sample, now: float) -> Interval:
    seconds, prefill, decode, stalled, asked, found, finished = (b - a for a, b in zip(before, after, strict=True))
    return Interval(seconds, now - after[0], int(prefill), int(decode), stalled, int(asked), int(found), int(finished))
