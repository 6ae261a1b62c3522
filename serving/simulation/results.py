"""What a simulated run comes to: the numbers of a row, and rows of one policy against another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..scheduling.request import Ended
from ..systems import System
from .driver import Run


@dataclass(frozen=True)
class Outcome:
    """One run in numbers.

    Attributes:
        makespan_s: from the first arrival to the last end. call_s: mean seconds from a call's arrival to its end.
        hit_rate: of the tokens of fixed prompts asked for, the share that lay on the device when the request came up,
            neither loaded for it nor computed. What a prefetch has brought counts.
        stall_s: seconds that requests waited for copies, in all.
        bytes_moved: between tiers, whole copies. bytes_wasted: of copies that were given up, and of prefetched prompts
            that nobody used.
        ttft_p50_s, ttft_p99_s: from a call's arrival to its first token.
        timed_out: requests that were not answered.
        events, decisions, cpu_s: see `Run`.
    """

    makespan_s: float
    call_s: float
    hit_rate: float
    stall_s: float
    bytes_moved: float
    bytes_wasted: float
    ttft_p50_s: float
    ttft_p99_s: float
    calls: int
    timed_out: int
    events: int
    decisions: int
    cpu_s: float


@dataclass(frozen=True)
class Row:
    """One policy in one setting, means over repeats; what `--json` writes.

    Attributes:
        ratio: how many times as fast as the policy that the name ends with: of the makespans, in studies of the calls'
            mean times. paper_ratio: what the paper reports for it.
    """

    name: str
    policy: str
    makespan_s: float
    ratio: float
    hit_rate: float
    stall_s: float
    bytes_moved: float
    bytes_wasted: float
    ttft_p50_s: float
    ttft_p99_s: float
    paper_ratio: float | None = None


@dataclass(frozen=True)
class Before:
    """The counters at the beginning of what is measured."""

    moved: int = 0
    wasted: int = 0
    unused: float = 0.0

    @classmethod
    def read(cls, system: System) -> Before:
        tiers, prefetcher = system.tiers.statistics, system.prefetcher
        unused = 0.0 if prefetcher is None else prefetcher.statistics.unused_bytes
        return cls(sum(tiers.bytes_moved.values()), sum(tiers.bytes_wasted.values()), unused)

    def until(self, system: System) -> tuple[int, int]:
        """Bytes that have been moved since, and that were for nothing: copies given up, prefetches that nobody used."""
        after = Before.read(system)
        wasted = after.wasted - self.wasted + max(0.0, after.unused - self.unused)
        return after.moved - self.moved, round(wasted)


def outcome_of(run: Run, before: Before, honest: bool = True) -> Outcome:
    """The numbers of a run.

    Args:
        before: counters at its beginning, e.g. after the warm-up.
        honest: calls of hostile clients are left out of times and hits.
    """
    calls = [ended for ended in run.ended if not (honest and ended.request.client.startswith("hostile"))]
    moved, wasted = before.until(run.system)
    page = run.system.tiers.tree.page_size
    fixed = [ended.request.fixed_tokens // page * page for ended in calls]
    hits = [min(size, ended.cached_tokens - ended.loaded_tokens) for size, ended in zip(fixed, calls, strict=True)]
    waits = [ended.times.first_token - ended.times.arrived for ended in calls if ended.times.first_token is not None]
    ends = [ended.times.ended for ended in calls if ended.times.ended is not None]
    return Outcome(
        makespan_s=max(ends, default=run.begin_s) - run.begin_s,
        call_s=statistics.fmean(map(_seconds, calls)) if calls else 0.0,
        hit_rate=sum(hits) / max(1, sum(fixed)),
        stall_s=sum(ended.stalled_s for ended in calls),
        bytes_moved=moved,
        bytes_wasted=wasted,
        ttft_p50_s=quantile(waits, 0.5),
        ttft_p99_s=quantile(waits, 0.99),
        calls=len(calls),
        timed_out=sum(ended.times.first_token is None for ended in calls),
        events=run.events,
        decisions=run.decisions,
        cpu_s=run.cpu_s,
    )


def row_of(name: str, policy: str, outcomes: Sequence[Outcome], ratio: float, paper: float | None = None) -> Row:
    """Means over repeats."""

    def mean(field: str) -> float:
        return statistics.fmean(getattr(outcome, field) for outcome in outcomes)

    fields = ("hit_rate", "stall_s", "bytes_moved", "bytes_wasted", "ttft_p50_s", "ttft_p99_s")
    values = {field: mean(field) for field in fields}
    return Row(name, policy, mean("makespan_s"), ratio, **values, paper_ratio=paper)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that `share` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _seconds(ended: Ended) -> float:
    return (ended.times.ended or ended.times.arrived) - ended.times.arrived
