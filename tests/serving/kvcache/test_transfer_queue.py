"""The order of transfers on a link, on a virtual clock and on threads; cancellation, faults, death of a worker."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import pytest
import torch

from tenure.serving import (
    LinkSpeed,
    MemoryPool,
    PhantomPayload,
    PhantomPool,
    TensorPayload,
    ThreadedTransfer,
    Tier,
    Urgency,
    VirtualClock,
    VirtualTransfer,
)
from tenure.serving.kvcache.transfer_queue import LayerAction, Outcome, TransferJob, TransferQueue
from tenure.serving.kvcache.transfer_threads import WorkerDiedError

UP, DOWN = (Tier.HOST, Tier.DEVICE), (Tier.DEVICE, Tier.HOST)


def job(urgency=Urgency.PREFETCH, nbytes=400, layers=4, priority=0.0, link=UP) -> TransferJob:
    payload = PhantomPayload(1, nbytes, layers)
    builder = PhantomPool(nbytes).new_builder(payload)
    return TransferJob(1, object(), link[0], link[1], payload, builder, urgency, priority)


def test_the_order_of_a_queue():
    queue = TransferQueue()
    late, soon, demand = job(priority=9.0), job(priority=1.0), job(Urgency.DEMAND, priority=5.0)
    for each in (late, soon, demand):
        queue.add(each)
    assert queue.peek() is demand
    assert queue.discard(demand) and not queue.discard(demand)
    assert queue.pop() is soon
    assert queue.next_action(soon) is LayerAction.COPY
    late.priority = -1.0
    queue.add(late)
    assert queue.next_action(soon) is LayerAction.COPY, "equals do not overtake"
    queue.add(demand)
    assert queue.next_action(soon) is LayerAction.YIELD
    soon.layers_done = 4
    assert queue.next_action(soon) is LayerAction.COMMIT, "a finished copy does not wait"
    soon.cancelled = True
    assert queue.next_action(soon) is LayerAction.CANCEL
    assert [queue.pop(), queue.pop(), queue.pop()] == [demand, late, None]


def test_a_demand_load_overtakes_a_prefetch_at_a_layer_boundary():
    clock = VirtualClock()
    copies = VirtualTransfer(clock, {UP: LinkSpeed(100.0, latency_s=0.5)})
    prefetch, demand = job(), job(Urgency.DEMAND, nbytes=100, layers=1)
    copies.submit(prefetch)  # 4 layers of 1.5 s
    clock.advance_to(2.0)
    assert copies.poll() == [] and prefetch.layers_done == 1
    copies.submit(demand)
    assert copies.wait(0, 100.0)
    assert copies.poll() == [demand] and clock() == 4.5, (
        "the layer in progress ends at 3.0, then the demand's takes 1.5"
    )
    assert copies.wait(1, 100.0) and clock() == 7.5
    assert copies.poll() == [prefetch] and prefetch.outcome is Outcome.DONE
    assert copies.next_time() is None
    assert not copies.wait(2, 3.0) and clock() == 10.5, "waiting for nothing takes its time"


def test_the_next_time_is_the_end_of_a_copy_and_not_of_a_layer():
    """A driver that advances to it misses nothing: no transfer on any link ends before."""
    clock = VirtualClock()
    copies = VirtualTransfer(clock, {UP: LinkSpeed(100.0, latency_s=0.5), DOWN: LinkSpeed(100.0)})
    prefetch, other = job(), job(nbytes=900, layers=3, link=DOWN)
    copies.submit(prefetch)  # 4 layers of 1.5 s
    copies.submit(other)  # 3 of 3 s
    assert copies.next_time() == 6.0
    clock.advance_to(2.0)
    demand = job(Urgency.DEMAND, nbytes=100, layers=1)
    copies.submit(demand)
    assert copies.next_time() == 3.0, "the prefetch yields there"
    clock.advance_to(3.0)
    assert copies.poll() == [] and copies.next_time() == 4.5
    clock.advance_to(4.5)
    assert copies.poll() == [demand] and copies.next_time() == 7.5
    copies.cancel(prefetch)
    assert copies.next_time() == 6.0, "it stops at its next boundary"
    clock.advance_to(9.0)
    assert copies.poll() == [prefetch, other] and copies.next_time() is None


def test_promoting_and_cancelling_on_a_virtual_clock():
    clock = VirtualClock()
    copies = VirtualTransfer(clock, {UP: LinkSpeed(100.0)})
    first, second, third = job(), job(), job()
    for each in (first, second, third):
        copies.submit(each)
    copies.promote(third, Urgency.DEMAND, 0.0)
    clock.advance_to(1.0)
    assert copies.poll() == []
    copies.cancel(second)
    assert copies.poll() == [second] and second.outcome is Outcome.CANCELLED and second.layers_done == 0
    copies.cancel(first)  # it has yielded to the third, half done
    assert copies.poll() == [first] and (first.outcome, first.layers_done) == (Outcome.CANCELLED, 1)
    clock.advance_to(3.5)
    copies.cancel(third)  # it stops at the boundary
    assert copies.poll() == []
    clock.advance_to(4.0)
    assert copies.poll() == [third] and (third.outcome, third.layers_done) == (Outcome.CANCELLED, 3)
    copies.submit(last := job())
    copies.submit(waiting := job())
    copies.close()
    assert set(copies.poll()) == {last, waiting} and copies.next_time() is None


def real_job(size=64, layers=3, urgency=Urgency.DEMAND, payload=None) -> TransferJob:
    tensors = {f"{layer}.k": torch.full((size,), float(layer)) for layer in range(layers)}
    payload = payload or TensorPayload(tensors, 1, None)
    pool = MemoryPool(10**9)
    return TransferJob(1, object(), UP[0], UP[1], payload, pool.new_builder(payload), urgency)


def drain(copies: ThreadedTransfer, count: int, timeout_s: float = 30.0) -> list[TransferJob]:
    jobs: list[TransferJob] = []
    deadline = time.monotonic() + timeout_s
    while len(jobs) < count and time.monotonic() < deadline:
        ended = copies.num_events
        jobs += copies.poll()
        if len(jobs) < count:
            copies.wait(ended, 0.05)
    return jobs


@pytest.fixture
def threaded():
    copies = ThreadedTransfer()
    yield copies
    copies.close()
    for thread in threading.enumerate():
        if thread.name.startswith("tenure-copy"):
            thread.join(10)  # one that died may still be ending
            assert not thread.is_alive()


def test_threads_copy_what_they_are_given(threaded):
    job = real_job()
    threaded.submit(job)
    assert drain(threaded, 1) == [job] and job.outcome is Outcome.DONE
    assert isinstance(job.result, TensorPayload)
    assert isinstance(job.payload, TensorPayload)
    for name, tensor in job.payload.tensors.items():
        assert torch.equal(job.result.tensors[name], tensor)
        assert job.result.tensors[name].data_ptr() != tensor.data_ptr()


def events() -> tuple[threading.Event, ...]:
    return tuple(threading.Event() for _ in range(3))


@dataclass(frozen=True, eq=False)
class Gate(TensorPayload):
    """Reading one of its three layers waits for the test."""

    reached: tuple[threading.Event, ...] = field(default_factory=events)
    open: tuple[threading.Event, ...] = field(default_factory=events)

    def read(self, layer):
        self.reached[layer].set()
        assert self.open[layer].wait(30)
        return super().read(layer)


def gated() -> Gate:
    return Gate({f"{layer}.k": torch.zeros(4) for layer in range(3)}, 1, None)


def test_threads_let_a_demand_overtake_at_a_layer_boundary(threaded):
    payload = gated()
    prefetch, demand = real_job(urgency=Urgency.PREFETCH, payload=payload), real_job()
    threaded.submit(prefetch)
    assert payload.reached[0].wait(30)
    threaded.submit(demand)
    payload.open[0].set()
    assert drain(threaded, 1) == [demand]
    assert prefetch.outcome is None and prefetch.layers_done == 1
    for event in payload.open:
        event.set()
    assert drain(threaded, 1) == [prefetch] and prefetch.outcome is Outcome.DONE


def test_threads_stop_a_cancelled_copy_at_the_next_boundary(threaded):
    payload = gated()
    running, waiting = real_job(payload=payload), real_job()
    threaded.submit(running)
    assert payload.reached[0].wait(30)
    threaded.submit(waiting)
    threaded.cancel(waiting)
    assert drain(threaded, 1) == [waiting] and waiting.layers_done == 0
    threaded.cancel(running)
    payload.open[0].set()
    assert drain(threaded, 1) == [running]
    assert (running.outcome, running.layers_done, running.result) == (Outcome.CANCELLED, 1, None)


@dataclass(frozen=True, eq=False)
class Raising(TensorPayload):
    error: BaseException = field(default_factory=RuntimeError)

    def read(self, layer):
        raise self.error


def raising(error: BaseException) -> Raising:
    return Raising({"0.k": torch.zeros(4)}, 1, None, error=error)


def test_a_failed_copy_and_a_dead_worker_end_their_job_and_no_other(threaded, caplog, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    failing, good = real_job(payload=raising(RuntimeError("bus error"))), real_job()
    threaded.submit(failing)
    threaded.submit(good)
    assert drain(threaded, 2) == [failing, good]
    assert failing.outcome is Outcome.FAILED and str(failing.error) == "bus error"
    deadly, after = real_job(payload=raising(KeyboardInterrupt())), real_job()
    threaded.submit(deadly)  # what is not an Exception ends the thread
    threaded.submit(after)
    assert drain(threaded, 2) == [deadly, after]
    assert deadly.outcome is Outcome.FAILED and isinstance(deadly.error, WorkerDiedError)
    assert after.outcome is Outcome.DONE, "another thread has replaced it"
    assert "a transfer worker died (HOST -> DEVICE); starting another" in caplog.text


def test_a_bandwidth_limit_is_kept():
    copies = ThreadedTransfer({UP: 4000.0})
    begun = time.monotonic()
    copies.submit(job := real_job(size=100, layers=2))  # 800 bytes
    assert drain(copies, 1) == [job]
    assert time.monotonic() - begun >= 0.2
    copies.close()
    copies.submit(late := real_job())
    assert copies.poll() == [late] and late.outcome is Outcome.CANCELLED
    with pytest.raises(ValueError, match="accepted: more than 0 bytes/s"):
        ThreadedTransfer({UP: 0.0})


def test_closing_ends_transfers_in_progress(threaded):
    payload = gated()
    running, waiting = real_job(payload=payload), real_job()
    threaded.submit(running)
    assert payload.reached[0].wait(30)
    threaded.submit(waiting)
    timer = threading.Timer(0.05, payload.open[0].set)
    timer.start()
    threaded.close()
    assert {running.outcome, waiting.outcome} == {Outcome.CANCELLED}
    assert set(threaded.poll()) == {running, waiting}
