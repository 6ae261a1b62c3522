"""Numbers of simulated runs: one run's result, and rows of means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..request import RequestOutput
from ..system import System


@dataclass
class SimulationRun:
    """Everything that a simulator has done for one source.

    Attributes:
        system: in its final state.
        outputs: of all requests, in order of their ends.
        begin_s, end_s: of the first arrival and the last end, on the virtual clock.
        events: events that a step-by-step simulation would visit: arrivals, admissions, loads, chunks, decoded tokens,
            stores, ends, and parts of copies.
        decisions: of these, the events that were visited singly; all tokens of a batch count as one.
        cpu_s: processor seconds that the simulation took.
    """

    system: System
    outputs: list[RequestOutput] = field(default_factory=list)
    begin_s: float = 0.0
    end_s: float = 0.0
    events: int = 0
    decisions: int = 0
    cpu_s: float = 0.0


@dataclass(frozen=True)
class TransferSnapshot:
    """Counters of moved bytes at one moment, e.g. at the end of the warm-up.

    Attributes:
        moved: bytes of finished copies. wasted: bytes of copies that did not finish.
        unused: estimated bytes of prefetched prompts that were not used.
    """

    moved: int = 0
    wasted: int = 0
    unused: float = 0.0

    @classmethod
    def take(cls, system: System) -> TransferSnapshot:
        tiers, prefetcher = system.tiers.statistics, system.prefetcher
        unused = 0.0 if prefetcher is None else prefetcher.statistics.unused_bytes
        return cls(sum(tiers.bytes_moved.values()), sum(tiers.bytes_wasted.values()), unused)

    def until_now(self, system: System) -> tuple[int, int]:
        """Bytes moved since then, and bytes wasted: of unfinished copies and of prefetches that were not used."""
        after = TransferSnapshot.take(system)
        wasted = after.wasted - self.wasted + max(0.0, after.unused - self.unused)
        return after.moved - self.moved, round(wasted)


@dataclass(frozen=True)
class SimulationResult:
    """Numbers of one run.

    Attributes:
        makespan_s: from the first arrival to the last end. call_s: mean seconds from a call's arrival to its end.
        hit_rate: share of the fixed prompts' tokens that were on the device at admission, neither loaded for the call
            nor computed. Prefetched tokens count.
        stall_s: seconds that requests waited for loads, summed.
        bytes_moved: between tiers, by finished copies.
        bytes_wasted: of copies that did not finish, and of prefetched prompts that were not used.
        ttft_p50_s, ttft_p99_s: quantiles of the seconds from a call's arrival to its first token.
        calls: number of calls. timed_out: of these, calls without a first token.
        events, decisions, cpu_s: see `SimulationRun`.
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
class SimulationRow:
    """Means of one policy in one setting over repeats; its fields are the keys of `--json`.

    Attributes:
        ratio: speed-up over the baseline that the name ends with: of makespans, in studies of the calls' mean times.
        paper_ratio: the speed-up that the paper reports.
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


def result_of(run: SimulationRun, before: TransferSnapshot, honest: bool = True) -> SimulationResult:
    """The numbers of a run since `before`; `honest` leaves the calls of hostile clients out of times and hits."""
    calls = [output for output in run.outputs if not (honest and output.request.client.startswith("hostile"))]
    moved, wasted = before.until_now(run.system)
    page = run.system.tiers.page_size
    fixed = [output.request.fixed_tokens // page * page for output in calls]
    hits = [min(size, output.cached_tokens - output.loaded_tokens) for size, output in zip(fixed, calls, strict=True)]
    waits = [
        output.times.first_token - output.times.arrived for output in calls if output.times.first_token is not None
    ]
    ends = [output.times.finished for output in calls if output.times.finished is not None]
    return SimulationResult(
        makespan_s=max(ends, default=run.begin_s) - run.begin_s,
        call_s=statistics.fmean(map(_call_s, calls)) if calls else 0.0, hit_rate=sum(hits) / max(1, sum(fixed)),
        stall_s=sum(output.stalled_s for output in calls), bytes_moved=moved, bytes_wasted=wasted,
        ttft_p50_s=quantile(waits, 0.5), ttft_p99_s=quantile(waits, 0.99), calls=len(calls),
        timed_out=sum(output.times.first_token is None for output in calls), events=run.events, decisions=run.decisions,
        cpu_s=run.cpu_s,
    )  # fmt: skip


def row_of(
    name: str, policy: str, results: Sequence[SimulationResult], ratio: float, paper: float | None = None
) -> SimulationRow:
    """The means of several results."""
    fields = ("makespan_s", "hit_rate", "stall_s", "bytes_moved", "bytes_wasted", "ttft_p50_s", "ttft_p99_s")
    means = {field: statistics.fmean(getattr(result, field) for result in results) for field in fields}
    return SimulationRow(name, policy, ratio=ratio, paper_ratio=paper, **means)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _call_s(output: RequestOutput) -> float:
    return (output.times.finished or output.times.arrived) - output.times.arrived
