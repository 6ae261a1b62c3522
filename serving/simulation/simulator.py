"""What a simulated run comes to: the numbers of a row, and rows of one policy against another.

Runs set-ups, policies and traces: builds the server, warms it up, lets the clients call, and counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..kvcache.base import PhantomPayload
from ..kvcache.eviction_policy import AllocStatus, LinearCosts
from ..request import Ended
from ..scheduler.config import SchedulerConfig
from ..system import System
from .clock import VirtualClock
from .cost_model import Batch, Links, fit
from .driver import ClientCalls, Driver, Machine, Run, TracedCalls, WarmUp
from .workload import Client, Workload, clients_of

if TYPE_CHECKING:
    from .driver import Ask, Timeline
    from .trace import Trace, TraceRecorder


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
    page = run.system.tiers.page_size
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


def simulate(
    machine: Machine,
    workload: Workload,
    policy: str,
    seed: int = 0,
    *,
    warm: bool = True,
    recorder: TraceRecorder | None = None,
    timeline: Timeline | None = None,
) -> Outcome:
    """One run of `policy` (`system_names`).

    Args:
        warm: every agent's fixed prompt is asked for once before anything is counted.
        recorder, timeline: see `Driver`; the timeline begins with the end of the warm-up.
    """
    prompts = prompts_of(machine, workload, seed, warm) if policy == "belady" else None
    return _run(machine, workload, policy, seed, warm, prompts, recorder, timeline)[0]


def prompts_of(machine: Machine, workload: Workload, seed: int, warm: bool = True) -> list[np.ndarray]:
    """The prompts of a workload in the order in which a server with least-recently-used eviction gets them.

    The order of a single workflow depends on no policy; that of several does, and an oracle that was told it is then
    only nearly one.
    """
    return _run(machine, workload, "lru", seed, warm, None, None, None)[1]


def replay(
    machine: Machine,
    trace: Trace,
    policy: str,
    *,
    closed: bool = True,
    recorder: TraceRecorder | None = None,
    timeline: Timeline | None = None,
) -> Outcome:
    """The calls of a trace on `machine`; see `TracedCalls`."""
    prompts = [call.prompt for call in trace.calls] if policy == "belady" else None
    system, clock = machine.build(policy, prompts)
    _store(trace, system, clock, machine.copy_parts)
    before = Before.read(system)
    run = Driver(machine, system, clock, recorder, timeline).run(TracedCalls(trace, closed))
    system.scheduler.check()
    return outcome_of(run, before)


def _store(trace: Trace, system: System, clock: VirtualClock, parts: int) -> None:
    """Puts the prompts into the tiers that were there before the first call."""
    tiers = system.tiers
    for agent, prompt, nbytes in trace.stored:
        if system.prefetcher is not None:
            system.prefetcher.register(agent, prompt)
        room = AllocStatus.PENDING
        while room is AllocStatus.PENDING:
            with tiers.open(prompt) as handle:
                new = tiers.whole_pages(len(prompt)) - handle.length
                payload = PhantomPayload(new, nbytes * new // len(prompt), parts) if new else None
                room = tiers.store(handle, prompt, payload, agent, len(prompt))
            due = tiers.next_time()
            if room is AllocStatus.PENDING and due is not None:
                clock.advance_to(due)
    while (due := tiers.next_time()) is not None:
        clock.advance_to(due)
        tiers.poll()


def machine_of(trace: Trace) -> Machine:
    """The machine that a trace was recorded on, with rates that are fitted to its batches.

    Raises:
        ValueError: the trace does not say how large the pools were, or has too few batches.
    """
    about = trace.about
    if not isinstance(about.get("device_bytes"), int):
        raise ValueError(f"the trace does not say `device_bytes` in `about`: it says {', '.join(about) or 'nothing'}")
    links = Links(about.get("link_bytes_per_s", 0.0), about.get("disk_bytes_per_s", 0.0), about.get("latency_s", 0.0))
    limits = SchedulerConfig(**about.get("limits", {}))
    believed = about.get("believed")
    return Machine(
        fit(trace.batches, links),
        links,
        about["device_bytes"],
        about.get("host_bytes", 0),
        about.get("disk_bytes", 0),
        trace.bytes_per_token,
        trace.page_size,
        about.get("copy_parts", 4),
        limits,
        believed=LinearCosts(believed[0], (believed[1], believed[2]), believed[3]) if believed else None,
    )


def answer_seconds(machine: Machine) -> Callable[[Client], float]:
    """What clients tell the server of a call's duration: an undisturbed one of mean length, with its prompt cached."""

    def seconds(client: Client) -> float:
        workload = client.workload
        cached = round(workload.fixed_tokens.mean)
        prompt = cached + max(1, round(workload.dynamic_tokens.mean))
        steps = max(1, round(workload.output_tokens.mean))
        first = machine.costs.batch_s(Batch(chunks=((cached, prompt),)))
        return first + machine.costs.batch_s(Batch(contexts=(prompt,), steps=steps))

    return seconds


class _Listing(ClientCalls):
    """Notes the prompts in the order of their submission."""

    prompts: list[np.ndarray]

    def submitting(self, ask: Ask) -> None:
        super().submitting(ask)
        self.prompts.append(np.asarray(ask.request.prompt))


def _run(
    machine: Machine,
    workload: Workload,
    policy: str,
    seed: int,
    warm: bool,
    prompts: Sequence[np.ndarray] | None,
    recorder: TraceRecorder | None,
    timeline: Timeline | None,
) -> tuple[Outcome, list[np.ndarray]]:
    system, clock = machine.build(policy, prompts)
    clients = clients_of(workload, seed)
    asked: list[np.ndarray] = []
    before = Before()
    if warm:
        run = Driver(machine, system, clock, recorder).run(WarmUp(clients))
        asked += [np.asarray(ended.request.prompt) for ended in run.ended]
        before = Before.read(run.system)
    source = _Listing(clients, answer_seconds(machine))
    source.prompts = asked
    if timeline is not None:
        timeline.begin(system, [agent for client in clients for agent in client.agents], clock.now)
    run = Driver(machine, system, clock, recorder, timeline).run(source)
    system.scheduler.check()
    outcome = outcome_of(run, before)
    return outcome, asked
