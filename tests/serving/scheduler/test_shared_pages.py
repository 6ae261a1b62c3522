"""Requests that start together on one cold prompt: its pages are computed once, and nobody waits in vain for long."""

from __future__ import annotations

import pytest

from tenure.serving import FinishReason, LinearCosts, PhantomPayload, SchedulerConfig, StorePolicy

from .conftest import Driver

COMMON = list(range(64))
FAST = SchedulerConfig(max_num_batched_tokens=2048, max_num_seqs=32)


def suffix(number: int, length: int = 5) -> list[int]:
    return [1000 * (number + 1) + k for k in range(length)]


def computed(driver: Driver) -> int:
    return driver.scheduler.metrics.prefill_tokens


def run_compressed(driver: Driver, fixed: int) -> None:
    """The fixed prompt is stored at its end, as a whole, in a quarter of the bytes."""
    for _ in range(1000):
        driver.take()
        if not len(driver.scheduler):
            return
        batch = driver.begin()
        assert batch is not None
        for item in batch.prefills:
            if item.store is None:
                continue
            start, end = item.store
            if start >= fixed:
                item.payload = PhantomPayload(end - start, end - start)
            elif (start, end) == (0, fixed):
                item.payload = PhantomPayload(fixed, fixed // 4, divisible=False)
        driver.clock.advance_to(driver.clock() + 0.01)
        driver.scheduler.complete(batch)
        driver.scheduler.check()


@pytest.mark.parametrize("fixed", [0, 64], ids=["plain", "fixed"])
@pytest.mark.parametrize("budget", [2048, 33])
def test_a_common_prompt_is_computed_once(make_driver, fixed, budget):
    config = SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=32)
    driver = make_driver(device=1000, scheduler_config=config)
    for number in range(8):
        driver.submit(f"r{number}", COMMON + suffix(number), 2, agent="a" if fixed else None, fixed_tokens=fixed)
    driver.run()
    assert {ended.finish_reason for ended in driver.ended} == {FinishReason.ANSWERED}
    assert computed(driver) == 64 + 8 * 5
    assert sorted(ended.cached_tokens for ended in driver.ended) == [0] + 7 * [64]
    assert driver.scheduler.metrics.waits_for_pages == 7


def test_a_common_prompt_is_compressed_once(make_driver):
    driver = make_driver(device=1000, scheduler_config=SchedulerConfig(max_num_batched_tokens=40, max_num_seqs=32))
    for number in range(8):
        driver.submit(f"r{number}", COMMON + suffix(number), 2, agent="a", fixed_tokens=64, namespace="compressed")
    run_compressed(driver, 64)
    assert computed(driver) == 64 + 8 * 5 and len(driver.ended) == 8


def test_the_longest_common_part_is_waited_for(make_driver):
    """b shares 20 tokens with the first and 60 with the second, which itself waits for the first."""
    driver = make_driver(device=1000, scheduler_config=FAST)
    driver.submit("first", COMMON[:20] + suffix(1, 40))
    driver.submit("second", COMMON[:60] + suffix(2))
    driver.submit("b", COMMON[:60] + suffix(3))
    driver.run()
    assert computed(driver) == 60 + (40 + 5) + 5
    assert [driver.answer(name).cached_tokens for name in ("first", "second", "b")] == [0, 20, 60]


def test_others_do_not_wait(make_driver):
    """Other namespaces, other tokens, less than a page in common, or a leader that stores nothing."""
    driver = make_driver(device=1000, scheduler_config=FAST)
    driver.submit("a", COMMON, store_policy=StorePolicy.DISCARD)
    driver.submit("b", COMMON, namespace="other")
    driver.submit("c", COMMON[:1] + suffix(1))
    driver.submit("d", suffix(2))
    driver.submit("e", [7])
    batch = driver.begin()
    assert len(batch.prefills) == 5
    driver.finish(batch)
    impatient = make_driver(device=1000, scheduler_config=SchedulerConfig(page_patience_s=0))
    for name in "ab":
        impatient.submit(name, COMMON)
    batch = impatient.begin()
    assert len(batch.prefills) == 2
    impatient.finish(batch)


def test_after_a_cancellation_the_next_one_goes_on_from_what_is_stored(make_driver):
    driver = make_driver(device=1000, scheduler_config=SchedulerConfig(max_num_batched_tokens=40, max_num_seqs=32))
    for number in range(3):
        driver.submit(f"r{number}", COMMON + suffix(number))
    driver.step()
    driver.cancel("r0")
    batch = driver.begin()
    assert [(item.request.id, item.start) for item in batch.prefills] == [("r1", 40)]
    driver.finish(batch)
    driver.run()
    assert computed(driver) == 64 + 2 * 5, "the pages of the cancelled one are not lost"


def test_pages_that_are_not_stored_are_not_waited_for(make_driver):
    """The driver offers nothing: once the first has passed the common pages, the others compute them themselves."""
    driver = make_driver(device=1000, scheduler_config=SchedulerConfig(max_num_batched_tokens=40, max_num_seqs=32))
    for number in range(3):
        driver.submit(f"r{number}", COMMON + suffix(number))
    batches = []
    while len(driver.scheduler):
        batch = driver.begin()
        batches.append([item.request.id for item in batch.prefills])
        driver.clock.advance_to(driver.clock() + 0.1)
        driver.scheduler.complete(batch)
        driver.scheduler.check()
        driver.take()
    assert batches[:3] == [["r0"], ["r0"], ["r1"]] and computed(driver) == 69 * 3


def test_patience_ends_when_the_other_makes_no_progress(make_driver):
    """The leader stands behind a long prompt that takes the whole of every batch."""
    config = SchedulerConfig(max_num_batched_tokens=33, max_num_seqs=32, page_patience_s=1.0)
    driver = make_driver(device=2000, scheduler_config=config)
    driver.submit("long", suffix(9, 900))
    driver.submit("leader", COMMON + suffix(1))
    driver.submit("follower", COMMON + suffix(2))
    driver.run(lambda: driver.clock() >= 0.9)
    assert len(driver.scheduler._admission.shared) == 1
    driver.run(lambda: driver.clock() >= 2.0)
    assert len(driver.scheduler._admission.shared) == 0
    driver.run()
    assert computed(driver) == 900 + 2 * 69 and driver.scheduler.metrics.waits_for_pages == 1


def test_a_leader_that_loads_and_one_that_is_preempted(make_driver):
    """The common beginning is on the host: it is loaded once, and what follows it is computed once."""
    driver = make_driver(device=300, link=100.0, costs=LinearCosts(50.0, (100.0, 0.0)), scheduler_config=FAST)
    driver.serve("before", COMMON[:40])
    driver.send_down()
    for number in range(3):
        driver.submit(f"r{number}", COMMON + suffix(number))
    driver.run()
    assert driver.system.tiers.statistics.bytes_moved.get((1, 0)) == 40
    assert computed(driver) == 40 + 24 + 3 * 5
    for number in range(3):
        driver.submit(f"s{number}", suffix(50, 64) + suffix(number), 3)
    driver.step()
    leader = next(state for state in driver.scheduler._requests.values() if state.request.id == "s0")
    driver.scheduler._running.remove(leader)
    driver.scheduler._admission.preempt(leader)
    driver.run()
    assert {driver.answer(f"s{n}").finish_reason for n in range(3)} == {FinishReason.ANSWERED}


def test_followers_end_like_all_others(make_driver):
    driver = make_driver(device=1000, scheduler_config=SchedulerConfig(max_num_batched_tokens=33, max_num_seqs=32))
    driver.submit("leader", COMMON + suffix(0))
    driver.submit("cancelled", COMMON + suffix(1))
    driver.submit("late", COMMON + suffix(2), timeout_s=0.2)
    driver.step()
    driver.cancel("cancelled")
    driver.run()
    assert driver.answer("cancelled").finish_reason is FinishReason.CANCELLED
    assert driver.answer("late").error == "it was not answered within 0.2 s; it was waiting to be admitted"
    assert driver.answer("leader").finish_reason is FinishReason.ANSWERED
    driver.submit("x", suffix(70, 64))
    driver.submit("y", suffix(70, 64))
    batch = driver.begin()
    assert len(batch.prefills) == 1
    driver.finish(batch)
    driver.submit("z", suffix(70, 64))
    driver.scheduler.close()
    driver.scheduler.check()
