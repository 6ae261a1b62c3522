"""The simulator: takes the place of an engine, and lets time pass on a virtual clock instead of computing.

Tree, tiers, eviction policies, prefetcher, scheduler and step graph are the real ones, over pools without data. Only
the clock, the seconds of a batch and the arrivals are simulated. `simulate` runs a generated workload, `replay` a
trace.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, cast

import numpy as np

from tenure.checked import NotNegative, Positive, Range, read

from ..kvcache.base import PhantomPayload, Tier
from ..kvcache.eviction_policy import AllocStatus, Costs, LinearCosts
from ..kvcache.memory_pool import PhantomPool
from ..kvcache.transfer_queue import TransferJob
from ..prefetch import PrefetchConfig
from ..request import FinishReason
from ..scheduler.request_state import ScheduledBatch, ScheduledDecode
from ..scheduler.scheduler_config import SchedulerConfig
from ..system import System, build_system
from ..workflow.graph import StepGraph
from .clock import LinkSpeed, VirtualClock, VirtualTransfer
from .cost_model import BatchShape, CostModel, Links, fit_costs
from .request_source import ClientRequests, RequestSource, SimulatedRequest, TraceRequests, WarmUpRequests
from .results import SimulationResult, SimulationRun, TransferSnapshot, result_of
from .timeline import Timeline
from .trace import MAX_BYTES, RecordingScheduler, Trace, TraceRecorder, batch_shape_of
from .workload import WorkflowClient, WorkloadConfig, clients_of

MAX_COPY_PARTS = 1 << 16  # each is an event of the simulation


class CountedTransfer(VirtualTransfer):
    """Counts the parts it has copied."""

    parts = 0

    def copy_layer(self, job: TransferJob) -> None:
        self.parts += 1
        super().copy_layer(job)


@dataclass(frozen=True)
class SimulatedMachine:
    """A device, the memory tiers below it, and the links between them.

    Attributes:
        costs: seconds of computing and of loading.
        device_bytes, host_bytes, disk_bytes: capacities for KV; 0: no such tier (the device needs some).
        bytes_per_token, page_size: bytes of KV per token, tokens per page of the prefix tree.
        copy_parts: parts in which a node is copied; after each, a more urgent copy may preempt it.
        scheduler, prefetch: budgets of the scheduler and the prefetcher; prefetch=None: the defaults.
        believed: the costs that the server assumes; None: the true ones.
        max_steps: upper bound of tokens per decoding request in one batch.
        whole_pages: requests get the memory of the device in whole pages, as from an engine.

    Raises:
        ValueError: a size below 1.
    """

    costs: CostModel
    links: Links
    device_bytes: int
    host_bytes: int = 0
    disk_bytes: int = 0
    bytes_per_token: int = 131_072
    page_size: int = 16
    copy_parts: int = 4
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    prefetch: PrefetchConfig | None = None
    believed: Costs | None = None
    max_steps: int = 1_000_000
    whole_pages: bool = False

    def __post_init__(self) -> None:
        if min(self.device_bytes, self.bytes_per_token, self.page_size, self.copy_parts, self.max_steps) < 1:
            raise ValueError(
                f"got device_bytes={self.device_bytes}, bytes_per_token={self.bytes_per_token}, page_size="
                f"{self.page_size}, copy_parts={self.copy_parts}, max_steps={self.max_steps}; accepted: 1 or more of "
                "each"
            )

    def build(self, name: str, prompts: Sequence[np.ndarray] | None = None) -> tuple[System, VirtualClock]:
        """Builds a system on this machine, with a clock of its own.

        Args:
            name: one of `system_names()`.
            prompts: of all requests in the order in which they are served; for `belady` only.
        """
        clock = VirtualClock()
        sizes = {Tier.DEVICE: self.device_bytes, Tier.HOST: self.host_bytes, Tier.DISK: self.disk_bytes}
        pools = {tier: PhantomPool(int(size), self.whole_pages) for tier, size in sizes.items() if size}
        host = LinkSpeed(self.links.host_bytes_per_s or 1.0, self.links.latency_s)
        disk = LinkSpeed(self.links.disk_bytes_per_s or 1.0, self.links.latency_s)
        speeds = {}
        ways = (Tier.HOST, Tier.DEVICE, host), (Tier.DISK, Tier.HOST, disk), (Tier.DISK, Tier.DEVICE, disk)
        for low, high, speed in ways:
            if low in pools and high in pools:
                speeds[low, high] = speeds[high, low] = speed
        system = build_system(
            name, pools, CountedTransfer(clock, speeds), costs=self.believed or self.costs,
            bytes_per_token=self.bytes_per_token, clock=clock, page_size=self.page_size, graph=StepGraph(clock),
            scheduler_config=self.scheduler, prefetch_config=self.prefetch,
            prompts=cast("Sequence[Sequence[int]] | None", prompts),
        )  # fmt: skip
        return system, clock


class Simulator:
    """Drives a system on a virtual clock; may run several sources, one after the other.

    Args:
        machine: gives the seconds of batches; `system` and `clock` are from its `build`.
        recorder: writes a trace. timeline: samples the placement of the agents' prompts after each step.
    """

    def __init__(
        self, machine: SimulatedMachine, system: System, clock: VirtualClock, recorder: TraceRecorder | None = None,
        timeline: Timeline | None = None,
    ) -> None:  # fmt: skip
        self.machine, self.system, self.clock = machine, system, clock
        self.recorder, self.timeline = recorder, timeline
        self.scheduler = system.scheduler if recorder is None else RecordingScheduler(system.scheduler, recorder)
        self._arrivals: list[tuple[float, int, SimulatedRequest]] = []
        self._short: dict[int, int] = {}  # lengths of answers that end before `max_new_tokens`, by request number
        self._number = 0

    def run(self, source: RequestSource) -> SimulationRun:
        """Runs until all requests of the source have ended.

        Raises:
            RuntimeError: a request failed or was cancelled, or no further event would end the remaining requests.
        """
        scheduler = self.scheduler
        run = SimulationRun(self.system, begin_s=self.clock.now, end_s=self.clock.now)
        began, counted = time.process_time(), self._events()
        decoded, decisions = scheduler.metrics.decode_tokens, 0
        self._expect(source.begin(self.system))
        if self.recorder is not None:
            for spec in source.declared:
                self.recorder.record_workflow(self.clock.now, spec)
        while True:
            self._submit(source)
            batch = scheduler.next_batch(max_steps=self.machine.max_steps)
            decisions += 1
            self._collect(source, run)
            if self.timeline is not None:
                self.timeline.sample(self.clock.now)
            if batch is not None:
                self._compute(batch)
                continue
            due = self._next_time()
            if due is None or (not self._arrivals and not len(scheduler)):
                break
            self.clock.advance_to(due)
        if len(scheduler):
            raise RuntimeError(f"{len(scheduler)} requests are left, and no further event would end them")
        if self.timeline is not None:
            self.timeline.finish(self.clock.now)
        run.cpu_s = time.process_time() - began
        run.events = self._events() - counted
        run.decisions = run.events - (scheduler.metrics.decode_tokens - decoded) + decisions
        return run

    def _events(self) -> int:
        backend = self.system.tiers.transfers.backend
        assert isinstance(backend, CountedTransfer), "the system was built by a SimulatedMachine"
        return self.system.scheduler.metrics.events + backend.parts

    def _expect(self, arrivals: list[tuple[float, SimulatedRequest]]) -> None:
        for at, simulated in arrivals:
            self._number += 1
            heapq.heappush(self._arrivals, (max(at, self.clock.now), self._number, simulated))

    def _submit(self, source: RequestSource) -> None:
        while self._arrivals and self._arrivals[0][0] <= self.clock.now:
            simulated = heapq.heappop(self._arrivals)[2]
            source.on_submit(simulated)
            number = self.scheduler.submit(simulated.request)
            if simulated.output_tokens < simulated.request.max_new_tokens:
                self._short[number] = simulated.output_tokens

    def _collect(self, source: RequestSource, run: SimulationRun) -> None:
        """Takes the outputs of ended requests, and expects the requests that follow them."""
        for output in self.scheduler.take_finished():
            self._short.pop(output.number, None)
            if output.finish_reason not in (FinishReason.ANSWERED, FinishReason.TIMED_OUT):
                raise RuntimeError(
                    f"the request {output.request.id!r} ended as {output.finish_reason.value}: {output.error}"
                )
            run.outputs.append(output)
            run.end_s = max(run.end_s, output.times.finished or 0.0)
            if self.timeline is not None:
                self.timeline.record_call(output)
            self._expect(source.on_finish(output))

    def _next_time(self) -> float | None:
        times = (self._arrivals[0][0] if self._arrivals else None, self.system.scheduler.next_time())
        return min((at for at in times if at is not None), default=None)

    def _compute(self, batch: ScheduledBatch) -> None:
        """Advances the clock by the batch's seconds; a batch of many steps ends at the next event."""
        now, costs = self.clock.now, self.machine.costs
        ends: dict[ScheduledDecode, int] = {}
        if self._short:
            ends = {item: self._remaining(item) for item in batch.decodes if item.state.number in self._short}
        if ends:
            batch.steps = min(batch.steps, *ends.values())
        shape = batch_shape_of(batch)
        seconds = costs.batch_s(shape)
        if batch.steps > 1:
            due = self._next_time()
            if due is not None and seconds > due - now:
                one = costs.batch_s(BatchShape(shape.chunks, shape.contexts, 1))
                batch.steps = max(1, min(batch.steps, math.ceil((due - now) / one)))
                seconds = costs.batch_s(BatchShape(shape.chunks, shape.contexts, batch.steps))
        for item in batch.prefills:
            item.finished = item.last and self._short.get(item.state.number) == item.state.num_output_tokens + 1
            if item.store is not None:
                tokens = item.store[1] - item.store[0]
                rate = item.request.bytes_per_token or self.machine.bytes_per_token
                item.payload = PhantomPayload(tokens, tokens * rate, self.machine.copy_parts)
        for item, left in ends.items():
            item.finished = left == batch.steps
        self.clock.advance_to(now + seconds)
        self.scheduler.complete(batch)

    def _remaining(self, item: ScheduledDecode) -> int:
        return item.remaining - (item.request.max_new_tokens - self._short[item.state.number])


def simulate(
    machine: SimulatedMachine, workload: WorkloadConfig, policy: str, seed: int = 0, *, warm: bool = True,
    recorder: TraceRecorder | None = None, timeline: Timeline | None = None,
) -> SimulationResult:  # fmt: skip
    """Runs a generated workload once.

    Args:
        policy: the system, one of `system_names()`.
        warm: every agent's fixed prompt is requested once before anything is counted.
        recorder, timeline: see `Simulator`; the timeline begins at the end of the warm-up.
    """
    prompts = prompts_of(machine, workload, seed, warm) if policy == "belady" else None
    return _simulate(machine, workload, policy, seed, warm, prompts, recorder, timeline)[0]


def prompts_of(machine: SimulatedMachine, workload: WorkloadConfig, seed: int, warm: bool = True) -> list[np.ndarray]:
    """The prompts of a workload in the order in which a server with LRU eviction receives them.

    A single workflow's order is the same under every policy. That of several is not, so an oracle with this order is
    then only nearly optimal.
    """
    return _simulate(machine, workload, "lru", seed, warm, None, None, None)[1]


def _simulate(
    machine: SimulatedMachine, workload: WorkloadConfig, policy: str, seed: int, warm: bool,
    prompts: Sequence[np.ndarray] | None, recorder: TraceRecorder | None, timeline: Timeline | None,
) -> tuple[SimulationResult, list[np.ndarray]]:  # fmt: skip
    """The result, and all prompts in order of submission."""
    system, clock = machine.build(policy, prompts)
    clients = clients_of(workload, seed)
    submitted: list[np.ndarray] = []
    before = TransferSnapshot()
    if warm:
        run = Simulator(machine, system, clock, recorder).run(WarmUpRequests(clients))
        submitted += [np.asarray(output.request.prompt) for output in run.outputs]
        before = TransferSnapshot.take(run.system)
    source = ClientRequests(clients, declared_answer_s(machine))
    if timeline is not None:
        timeline.begin(system, [agent for client in clients for agent in client.agents], clock.now)
    run = Simulator(machine, system, clock, recorder, timeline).run(source)
    system.scheduler.check()
    return result_of(run, before), submitted + source.prompts


def declared_answer_s(machine: SimulatedMachine) -> Callable[[WorkflowClient], float]:
    """The seconds of a call that clients declare: an undisturbed one of mean length, with its fixed prompt cached."""

    def seconds(client: WorkflowClient) -> float:
        workload = client.workload
        cached = round(workload.fixed_tokens.mean)
        prompt = cached + max(1, round(workload.dynamic_tokens.mean))
        steps = max(1, round(workload.output_tokens.mean))
        first = machine.costs.batch_s(BatchShape(chunks=((cached, prompt),)))
        return first + machine.costs.batch_s(BatchShape(contexts=(prompt,), steps=steps))

    return seconds


def replay(
    machine: SimulatedMachine, trace: Trace, policy: str, *, closed: bool = True, recorder: TraceRecorder | None = None,
    timeline: Timeline | None = None,
) -> SimulationResult:  # fmt: skip
    """Runs the calls of a trace once, on any machine; see `TraceRequests` for `closed` and `Simulator` for the rest."""
    prompts = [call.prompt for call in trace.calls] if policy == "belady" else None
    system, clock = machine.build(policy, prompts)
    _store_prompts(trace, system, clock, machine.copy_parts)
    before = TransferSnapshot.take(system)
    run = Simulator(machine, system, clock, recorder, timeline).run(TraceRequests(trace, closed))
    system.scheduler.check()
    return result_of(run, before)


def _store_prompts(trace: Trace, system: System, clock: VirtualClock, parts: int) -> None:
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


def machine_about(machine: SimulatedMachine) -> dict[str, Any]:
    """The key by which `machine_of` finds a machine, but for its rates, which follow from the batches of the trace."""
    links, believed = machine.links, machine.believed
    about: dict[str, Any] = {
        "device_bytes": machine.device_bytes, "host_bytes": machine.host_bytes, "disk_bytes": machine.disk_bytes,
        "link_bytes_per_s": links.host_bytes_per_s, "disk_bytes_per_s": links.disk_bytes_per_s,
        "latency_s": links.latency_s, "copy_parts": machine.copy_parts, "whole_pages": machine.whole_pages,
        "scheduler": asdict(machine.scheduler),
    }  # fmt: skip
    if isinstance(believed, LinearCosts):
        about["believed"] = [believed.tokens_per_s, *believed.bytes_per_s, believed.latency_s]
    return about


def machine_of(trace: Trace) -> SimulatedMachine:
    """The machine that a trace was recorded on, with rates fitted to its batches.

    Raises:
        ValueError: the trace does not state the size of the device's pool, or has too few batches.
    """
    if "device_bytes" not in trace.about:
        raise ValueError(
            "the trace does not say on which machine it was recorded (`device_bytes` in `about`): name a set-up, whose "
            "machine replays it"
        )
    about = read(RecordedMachine, trace.about, "`about` of the trace", unknown=set())
    links = Links(about.link_bytes_per_s, about.disk_bytes_per_s, about.latency_s)
    believed = about.believed
    return SimulatedMachine(
        fit_costs(trace.batches, links), links, about.device_bytes, about.host_bytes, about.disk_bytes,
        trace.bytes_per_token, trace.page_size, about.copy_parts, _scheduler_config(about),
        believed=LinearCosts(believed[0], (believed[1], believed[2]), believed[3]) if believed else None,
        whole_pages=about.whole_pages,
    )  # fmt: skip


Bytes = Annotated[int, Range(0, MAX_BYTES)]


@dataclass(frozen=True)
class RecordedMachine:
    """The facts of a machine in a trace; see `TraceRecorder`."""

    device_bytes: Annotated[int, Range(1, MAX_BYTES)]
    host_bytes: Bytes = 0
    disk_bytes: Bytes = 0
    link_bytes_per_s: NotNegative = 0.0
    disk_bytes_per_s: NotNegative = 0.0
    latency_s: NotNegative = 0.0
    copy_parts: Annotated[int, Range(1, MAX_COPY_PARTS)] = 4
    believed: tuple[Positive, NotNegative, NotNegative, NotNegative] | None = None
    whole_pages: bool = False
    limits: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)


# Earlier traces (of the same version) state the scheduler's budgets under `limits`, with these names.
EARLIER_FIELDS = {
    "batch_tokens": "max_num_batched_tokens",
    "chunk_tokens": "prefill_chunk_size",
    "running": "max_num_seqs",
    "loading": "max_concurrent_loads",
    "waiting": "max_queued_requests",
    "room_patience_s": "allocation_patience_s",
    "load_patience": "load_timeout_factor",
    "looks": "max_refusals_per_step",
}


def _scheduler_config(about: RecordedMachine) -> SchedulerConfig:
    given = {EARLIER_FIELDS.get(name, name): value for name, value in about.limits.items()}
    return read(SchedulerConfig, given | dict(about.scheduler), "`about` of the trace, scheduler")
