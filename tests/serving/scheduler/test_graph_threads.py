"""Workflows are added, changed and removed by other threads while the scheduler reads their values."""

from __future__ import annotations

import random
import sys
import threading
import time

import pytest

from tenure.serving import (
    AgentSpec,
    EdgeSpec,
    LinearCosts,
    PhantomPayload,
    PhantomPool,
    Request,
    ThreadedTransfer,
    Tier,
    WorkflowSpec,
    build_system,
)

RATE = 1000


@pytest.fixture
def switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switch_often")
@pytest.mark.parametrize("name", ["ste_prefetch", "expected_time"])
def test_workflows_come_and_go_while_batches_are_scheduled(name):
    system = build_system(
        name, {Tier.DEVICE: PhantomPool(4000 * RATE), Tier.HOST: PhantomPool(40_000 * RATE)}, ThreadedTransfer(),
        clock=time.monotonic, costs=LinearCosts(8000, (1e9, 1e9), 0.0), bytes_per_token=RATE,
    )  # fmt: skip
    scheduler, graph = system.scheduler, system.graph
    errors: list[BaseException] = []
    stop, all_submitted = threading.Event(), threading.Event()
    ended = [0]

    def compute() -> None:
        while not all_submitted.is_set() or len(scheduler):
            batch = scheduler.next_batch(max_steps=8)
            if batch is None:
                scheduler.wait(0.01)
            else:
                for item in batch.prefills:
                    if item.store:
                        tokens = item.store[1] - item.store[0]
                        item.payload = PhantomPayload(tokens, tokens * RATE)
                scheduler.complete(batch)
            ended[0] += len(scheduler.take_finished())

    def handle(number: int) -> None:
        chance = random.Random(number)
        while not stop.is_set():
            run = f"run-{number}-{chance.randrange(10**6)}"
            agents = [f"{run}/{n}" for n in range(6)]
            edges = [EdgeSpec(agents[n], agents[(n + 1) % 6]) for n in range(6)]
            workflow = graph.add_workflow(WorkflowSpec(run, [AgentSpec(agent) for agent in agents], edges))
            for agent in agents[:3]:
                scheduler.submit(Request("r", list(range(100)), 2, workflow=run, agent=agent, fixed_tokens=64))
                workflow.add_edge(agent, agents[5], 0.5)
                workflow.expect(agents[4])
                time.sleep(0.0005)
            graph.observe_pause(agents[0], 0.01)
            assert len(workflow.edges()) >= 6 and run in {each.name for each in graph}
            graph.remove_workflow(run)

    def guard(work, *args) -> None:
        try:
            work(*args)
        except BaseException as error:
            errors.append(error)
            stop.set()
            all_submitted.set()

    threads = [threading.Thread(target=guard, args=(compute,))]
    threads += [threading.Thread(target=guard, args=(handle, n)) for n in range(3)]
    for thread in threads:
        thread.start()
    stop.wait(1.5)
    stop.set()
    for thread in threads[1:]:
        thread.join(20)
    all_submitted.set()
    threads[0].join(20)
    assert not errors, errors[0]
    assert (ended[0] > 0, len(scheduler), len(graph)) == (True, 0, 0)
    scheduler.check()
    system.close()
