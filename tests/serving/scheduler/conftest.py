"""A system on a virtual clock, and a driver that computes nothing but takes time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tenure.serving import (
    AgentSpec,
    EdgeSpec,
    LinearCosts,
    LinkSpeed,
    PhantomPayload,
    PhantomPool,
    PrefetchConfig,
    Request,
    RequestOutput,
    ScheduledBatch,
    SchedulerConfig,
    System,
    Tier,
    VirtualClock,
    VirtualTransfer,
    WorkflowSpec,
    build_system,
)

LINK = 1000.0  # bytes/s; a token is a byte
PREFILL = 100.0  # tokens/s


@dataclass
class Driver:
    """Drives a system; a token of a prefill takes 10 ms, one of a decode a second.

    Attributes:
        batches: everything that was computed, with the time at which it began.
    """

    system: System
    clock: VirtualClock
    ended: list[RequestOutput] = field(default_factory=list)
    batches: list[tuple[float, ScheduledBatch]] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    @property
    def scheduler(self):
        return self.system.scheduler

    def submit(self, id: str, prompt: list[int], new: int = 1, **options: Any) -> int:
        number = self.numbers[id] = self.scheduler.submit(Request(id, prompt, new, **options))
        return number

    def cancel(self, id: str) -> None:
        """Cancels the last request of that label."""
        self.scheduler.cancel(self.numbers[id])

    def begin(self, max_steps: int = 1) -> ScheduledBatch | None:
        batch = self.scheduler.next_batch(max_steps)
        self.take()
        if batch is not None:
            self.batches.append((self.clock(), batch))
        return batch

    def finish(self, batch: ScheduledBatch) -> None:
        for item in batch.prefills:
            if item.store is not None:
                item.payload = PhantomPayload(item.store[1] - item.store[0], item.store[1] - item.store[0])
        prefilled = sum(item.end - item.start for item in batch.prefills)
        self.clock.advance_to(self.clock() + prefilled / PREFILL + batch.steps * bool(batch.decodes))
        self.scheduler.complete(batch)
        self.take()

    def take(self) -> None:
        self.ended += self.scheduler.take_finished()

    def step(self, max_steps: int = 1) -> bool:
        """Computes something, or waits for what comes next; False if there is nothing to wait for."""
        batch = self.begin(max_steps)
        if batch is not None:
            self.finish(batch)
        else:
            due = self.scheduler.next_time()
            if due is None:
                return not len(self.scheduler)
            self.clock.advance_to(due)
        self.scheduler.check()
        return True

    def run(self, until: Callable[[], bool] | None = None, max_steps: int = 1) -> None:
        """Until all requests have ended, or until that is so."""
        for _ in range(10_000):
            self.take()
            if until() if until is not None else not len(self.scheduler):
                return
            assert self.step(max_steps), "something comes next"
        raise AssertionError("it never ends")

    def send_down(self) -> None:
        """Everything idle leaves the device, to the host if there is one."""
        tiers, pool = self.system.tiers, self.system.tiers.pools[Tier.DEVICE]
        while pool.evictable:
            tiers.evictor.make_room(Tier.DEVICE, pool.capacity)
            self.clock.advance_to(self.clock() + 100)
            tiers.poll()

    def answer(self, id: str) -> RequestOutput:
        return next(ended for ended in self.ended if ended.request.id == id)

    def serve(self, id: str, prompt: list[int], new: int = 1, **options: Any) -> RequestOutput:
        """Submits a request and runs until it has ended."""
        self.submit(id, prompt, new, **options)
        self.run(lambda: any(ended.request.id == id for ended in self.ended))
        return self.answer(id)

    def cached(self, prompt: list[int], tier: Tier = Tier.DEVICE) -> int:
        """Tokens of `prompt` that lie in `tier`."""
        return sum(node.length for node in self.system.tiers.lookup(prompt).nodes if node.copies[tier] is not None)


@pytest.fixture
def make_driver():
    """A system with pools of so many tokens; all that was begun is ended and checked at the end."""
    made: list[Driver] = []

    def make(name: str = "lru_reactive", device: int = 100, host: int = 1000, **options: Any) -> Driver:
        clock = VirtualClock()
        pools = {Tier.DEVICE: PhantomPool(device), Tier.HOST: PhantomPool(host)}
        links = {(a, b): LinkSpeed(options.pop("link", LINK)) for a, b in ((Tier.HOST, Tier.DEVICE),)}
        links[Tier.DEVICE, Tier.HOST] = LinkSpeed(LINK)
        options.setdefault("scheduler_config", SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=8))
        options.setdefault("prefetch_config", PrefetchConfig(look_ahead_s=3.0))
        options.setdefault("costs", LinearCosts(PREFILL, (LINK, 0.0)))
        system = build_system(
            name,
            pools,
            options.pop("copies", VirtualTransfer)(clock, links),
            clock=clock,
            bytes_per_token=1,
            page_size=2,
            step_s=1.0,
            **options,
        )
        made.append(Driver(system, clock))
        return made[-1]

    yield make
    for driver in made:
        driver.scheduler.close()
        driver.clock.advance_to(driver.clock() + 1e6)
        driver.system.tiers.poll()
        driver.scheduler.check()
        assert not driver.system.tiers.handles and not driver.system.tiers.has_transfers
        driver.system.close()


@pytest.fixture
def ring():
    """Adds a workflow whose agents call each other in turn, beginning with the first."""

    def add(driver: Driver, agents: list[str], name: str = "ring", call_s: float = 1.0) -> None:
        edges = [EdgeSpec(a, b) for a, b in zip(agents, agents[1:] + agents[:1], strict=True)]
        specs = [AgentSpec(agent, call_s=call_s, call_spread_s=0.1, pause_s=0.0) for agent in agents]
        driver.system.graph.add_workflow(WorkflowSpec(name, specs, edges, agents[:1]))

    return add


@pytest.fixture
def prompt_of():
    """A fixed prompt of `length` tokens for an agent, unlike any other's."""

    def make(agent: str, length: int = 20) -> list[int]:
        return [1000 + ord(agent[0]), *range(length - 1)]

    return make
