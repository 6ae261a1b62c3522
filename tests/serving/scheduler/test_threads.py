"""Scheduler, copies and clients in threads, switching often, with faults and a watchdog; `tenure soak` for longer."""

from __future__ import annotations

import threading
import time

import pytest

from tenure.scripts.soak.stress import Stress
from tenure.serving import (
    FinishReason,
    LinearCosts,
    MemoryPool,
    Request,
    ThreadedTransfer,
    Tier,
    build_system,
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # workers die on purpose
@pytest.mark.parametrize("seed", [0, 1])
def test_clients_engine_and_copies_in_threads(tmp_path, seed):
    stress = Stress(str(tmp_path), seed)
    stress.run(seconds=4.0)
    assert stress.ended[FinishReason.ANSWERED] > 50 and stress.read > 500 and stress.hints, "it did something"
    assert sum(stress.ended.values()) == stress.submitted


def make_system(**options):
    pools = {Tier.DEVICE: MemoryPool(1000), Tier.HOST: MemoryPool(1000)}
    costs = LinearCosts(1000.0, (1e6, 0.0))
    return build_system(
        "ste_prefetch", pools, ThreadedTransfer(), clock=time.monotonic, costs=costs, bytes_per_token=1, **options
    )


@pytest.mark.parametrize("news", ["submit", "cancel", "close"])
def test_waiting_ends_with_the_first_news(news):
    system = make_system()
    scheduler = system.scheduler
    wake = {
        "submit": lambda: scheduler.submit(Request("r", [1, 2, 3], 1)),
        "cancel": lambda: scheduler.cancel(1000),
        "close": scheduler.close,
    }[news]
    assert scheduler.next_batch() is None
    timer = threading.Timer(0.1, wake)
    begun = time.monotonic()
    timer.start()
    scheduler.wait(30.0)
    assert 0.05 < time.monotonic() - begun < 10
    timer.join()
    system.close()


def test_waiting_does_not_miss_what_came_before_it():
    system = make_system()
    assert system.scheduler.next_batch() is None
    system.scheduler.submit(Request("r", [1, 2, 3], 1))
    begun = time.monotonic()
    system.scheduler.wait(30.0)
    assert time.monotonic() - begun < 10
    system.close()


def test_waiting_ends_with_a_timeout_that_is_due():
    system = make_system()
    scheduler = system.scheduler
    with system.tiers.lock:
        system.tiers.pools[Tier.DEVICE].reserve(900)  # somebody else's
    scheduler.submit(Request("r", [1] * 200, 1, timeout_s=0.2))
    begun = time.monotonic()
    while len(scheduler):
        assert scheduler.next_batch() is None
        scheduler.wait(30.0)
    assert 0.1 < time.monotonic() - begun < 10
    assert scheduler.take_finished()[0].finish_reason is FinishReason.TIMED_OUT
    system.tiers.unreserve(900)
    system.close()
