"""Loads: what is loaded, what computing is sooner for, who waits for whom, and what is given up."""

from __future__ import annotations

import pytest

from tenure.serving import FinishReason, LinearCosts, LinkSpeed, PhantomPayload, SchedulerConfig, Tier, VirtualTransfer

A, B, C, D = ([n * 100 + k for k in range(40)] for n in (1, 2, 3, 4))
SLOW = {"link": 2.0, "costs": LinearCosts(1.0, (2.0, 0.0))}  # 40 tokens load in 20 s; it is thought, compute in 40


def spill(driver, *prompts):
    """These are computed, then pushed down into the host's memory."""
    for prompt in prompts:
        driver.serve(f"fill{len(driver.ended)}", prompt)
    driver.send_down()
    for prompt in prompts:
        assert driver.cached(prompt) == 0 and driver.cached(prompt, Tier.HOST) == len(prompt)


def test_what_loads_is_skipped_and_dispatched_when_it_is_ready(make_driver):
    driver = make_driver(device=100, link=100.0, costs=LinearCosts(50.0, (100.0, 0.0)))
    spill(driver, A)
    driver.serve("fill", C)
    driver.submit("cold", [*A, 1, 2])
    driver.submit("warm", [*C[:20], 1])
    batch = driver.begin()
    assert [item.request.id for item in batch.prefills] == ["warm"], "the other one's KV is on its way"
    driver.finish(batch)
    driver.run()
    cold = driver.answer("cold")
    assert cold.loaded_tokens == 40 and cold.cached_tokens == 40 and cold.recomputed_tokens == 0
    assert cold.stalled_s >= 0.4 and driver.scheduler.metrics.stalled_s == cold.stalled_s
    assert driver.answer("warm").times.finished < cold.times.finished


def test_under_hicache_everybody_waits_for_a_load(make_driver):
    driver = make_driver("hicache", device=100, link=100.0, costs=LinearCosts(50.0, (100.0, 0.0)))
    spill(driver, A)
    driver.serve("fill", C)
    driver.submit("cold", [*A, 1, 2])
    driver.submit("warm", [*C[:20], 1])
    began = driver.clock()
    assert driver.begin() is None and driver.scheduler.next_time() is not None
    while (batch := driver.begin()) is None:
        driver.clock.advance_to(driver.scheduler.next_time())
    assert driver.clock() - began == pytest.approx(0.4), "40 bytes at 100 a second"
    assert {item.request.id for item in batch.prefills} == {"cold", "warm"}
    driver.finish(batch)
    driver.run()
    assert driver.answer("cold").loaded_tokens == 40 and driver.answer("warm").stalled_s == 0


def test_a_load_that_would_end_later_than_computing_is_computed(make_driver):
    driver = make_driver(device=100, link=10.0, costs=LinearCosts(100.0, (10.0, 0.0)))
    spill(driver, A)
    ended = driver.serve("r", [*A, 1])
    assert (ended.cached_tokens, ended.loaded_tokens, ended.recomputed_tokens) == (0, 0, 40)
    assert driver.scheduler.metrics.recomputed_late == 1 and driver.scheduler.metrics.recomputed_tokens == 40
    assert driver.cached(A) == 40, "what was computed lies on the device again"


def test_a_queue_of_loads_makes_computing_sooner(make_driver):
    """40 tokens load in 0.1 s and compute in 0.15 s: worth it alone, not behind another one's."""
    driver = make_driver(device=200, link=400.0, costs=LinearCosts(260.0, (400.0, 0.0)))
    spill(driver, A, B)
    driver.submit("a", [*A, 1])
    driver.submit("b", [*B, 1])
    driver.run()
    assert driver.answer("a").loaded_tokens == 40
    assert driver.answer("b").recomputed_tokens > 0 == driver.answer("b").loaded_tokens


def test_a_prefix_that_is_cheap_to_load_is_loaded_and_the_rest_computed(make_driver):
    class Steep:
        """The beginning of a prompt is dear to compute, the rest is not."""

        def recompute_s(self, start, end):
            return max(0, 20 - start) / 10 + max(0, end - max(start, 20)) / 1000

        def reload_s(self, nbytes, tier):
            return nbytes / 100

    driver = make_driver(device=100, link=100.0, costs=Steep())
    driver.serve("one", A, agent="a", fixed_tokens=20)
    driver.send_down()
    ended = driver.serve("r", [*A, 1])
    assert (ended.loaded_tokens, ended.recomputed_tokens) == (20, 20)


class Broken(VirtualTransfer):
    """Copies into the device fail."""

    def copy_layer(self, job):
        if job.target is Tier.DEVICE:
            raise RuntimeError("bus error")
        super().copy_layer(job)


class Stuck(VirtualTransfer):
    """Once `stuck`, copies into the device take far longer than anybody thinks: so many bytes a second."""

    stuck: float | None = None

    def submit(self, job):
        if self.stuck is not None and job.target is Tier.DEVICE:
            self.speeds[job.link] = LinkSpeed(self.stuck)
        super().submit(job)


def test_failed_loads_are_computed_after_another_try(make_driver):
    driver = make_driver(copies=Broken)
    spill(driver, A)
    ended = driver.serve("r", [*A, 1])
    assert ended.finish_reason is FinishReason.ANSWERED and ended.recomputed_tokens == 40
    assert driver.system.tiers.statistics.copies_failed == 2 and driver.scheduler.metrics.recomputed_refused == 1


def test_a_load_that_does_not_end_is_given_up(make_driver):
    driver = make_driver(copies=Stuck, link=400.0)
    spill(driver, A)
    driver.system.tiers.transfers.backend.stuck = 1e-3
    before = driver.clock()
    ended = driver.serve("r", [*A, 1])
    assert ended.finish_reason is FinishReason.ANSWERED and ended.recomputed_tokens == 40
    assert ended.times.finished - before < 5, "not the hours that the load would have taken"


def test_a_load_is_given_up_though_its_time_ended_while_the_driver_was_busy(make_driver):
    """Two nodes: of 4 bytes, here after 40 s, and of 36, here after 400 s. The driver first looks in between."""
    driver = make_driver(copies=Stuck, costs=LinearCosts(10.0, (1000.0, 0.0)))
    driver.serve("fill", A, agent="a", fixed_tokens=4)
    driver.send_down()
    driver.system.tiers.transfers.backend.stuck = 0.1
    before = driver.clock()
    driver.submit("r", [*A, 1])
    assert driver.begin() is None and driver.scheduler.next_time() == pytest.approx(before + 8.2)
    driver.clock.advance_to(before + 41)
    batch = driver.begin()
    assert batch is not None and [item.request.id for item in batch.prefills] == ["r"]
    driver.finish(batch)
    driver.run()
    ended = driver.answer("r")
    assert ended.times.finished - before < 42 and ended.loaded_tokens == 0 and ended.recomputed_tokens > 30


def test_requests_without_a_load_go_past_those_that_wait_for_one_to_end(make_driver):
    """More of these than an admission max_refusals_per_step at, and for longer than patience."""
    config = SchedulerConfig(
        max_num_batched_tokens=64,
        max_num_seqs=8,
        max_concurrent_loads=1,
        allocation_patience_s=1.0,
        max_refusals_per_step=2,
    )
    driver = make_driver(device=1000, scheduler_config=config, **SLOW)
    cold = [[n * 1000 + k for k in range(40)] for n in range(1, 5)]
    spill(driver, *cold)
    driver.serve("fill", C)
    before, refused = driver.clock(), driver.scheduler.metrics.admissions_refused
    for number, prompt in enumerate(cold):
        driver.submit(f"cold{number}", [*prompt, 1])
    for number in range(6):
        driver.submit(f"warm{number}", [*C, number], 3)
        batch = driver.begin()
        assert batch is not None and [item.request.id for item in batch.prefills] == [f"warm{number}"]
        while batch is not None:
            driver.finish(batch)
            driver.scheduler.check()
            batch = driver.begin()
    assert before + 12 < driver.clock() < before + 13, "never idle, though the first load takes 20 s"
    driver.run()
    began = [driver.answer(f"cold{number}").times.finished - before for number in range(4)]
    assert began == pytest.approx([20, 40, 60, 80], abs=0.2), "in order, each as soon as the one before has come"
    assert driver.scheduler.metrics.admissions_refused == refused, "that is no lack of room"


def test_a_request_whose_kv_has_come_otherwise_need_not_wait_for_a_load_to_end(make_driver):
    config = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=8, max_concurrent_loads=1)
    driver = make_driver(device=1000, scheduler_config=config, **SLOW)
    spill(driver, A, B)
    driver.submit("a", [*A, 1])
    driver.submit("b", [*B, 1])
    driver.submit("c", C[:8], 1)
    batch, tiers = driver.begin(), driver.system.tiers
    assert batch is not None and [item.request.id for item in batch.prefills] == ["c"]
    with tiers.open(B) as handle:
        handle.truncate(handle.node.root)
        tiers.store(handle, B, PhantomPayload(40, 40))
    driver.finish(batch)
    batch = driver.begin()
    assert batch is not None and [item.request.id for item in batch.prefills] == ["b"], "though a has not come"
    driver.finish(batch)
    driver.run()
    assert driver.answer("b").loaded_tokens == 0 and driver.answer("a").loaded_tokens == 40


def test_who_is_overdue_and_needs_a_load_lets_others_pass(make_driver):
    config = SchedulerConfig(
        max_num_batched_tokens=64, max_num_seqs=8, max_concurrent_loads=1, allocation_patience_s=1.0
    )
    driver = make_driver(device=100, scheduler_config=config, **SLOW)
    spill(driver, A)
    driver.serve("fill", C[:20])
    driver.submit("long", D[:10], 20)
    driver.submit("loads", [*A, 1])
    driver.submit("large", [*C[:20], 1], 25)
    due = driver.clock() + 3
    driver.run(lambda: driver.clock() > due)
    driver.submit("small", [7, 8], 1)
    driver.step()
    assert not any(item.request.id == "small" for _, batch in driver.batches for item in batch.prefills)
    tiers = driver.system.tiers
    tiers.evictor.make_room(Tier.DEVICE, 28)
    driver.run(lambda: any(ended.request.id == "small" for ended in driver.ended))
    assert driver.cached(C[:20]) == 0 and len(driver.scheduler) == 3, "large would load, and a load is under way"
    driver.run()
    assert all(ended.finish_reason is FinishReason.ANSWERED for ended in driver.ended)


def test_no_more_are_computed_than_may_be_when_many_loads_end_together(make_driver):
    driver = make_driver(device=400, scheduler_config=SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=2))
    prompts = [[n * 1000 + k for k in range(10)] for n in range(1, 7)]
    spill(driver, *prompts)
    for number, prompt in enumerate(prompts):
        driver.submit(f"r{number}", [*prompt, 1], 3)
    assert driver.begin() is None
    driver.clock.advance_to(driver.clock() + 1)
    first = len(driver.batches)
    driver.begin()
    driver.scheduler.check()
    driver.submit("new", [1, 2], 1)
    driver.cancel("r3")
    driver.scheduler.check()
    driver.finish(driver.batches[-1][1])
    driver.run()
    order = [item.request.id for _, batch in driver.batches[first:] for item in batch.prefills]
    assert order == ["r0", "r1", "r2", "r4", "r5", "new"], "in the order of their loads, before who came later"
    assert all(len(batch.prefills) + len(batch.decodes) <= 2 for _, batch in driver.batches[first:])
    ends = {ended.request.id: ended for ended in driver.ended}
    assert ends.pop("r3").finish_reason is FinishReason.CANCELLED
    assert {ended.finish_reason for ended in ends.values()} == {FinishReason.ANSWERED}
    assert all(ends[f"r{n}"].loaded_tokens == 10 and ends[f"r{n}"].stalled_s == 1 for n in (0, 1, 2, 4, 5))
