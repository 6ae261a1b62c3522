"""What was where when: the place of every agent's fixed prompt over time, its calls, and what they waited for.

What a simulated server runs on, and the real tree, tiers and scheduler built over it without any data.

The loop that stands where an engine stands: it asks the scheduler for work and lets time pass instead of computing.

Everything that decides is the real thing: tree, tiers, orders, prefetcher, scheduler and step graph. Here are only the
clock, the seconds of a batch, and the arrivals.

Who asks in a simulation: clients that were generated, the calls of a trace, or a warm-up before either.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from ..kvcache.base import PhantomPayload, Status, Tier
from ..kvcache.eviction_policy import Costs
from ..kvcache.memory_pool import PhantomPool
from ..kvcache.transfer_queue import TransferJob
from ..request import Ended, Request, RequestOutput, StorePolicy
from ..scheduler.config import SchedulerConfig
from ..scheduler.request_state import Decode
from ..system import System, build_system
from ..workflow.graph import StepGraph
from ..workflow.spec import WorkflowSpec
from .clock import LinkSpeed, VirtualClock, VirtualTransfer
from .cost_model import Batch, CostModel, Links
from .trace import RecordedScheduler, Trace, TracedCall, TraceRecorder, batch_of
from .workload import Call, Client

if TYPE_CHECKING:
    import numpy as np

    from ..prefetch import PrefetchConfig
    from ..scheduler.request_state import Work


@dataclass(frozen=True)
class Stretch:
    """`agent`'s fixed prompt was in this place from `begin` to `end`, seconds."""

    agent: str
    place: str
    begin: float
    end: float


@dataclass(frozen=True)
class CallSpan:
    """A call of `agent`: seconds at which it arrived, could be computed, gave its first token, and ended."""

    agent: str
    arrived: float
    admitted: float
    first_token: float
    ended: float


@dataclass
class Timeline:
    """Looks at the tree whenever the driver has done something; what lasted no time is not seen.

    Attributes:
        agents: whose prompts are looked at. start_s: the time that counts as 0.
        stretches, calls: what was found, in seconds from there.
    """

    agents: list[str] = field(default_factory=list)
    start_s: float = 0.0
    stretches: list[Stretch] = field(default_factory=list)
    calls: list[CallSpan] = field(default_factory=list)
    _system: System | None = None
    _now: dict[str, tuple[str, float]] = field(default_factory=dict)

    def begin(self, system: System, agents: Sequence[str], at: float) -> None:
        """Begins to look at the prompts of `agents`."""
        self._system, self.agents, self.start_s = system, list(dict.fromkeys(agents)), at
        self._now = {agent: (self._place(agent), 0.0) for agent in self.agents}

    def look(self, at: float) -> None:
        """Notes what has changed by the time `at`."""
        at -= self.start_s
        for agent in self.agents:
            before, since = self._now[agent]
            place = self._place(agent)
            if place != before:
                self._note(agent, before, since, at)
                self._now[agent] = (place, at)

    def ended(self, ended: Ended) -> None:
        """Notes a call that was answered."""
        times, agent = ended.times, ended.request.agent
        if agent is None or times.admitted is None or times.first_token is None or times.ended is None:
            return
        self.calls.append(
            CallSpan(
                agent, *(at - self.start_s for at in (times.arrived, times.admitted, times.first_token, times.ended))
            )
        )

    def finish(self, at: float) -> None:
        """Ends the last stretches."""
        for agent, (place, since) in self._now.items():
            self._note(agent, place, since, at - self.start_s)
        self._now = {}

    def _note(self, agent: str, place: str, begin: float, end: float) -> None:
        if end > begin:
            self.stretches.append(Stretch(agent, place, begin, end))

    def _place(self, agent: str) -> str:
        """The slowest place of a part of the prompt: it is on the device when all of it is."""
        assert self._system is not None, "begun"
        end = self._system.tiers.lookup_agent(agent)
        if end is None:
            return Status.ABSENT.value
        places = [node.status.value for node in end.path()]
        order = [status.value for status in (Status.GPU, Status.OFFLOADING, Status.LOADING, Status.CPU, Status.DISK)]
        return max(places, key=lambda place: order.index(place) if place in order else len(order))


class CountedTransfer(VirtualTransfer):
    """Counts the parts it has copied."""

    parts = 0

    def copy_layer(self, job: TransferJob) -> None:
        self.parts += 1
        super().copy_layer(job)


@dataclass(frozen=True)
class Machine:
    """A device, the memory below it, and the links.

    Attributes:
        costs: seconds of computing and of loading.
        links: between the tiers.
        device_bytes, host_bytes, disk_bytes: for KV; 0: no such tier (the device needs some).
        bytes_per_token: KV of a token.
        copy_parts: in how many pieces a node is copied; after each, a more urgent copy may go first.
        limits, prefetch: of the scheduler and the prefetcher; None: their defaults.
        believed: what the server believes that computing and loading take; None: what they do.
    """

    costs: CostModel
    links: Links
    device_bytes: int
    host_bytes: int = 0
    disk_bytes: int = 0
    bytes_per_token: int = 131_072
    page_size: int = 16
    copy_parts: int = 4
    limits: SchedulerConfig = field(default_factory=SchedulerConfig)
    prefetch: PrefetchConfig | None = None
    believed: Costs | None = None

    def __post_init__(self) -> None:
        if min(self.device_bytes, self.bytes_per_token, self.page_size, self.copy_parts) < 1:
            raise ValueError(
                f"got device_bytes={self.device_bytes}, bytes_per_token={self.bytes_per_token}, page_size="
                f"{self.page_size}, copy_parts={self.copy_parts}; accepted: 1 or more of each"
            )

    def build(self, name: str, prompts: Sequence[np.ndarray] | None = None) -> tuple[System, VirtualClock]:
        """The system of that name (`system_names`) on a clock of its own.

        Args:
            prompts: of all requests in the order in which they are served; Belady's order alone needs and reads them.
        """
        clock = VirtualClock()
        sizes = {Tier.DEVICE: self.device_bytes, Tier.HOST: self.host_bytes, Tier.DISK: self.disk_bytes}
        pools = {tier: PhantomPool(int(size)) for tier, size in sizes.items() if size}
        host = LinkSpeed(self.links.host_bytes_per_s or 1.0, self.links.latency_s)
        disk = LinkSpeed(self.links.disk_bytes_per_s or 1.0, self.links.latency_s)
        speeds = {}
        for low, high, speed in (
            (Tier.HOST, Tier.DEVICE, host),
            (Tier.DISK, Tier.HOST, disk),
            (Tier.DISK, Tier.DEVICE, disk),
        ):
            if low in pools and high in pools:
                speeds[low, high] = speeds[high, low] = speed
        system = build_system(
            name,
            pools,
            CountedTransfer(clock, speeds),
            costs=self.believed or self.costs,
            bytes_per_token=self.bytes_per_token,
            clock=clock,
            page_size=self.page_size,
            graph=StepGraph(clock),
            limits=self.limits,
            prefetch=self.prefetch,
            prompts=cast("Sequence[Sequence[int]] | None", prompts),
        )
        return system, clock


MAX_STEPS = 1_000_000


@dataclass(frozen=True)
class Ask:
    """A request that is to be submitted.

    Attributes:
        answer: tokens after which its answer ends, at most `request.max_new_tokens`.
    """

    request: Request
    answer: int


class Source(Protocol):
    """Who asks."""

    @property
    def declared(self) -> Sequence[WorkflowSpec]:
        """The workflows that the server has been told of when `begin` returns."""
        ...

    def begin(self, system: System) -> list[tuple[float, Ask]]:
        """Declares workflows; returns what comes without anything before it, with the times of arrival."""
        ...

    def submitting(self, ask: Ask) -> None:
        """Called just before a request is submitted."""
        ...

    def ended(self, ended: Ended) -> list[tuple[float, Ask]]:
        """What follows a request that has ended, with the times of arrival."""
        ...


@dataclass
class Run:
    """What a simulation has found.

    Attributes:
        system: as it was left. ended: all requests, in the order of their ends.
        begin_s, end_s: on the virtual clock, of the first arrival and the last end.
        events: what a simulation step by step would have to visit: arrivals, admissions, loads, chunks, tokens
            decoded, stores, ends, and parts of copies. decisions: of these, what this one visited singly, with all
            tokens of one piece of work counted as one.
        cpu_s: seconds of the processor that the simulation took.
    """

    system: System
    ended: list[Ended] = field(default_factory=list)
    begin_s: float = 0.0
    end_s: float = 0.0
    events: int = 0
    decisions: int = 0
    cpu_s: float = 0.0

    @property
    def makespan_s(self) -> float:
        return self.end_s - self.begin_s


class Driver:
    """Runs sources, one after the other, on one system.

    Args:
        recorder: is told what happens; timeline: looks at where the agents' prompts are after each step.
    """

    def __init__(
        self,
        machine: Machine,
        system: System,
        clock: VirtualClock,
        recorder: TraceRecorder | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.machine, self.system, self.clock = machine, system, clock
        self.recorder, self.timeline = recorder, timeline
        self.scheduler = system.scheduler if recorder is None else RecordedScheduler(system.scheduler, recorder)
        self._arrivals: list[tuple[float, int, Ask]] = []
        self._short: dict[str, int] = {}  # answers that end before `max_new_tokens`
        self._number = 0

    def run(self, source: Source) -> Run:
        """Until nothing is left to be done.

        Raises:
            RuntimeError: requests are left that nothing will ever bring forward.
        """
        scheduler = self.scheduler
        run = Run(self.system, begin_s=self.clock.now, end_s=self.clock.now)
        began, counted = time.process_time(), self._events()
        decoded, decisions = scheduler.statistics.decoded, 0
        self._expect(source.begin(self.system))
        if self.recorder is not None:
            for spec in source.declared:
                self.recorder.workflow(self.clock.now, spec)
        while True:
            self._submit(source)
            work = scheduler.next_work(max_steps=MAX_STEPS)
            decisions += 1
            self._collect(source, run)
            if self.timeline is not None:
                self.timeline.look(self.clock.now)
            if work is not None:
                self._compute(work)
                continue
            due = self._next_time()
            if due is None or (not self._arrivals and not len(scheduler)):
                break
            self.clock.advance_to(due)
        if len(scheduler):
            raise RuntimeError(f"{len(scheduler)} requests are left and nothing will bring them forward")
        run.cpu_s = time.process_time() - began
        run.events = self._events() - counted
        run.decisions = run.events - (scheduler.statistics.decoded - decoded) + decisions
        return run

    def _events(self) -> int:
        mover = self.system.tiers.transfers.backend
        assert isinstance(mover, CountedTransfer), "the system was built by a Machine"
        return self.system.scheduler.statistics.events + mover.parts

    def _expect(self, asks: list[tuple[float, Ask]]) -> None:
        for at, ask in asks:
            self._number += 1
            heapq.heappush(self._arrivals, (max(at, self.clock.now), self._number, ask))

    def _submit(self, source: Source) -> None:
        while self._arrivals and self._arrivals[0][0] <= self.clock.now:
            ask = heapq.heappop(self._arrivals)[2]
            source.submitting(ask)
            if ask.answer < ask.request.max_new_tokens:
                self._short[ask.request.id] = ask.answer
            self.scheduler.submit(ask.request)

    def _collect(self, source: Source, run: Run) -> None:
        for ended in self.scheduler.take_ended():
            self._short.pop(ended.request.id, None)
            if ended.outcome is not RequestOutput.ANSWERED and ended.outcome is not RequestOutput.TIMED_OUT:
                raise RuntimeError(f"the request {ended.request.id!r} ended as {ended.outcome.value}: {ended.error}")
            run.ended.append(ended)
            run.end_s = max(run.end_s, ended.times.ended or 0.0)
            if self.timeline is not None:
                self.timeline.ended(ended)
            self._expect(source.ended(ended))

    def _next_time(self) -> float | None:
        times = (self._arrivals[0][0] if self._arrivals else None, self.system.scheduler.next_time())
        return min((at for at in times if at is not None), default=None)

    def _compute(self, work: Work) -> None:
        """Lets the seconds pass that `work` takes, up to the next thing that may change what is best to do."""
        now, costs = self.clock.now, self.machine.costs
        ends = (
            {item: self._left(item) for item in work.decodes if item.request.id in self._short} if self._short else {}
        )
        if ends:
            work.steps = min(work.steps, *ends.values())
        batch = batch_of(work)
        seconds = costs.batch_s(batch)
        if work.steps > 1:
            due = self._next_time()
            if due is not None and seconds > due - now:
                one = costs.batch_s(Batch(batch.chunks, batch.contexts, 1))
                work.steps = max(1, min(work.steps, math.ceil((due - now) / one)))
                seconds = costs.batch_s(Batch(batch.chunks, batch.contexts, work.steps))
        for item in work.prefills:
            item.finished = item.last and self._short.get(item.request.id) == 1
            if item.store is not None:
                tokens = item.store[1] - item.store[0]
                rate = item.request.bytes_per_token or self.machine.bytes_per_token
                item.payload = PhantomPayload(tokens, tokens * rate, self.machine.copy_parts)
        for item, left in ends.items():
            item.finished = left == work.steps
        self.clock.advance_to(now + seconds)
        self.scheduler.complete(work)

    def _left(self, item: Decode) -> int:
        """Tokens until a short answer ends."""
        return item.left - (item.request.max_new_tokens - self._short[item.request.id])


class WarmUp:
    """Every agent's fixed prompt once, with an answer of one token, one after the other; as in KVFlow's evaluation."""

    declared: Sequence[WorkflowSpec] = ()

    def __init__(self, clients: Sequence[Client]) -> None:
        prompts: dict[str, tuple[str, np.ndarray]] = {}
        for client in clients:
            for agent in client.agents:
                prompts.setdefault(agent, (client.client, client.fixed_prompt(agent)))
        self._left = iter(prompts.items())

    def begin(self, system: System) -> list[tuple[float, Ask]]:
        return self._next(0.0)

    def submitting(self, ask: Ask) -> None:
        pass

    def ended(self, ended: Ended) -> list[tuple[float, Ask]]:
        return self._next(ended.times.ended or 0.0)

    def _next(self, at: float) -> list[tuple[float, Ask]]:
        for agent, (client, prompt) in self._left:
            request = Request(
                f"warm/{agent}",
                prompt,
                1,
                agent=agent,
                fixed_tokens=len(prompt),
                session="warm-up",
                client=client,
                keep=StorePolicy.DISCARD,
            )
            return [(at, Ask(request, 1))]
        return []


class ClientCalls:
    """The calls of generated clients, whose graphs are declared to the server.

    Args:
        answer_s: of an agent, seconds of a call that the server is told to expect.
    """

    def __init__(self, clients: Sequence[Client], answer_s: Callable[[Client], float]) -> None:
        self.clients = {client.name: client for client in clients}
        self.declared = [client.spec(answer_s(client)) for client in clients]
        self._number = 0

    def begin(self, system: System) -> list[tuple[float, Ask]]:
        self._system = system
        now, first = system.tiers.clock(), []
        for spec, client in zip(self.declared, self.clients.values(), strict=True):
            system.graph.add_workflow(spec)
            first.append(self._ask(client, client.first_call(), now))
        return first

    def submitting(self, ask: Ask) -> None:
        pass

    def ended(self, ended: Ended) -> list[tuple[float, Ask]]:
        request = ended.request
        assert request.workflow is not None and request.agent is not None, "clients' requests name both"
        client, now = self.clients[request.workflow], ended.times.ended or 0.0
        calls = client.following(request.agent)
        self._change(client, request.agent, calls)
        if client.hostile:
            for agent in client.agents:
                self._system.graph[client.name].expect(agent)
        asks = [self._ask(client, call, now) for call in calls]
        if not client.open:
            self._system.graph.remove_workflow(client.name)
        return asks

    def _change(self, client: Client, agent: str, calls: Sequence[Call]) -> None:
        change = client.change(agent, calls)
        if change is not None:
            old, new, edges = change
            graph = self._system.graph[client.name]
            graph.remove_agent(old)
            graph.add_agent(new)
            for edge in edges:
                graph.add_edge(edge)

    def _ask(self, client: Client, call: Call, now: float) -> tuple[float, Ask]:
        self._number += 1
        request = Request(
            f"{client.name}/{self._number}",
            call.prompt,
            call.output_tokens,
            workflow=client.name,
            agent=call.agent,
            fixed_tokens=call.fixed_tokens,
            client=client.client,
            priority=1.0 if client.hostile else 0.5,
            timeout_s=1e9,
        )
        return now + call.after_s, Ask(request, call.output_tokens)


class TracedCalls:
    """The calls of a trace, each as long after the one it followed as it was then.

    Args:
        closed: so; otherwise every call comes at the time at which it came then.
    """

    def __init__(self, trace: Trace, closed: bool = True) -> None:
        self.declared = trace.workflows
        self._after: dict[str, list[TracedCall]] = {}
        self._first: list[TracedCall] = []
        for call in trace.calls:
            if closed and call.after is not None:
                self._after.setdefault(call.after[0], []).append(call)
            else:
                self._first.append(call)

    def begin(self, system: System) -> list[tuple[float, Ask]]:
        now = system.tiers.clock()
        for spec in self.declared:
            system.graph.add_workflow(spec)
        return [(now + call.at, _ask_of(call)) for call in self._first]

    def submitting(self, ask: Ask) -> None:
        pass

    def ended(self, ended: Ended) -> list[tuple[float, Ask]]:
        now = ended.times.ended or 0.0
        following = self._after.get(ended.request.id, [])
        return [(now + call.after[1], _ask_of(call)) for call in following if call.after is not None]


def _ask_of(call: TracedCall) -> Ask:
    request = Request(
        call.id,
        call.prompt,
        call.max_new_tokens,
        workflow=call.workflow,
        agent=call.agent,
        fixed_tokens=call.fixed_tokens,
        session=call.session,
        client=call.client,
        priority=call.priority,
        keep=StorePolicy(call.keep),
        timeout_s=1e9,
    )
    return Ask(request, max(1, call.produced))
