"""Requests from arrival to end: batches, memory, loads and their alternatives, and every way to end."""

from __future__ import annotations

import pytest

from tenure.serving import (
    FinishReason,
    LinearCosts,
    PhantomPayload,
    Request,
    RequestTimes,
    SchedulerConfig,
    StorePolicy,
    Tier,
)

A, B, C, D = ([n * 100 + k for k in range(40)] for n in (1, 2, 3, 4))


def test_a_request_from_arrival_to_answer(make_driver):
    driver = make_driver()
    driver.submit("r", A, 3)
    batch = driver.begin()
    (item,) = batch.prefills
    assert (item.start, item.end, item.first, item.last, item.store) == (0, 40, True, True, (0, 40))
    assert driver.system.tiers.pools[Tier.DEVICE].reserved == 43
    item.tokens = [7]
    driver.finish(batch)
    assert driver.cached(A) == 40 and driver.system.tiers.pools[Tier.DEVICE].reserved == 3
    batch = driver.begin()
    assert not batch.prefills and [item.request.id for item in batch.decodes] == ["r"]
    batch.decodes[0].tokens = [8]
    assert batch.decodes[0].store_span() is None, "it goes on"
    driver.finish(batch)
    batch = driver.begin()
    batch.decodes[0].tokens = [9]
    assert batch.decodes[0].store_span() == (40, 42), "the KV of the last token was never computed"
    batch.decodes[0].payload = PhantomPayload(2, 2)
    driver.finish(batch)
    (ended,) = driver.ended
    assert (ended.finish_reason, ended.error) == (FinishReason.ANSWERED, None)
    assert (ended.tokens, ended.num_output_tokens) == ([7, 8, 9], 3)
    assert ended.times == RequestTimes(arrived=0, admitted=0, first_token=0.4, finished=2.4)
    assert driver.cached([*A, 7, 8]) == 42 and driver.system.tiers.pools[Tier.DEVICE].used == 42
    again = driver.serve("s", [*A, 7, 8, 5], 1)
    assert again.cached_tokens == 42 and driver.batches[-1][1].prefills[0].start == 42, "the conversation goes on"


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token(make_driver):
    driver = make_driver()
    assert driver.serve("r", A).cached_tokens == 0
    assert driver.serve("s", A).cached_tokens == 38
    assert driver.batches[-1][1].prefills[0].start == 38


def test_chunks_share_the_budget_beside_decodes(make_driver):
    config = SchedulerConfig(max_num_batched_tokens=24, prefill_chunk_size=16, max_num_seqs=4)
    driver = make_driver(device=1000, scheduler_config=config)
    driver.submit("a", A, 4)
    driver.submit("b", B, 1)
    spans = []
    while len(driver.scheduler):
        batch = driver.begin()
        assert batch.num_tokens <= 24
        spans.append([(item.request.id, item.start, item.end) for item in batch.prefills] + [len(batch.decodes)])
        driver.finish(batch)
    assert spans[:4] == [
        [("a", 0, 16), ("b", 0, 8), 0],
        [("a", 16, 32), ("b", 8, 16), 0],
        [("a", 32, 40), ("b", 16, 32), 0],
        [("b", 32, 40), 1],
    ]


def test_no_decode_waits_for_more_than_the_stated_prefill(make_driver):
    """Only beside decodes: with nothing to wait, a prefill takes the whole batch."""
    config = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4, max_prefill_tokens_per_step=6)
    driver = make_driver(device=1000, scheduler_config=config)
    driver.submit("a", A, 20)
    assert driver.begin().num_tokens == 40
    driver.finish(driver.batches[-1][1])
    driver.submit("b", B)
    for number in range(7):
        batch = driver.begin()
        assert [item.end - item.start for item in batch.prefills] == [min(6, 40 - 6 * number)]
        assert len(batch.decodes) == 1
        driver.finish(batch)
    assert driver.answer("b").finish_reason is FinishReason.ANSWERED


def test_many_steps_at_once_stay_within_the_reserved_memory(make_driver):
    config = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4, answer_headroom_tokens=5)
    driver = make_driver(device=1000, scheduler_config=config)
    driver.submit("a", A, 40)
    driver.step()
    steps = []
    while len(driver.scheduler):
        batch = driver.begin(100)
        steps.append(batch.steps)
        driver.finish(batch)
        driver.scheduler.check()
    assert steps[0] == 5 and sum(steps) == 39, "the head-room, then what a page holds"


def test_a_chunk_ends_with_the_fixed_prompt_which_is_stored_by_itself(make_driver):
    driver = make_driver("ste")
    driver.serve("r", A, agent="a", fixed_tokens=31)
    first, second = (batch.prefills[0] for _, batch in driver.batches)
    assert (first.start, first.end, first.store, first.last) == (0, 30, (0, 30), False)
    assert (second.start, second.end, second.store, second.last) == (30, 40, (30, 40), True)
    nodes = driver.system.tiers.lookup(A).nodes
    assert [node.length for node in nodes] == [30, 10] and driver.system.tiers.tree.prompt_ends == {"a": nodes[0]}


def test_an_agents_fixed_prompt_is_learned_from_its_calls(make_driver):
    driver = make_driver("ste")
    driver.serve("r", [*A[:20], *B[:7]], agent="a")
    assert not driver.system.tiers.tree.prompt_ends
    driver.serve("s", [*A[:20], *C[:8]], agent="a")
    end = driver.system.tiers.tree.prompt_ends["a"]
    assert end.end == 20
    driver.serve("t", [*A[:20], *D[:9]], agent="a")
    assert driver.system.tiers.tree.prompt_ends["a"] is end


def test_discarded_suffixes_leave_the_fixed_prompt(make_driver):
    driver = make_driver("ste")
    driver.serve("r", A, 2, agent="a", fixed_tokens=20, store_policy=StorePolicy.DISCARD)
    assert driver.cached(A) == 20 and driver.system.tiers.pools[Tier.DEVICE].used == 20


def test_memory_is_reserved_until_the_end_so_all_that_is_admitted_can_finish(make_driver):
    driver = make_driver(device=100)
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        driver.submit(name, prompt, 5)
    batch = driver.begin()
    assert [item.request.id for item in batch.prefills] == ["a", "b"], "c has no room before one of them ends"
    driver.finish(batch)
    driver.run()
    reasons = {ended.request.id: ended.finish_reason for ended in driver.ended}
    assert reasons == dict.fromkeys("abc", FinishReason.ANSWERED)
    assert driver.scheduler.metrics.admissions_refused > 0


def test_what_does_not_fit_is_passed_until_patience_ends(make_driver):
    config = SchedulerConfig(max_num_batched_tokens=200, max_num_seqs=8, allocation_patience_s=3.0, timeout_s=1e4)
    driver = make_driver("lru", device=100, scheduler_config=config)
    driver.submit("first", A[:10], 30)
    driver.step()
    driver.submit("large", B, 45)
    for number in range(40):
        driver.submit(f"small{number}", [5000 + number, 1], 4)
    driver.run()
    order = sorted(driver.ended, key=lambda ended: ended.times.admitted)
    place = [ended.request.id for ended in order].index("large")
    assert 1 < place < 35, "others passed it, but not for ever"
    assert all(ended.finish_reason is FinishReason.ANSWERED for ended in driver.ended)


def test_cancelled_in_every_state(make_driver):
    driver = make_driver(device=100, link=100.0, costs=LinearCosts(50.0, (100.0, 0.0)))
    driver.serve("fill", A)
    driver.send_down()
    pool = driver.system.tiers.pools[Tier.DEVICE]
    for name, prompt in (("loading", [*A, 1]), ("prefill", D), ("waiting", B)):
        driver.submit(name, prompt, 5)
    batch = driver.begin()
    assert [item.request.id for item in batch.prefills] == ["prefill"]
    driver.cancel("prefill")
    assert not driver.scheduler.take_finished(), "it is being computed: it ends when the batch is back"
    for name in ("loading", "waiting"):
        driver.cancel(name)
    driver.scheduler.cancel(1000)  # nobody's
    driver.finish(batch)
    assert {e.request.id: e.finish_reason for e in driver.ended[-3:]} == dict.fromkeys(
        ("loading", "waiting", "prefill"), FinishReason.CANCELLED
    )
    assert driver.answer("loading").error == "the request was cancelled"
    driver.scheduler.check()
    assert len(driver.scheduler) == 0 and pool.reserved == 0 and not driver.system.tiers.handles
    driver.submit("decode", D[:10], 9)
    driver.step()
    batch = driver.begin()
    assert batch.decodes
    driver.cancel("decode")
    driver.finish(batch)
    assert driver.answer("decode").num_output_tokens == 1 and pool.reserved == 0


def test_timed_out_in_every_state(make_driver):
    config = SchedulerConfig(max_num_batched_tokens=64, prefill_chunk_size=4, max_num_seqs=2)
    driver = make_driver(device=200, link=10.0, costs=LinearCosts(1.0, (10.0, 0.0)), scheduler_config=config)
    for name, prompt in (("fill", A), ("fill2", C[:10])):
        driver.serve(name, prompt)
    driver.send_down()
    driver.submit("loading", [*A, 1], timeout_s=2.0)
    driver.submit("loaded", [*C[:10], 1], timeout_s=6.0)
    driver.submit("decode", B[:4], 50, timeout_s=9.0)
    driver.submit("prefill", D, timeout_s=0.1)
    driver.submit("waiting", B, timeout_s=1.0)
    driver.submit("late", [*D, 1], 30)
    driver.run()
    states = {
        "loading": "2 s; its KV was being loaded",
        "loaded": "6 s; its KV was loaded, and it was waiting for a place in the batch",
        "decode": "9 s; its answer was being computed",
        "prefill": "0.1 s; its prompt was being computed",
        "waiting": "1 s; it was waiting to be admitted",
    }
    for name, told in states.items():
        ended = driver.answer(name)
        assert (ended.finish_reason, ended.error) == (FinishReason.TIMED_OUT, f"it was not answered within {told}")
    assert 0 < driver.answer("decode").num_output_tokens < 50 and driver.answer("prefill").num_output_tokens == 0
    assert driver.answer("late").finish_reason is FinishReason.ANSWERED


def test_a_failed_item_ends_its_request_and_a_failed_batch_all_of_it(make_driver):
    driver = make_driver(device=200)
    driver.submit("a", A, 3)
    driver.submit("b", B, 3)
    batch = driver.begin()
    batch.prefills[0].error = RuntimeError("NaN in layer 3")
    driver.finish(batch)
    assert driver.answer("a").error == "computing it failed: RuntimeError: NaN in layer 3"
    batch = driver.begin()
    driver.scheduler.complete(batch, MemoryError("no memory"))
    driver.take()
    assert driver.answer("b").finish_reason is FinishReason.FAILED
    assert driver.answer("b").error == "computing it failed: MemoryError: no memory"
    driver.scheduler.check()


def test_a_payload_that_cannot_be_stored_costs_nobody_an_answer(make_driver, caplog):
    """A cache may forget: the request goes on, and the next chunk offers more."""
    driver = make_driver(scheduler_config=SchedulerConfig(max_num_batched_tokens=65, prefill_chunk_size=20))
    driver.submit("c", C, 2)
    batch = driver.begin()
    assert batch.prefills[0].store == (0, 20)
    batch.prefills[0].payload = PhantomPayload(3, 3)
    driver.scheduler.complete(batch)
    assert "'c' is not stored: ValueError('got a payload of 3 tokens; accepted: one of the 20 tokens" in caplog.text
    batch = driver.begin()
    assert batch.prefills[0].store == (0, 40) and driver.cached(C) == 0
    driver.finish(batch)
    driver.run()
    assert driver.answer("c").finish_reason is FinishReason.ANSWERED and driver.cached(C) == 40
    assert (driver.scheduler.metrics.stores, driver.scheduler.metrics.stores_failed) == (1, 1)


def test_closing_ends_everything(make_driver):
    driver = make_driver(device=100)
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        driver.submit(name, prompt, 5)
    batch = driver.begin()
    assert batch is not None
    driver.scheduler.close("the server stops")
    driver.take()
    assert {(ended.request.id, ended.error) for ended in driver.ended} == {(n, "the server stops") for n in "abc"}
    with pytest.raises(ValueError, match="the scheduler is closed: the server stops"):
        driver.submit("d", D)
    with pytest.raises(ValueError, match="is not in flight"):
        driver.scheduler.complete(batch)


def test_many_steps_at_once_when_nothing_else_is_to_be_done(make_driver):
    driver = make_driver(device=200, scheduler_config=SchedulerConfig(max_num_batched_tokens=100, max_num_seqs=8))
    driver.submit("a", A, 10)
    driver.submit("b", B, 6)
    assert driver.begin(100).steps == 1, "beside prefills"
    driver.finish(driver.batches[-1][1])
    batch = driver.begin(100)
    assert batch.steps == 5 and len(batch.decodes) == 2
    batch.steps = 3
    driver.finish(batch)
    assert driver.begin(100).steps == 2
    driver.finish(driver.batches[-1][1])
    assert [ended.request.id for ended in driver.ended] == ["b"]
    driver.run(max_steps=100)
    assert driver.answer("a").num_output_tokens == 10 and driver.answer("a").tokens == []
    assert driver.scheduler.metrics.decode_tokens == 9 + 5


def test_an_answer_may_end_early(make_driver):
    driver = make_driver()
    driver.submit("a", A, 30)
    batch = driver.begin()
    batch.prefills[0].tokens, batch.prefills[0].finished = [3], True
    driver.finish(batch)
    assert driver.answer("a").tokens == [3] and driver.system.tiers.pools[Tier.DEVICE].reserved == 0


def test_a_request_whose_own_cached_prompt_is_in_the_way_is_computed_without_it(make_driver):
    """The cached KV takes twice the bytes a token that computing takes: both do not fit beside each other."""
    driver = make_driver("lru", device=60)
    tiers = driver.system.tiers
    with tiers.open(A) as handle:
        tiers.store(handle, A, PhantomPayload(40, 55))
    ended = driver.serve("r", A, 10)
    assert ended.finish_reason is FinishReason.ANSWERED and ended.cached_tokens == 0


def test_what_can_never_be_is_refused_at_once(make_driver):
    driver = make_driver(device=100, scheduler_config=SchedulerConfig(max_queued_requests=2, max_num_seqs=4))
    with pytest.raises(ValueError, match=r"'r' needs 102 bytes for 101 \+ 1 tokens, in whole pages; the device's pool"):
        driver.submit("r", list(range(101)), 61)
    with pytest.raises(ValueError, match="'r' has an empty prompt"):
        driver.submit("r", [])
    with pytest.raises(ValueError, match="accepted: one row of integers"):
        driver.submit("r", [[1], [2]])
    driver.submit("r", A)
    driver.submit("s", B)
    with pytest.raises(ValueError, match="the queue is full: at most 2 requests"):
        driver.submit("t", C)
    batch = driver.begin()
    with pytest.raises(ValueError, match="still in flight"):
        driver.scheduler.next_batch()
    with pytest.raises(ValueError, match="max_steps=0"):
        driver.scheduler.next_batch(0)
    driver.finish(batch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": ""}, "as the name of a request|one of 0 characters"),
        ({"max_new_tokens": 0}, "got max_new_tokens=0 for a request; accepted: a whole number from 1 up"),
        ({"fixed_tokens": -1}, "got fixed_tokens=-1"),
        ({"max_new_tokens": True}, "got max_new_tokens=True"),
        ({"priority": 2}, "got priority=2 for a request; accepted: 0 to 1"),
        ({"priority": float("nan")}, "got priority=nan"),
        ({"timeout_s": 0}, "got timeout_s=0 for a request; accepted: seconds above 0"),
        ({"agent": 5}, "got 5 as the name of an agent"),
        ({"expected_tokens": 0}, "got expected_tokens=0"),
    ],
)
def test_requests_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"id": "r", "prompt": A, "max_new_tokens": 1, **fields})


def test_the_config_is_checked():
    with pytest.raises(ValueError, match="got 0 as max_num_batched_tokens; accepted: a whole number of 1 or more"):
        SchedulerConfig(max_num_batched_tokens=0)
    with pytest.raises(ValueError, match="=64 and max_num_seqs=64; accepted: more tokens than sequences"):
        SchedulerConfig(max_num_batched_tokens=64)
