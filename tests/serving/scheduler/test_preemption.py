"""Memory as it is needed: admission without the whole answer, growth by pages, and preemption without loss."""

from __future__ import annotations

import pytest

from tenure.serving import FinishReason, PhantomPayload, SchedulerConfig, StorePolicy, Tier
from tenure.serving.scheduler.request_state import RequestState

from .conftest import Driver

A, B, C = ([n * 1000 + k for k in range(40)] for n in (1, 2, 3))


def model(known: list[int]) -> int:
    """The next token of a model that reads everything before it."""
    state = 1
    for token in known:
        state = (state * 31 + token + 7) % 9973
    return state % 89


def answer_of(prompt: list[int], length: int) -> list[int]:
    known = list(prompt)
    for _ in range(length):
        known.append(model(known))
    return known[len(prompt) :]


class Computing:
    """A driver whose tokens are the model's, and which holds what it has computed, as an engine does.

    Args:
        lengths: of answers that end before `max_new_tokens`, by label.
    """

    def __init__(self, driver: Driver, lengths: dict[str, int] | None = None) -> None:
        self.driver, self.lengths = driver, lengths or {}
        self.held: dict[RequestState, int] = {}  # tokens with KV on the device
        self.preempted: list[str] = []
        self.most = 0

    def step(self) -> bool:
        batch = self.driver.begin()
        if batch is None:
            due = self.driver.scheduler.next_time()
            if due is not None:
                self.driver.clock.advance_to(due)
            return due is not None or not len(self.driver.scheduler)
        for state in batch.preempted:
            self.preempted.append(state.request.id)
            assert self.held.pop(state, None) is not None or state.num_output_tokens == 0
        for item in batch.prefills:
            if item.first:
                assert item.state not in self.held and item.start == item.handle.length
                self.held[item.state] = item.start
            assert self.held[item.state] == item.start
            self.held[item.state] = item.end
            assert item.token_ids.tolist() == self.known(item.state)[item.start : item.end]
            if item.last:
                self.answer(item)
        for item in batch.decodes:
            self.held[item.state] += 1
            self.answer(item)
            span = item.store_span()
            if span is not None:
                item.payload = PhantomPayload(span[1] - span[0], span[1] - span[0])
        self.most = max(self.most, len(batch.prefills) + len(batch.decodes))
        self.driver.finish(batch)
        self.driver.scheduler.check()
        return True

    @staticmethod
    def known(state: RequestState) -> list[int]:
        return [*state.request.prompt.tolist(), *state.output_tokens]  # pyright: ignore[reportAttributeAccessIssue]

    def answer(self, item) -> None:
        item.tokens = [model(self.known(item.state))]
        item.finished = self.lengths.get(item.request.id) == item.state.num_output_tokens + 1

    def run(self) -> dict[str, FinishReason]:
        for _ in range(20_000):
            self.driver.take()
            if not len(self.driver.scheduler):
                break
            assert self.step(), "something comes next"
        return {ended.request.id: ended.finish_reason for ended in self.driver.ended}


@pytest.fixture
def make_computing(make_driver):
    def make(device: int, config: dict | None = None, lengths: dict[str, int] | None = None, **options) -> Computing:
        fields = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "answer_headroom_tokens": 4, "timeout_s": 1e5}
        scheduler_config = SchedulerConfig(**{**fields, **(config or {})})
        return Computing(make_driver(device=device, scheduler_config=scheduler_config, **options), lengths)

    return make


def test_requests_that_ask_for_more_than_they_use_run_together(make_computing):
    """Reserved in full, one would run at a time; with the head-room only, all three."""
    computing = make_computing(device=150, lengths=dict.fromkeys("abc", 4))
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        computing.driver.submit(name, prompt, 100)
    assert set(computing.run().values()) == {FinishReason.ANSWERED}
    assert computing.most == 3 and not computing.preempted


@pytest.mark.parametrize("policy", StorePolicy)
def test_preempted_answers_go_on_token_for_token(make_computing, policy):
    """Three answers do not fit beside each other: the youngest gives way, and its answer is that of a run alone."""
    computing = make_computing(device=150)
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        computing.driver.submit(name, prompt, 50, store_policy=policy)
    assert set(computing.run().values()) == {FinishReason.ANSWERED}
    assert computing.preempted and "a" not in computing.preempted, "the oldest never gives way"
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        ended = computing.driver.answer(name)
        assert ended.tokens == answer_of(prompt, 50) and ended.num_output_tokens == 50
        assert ended.num_preemptions == computing.preempted.count(name)
        assert ended.cached_tokens == 0, "what it had computed itself was not found in the cache"
    assert computing.driver.scheduler.metrics.preemptions == len(computing.preempted)


def test_a_preempted_request_goes_on_from_its_pages(make_computing):
    """The pages of the youngest lie in the tree, below on the host, and are loaded instead of computed."""
    computing = make_computing(device=150)
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        computing.driver.submit(name, prompt, 50)
    computing.run()
    computed = computing.driver.scheduler.metrics.prefill_tokens
    assert len(computing.preempted) >= 2 and computed < 120 + 45 * len(computing.preempted)
    assert sum(ended.loaded_tokens for ended in computing.driver.ended) > 0


def test_a_higher_priority_is_a_higher_claim(make_computing):
    computing = make_computing(device=150)
    for name, prompt, priority in (("a", A, 0.0), ("b", B, 1.0), ("c", C, 1.0)):
        computing.driver.submit(name, prompt, 50, priority=priority)
    computing.run()
    assert computing.preempted[0] == "a" and "b" not in computing.preempted


def test_a_preempted_request_gets_a_token_before_it_is_preempted_again(make_computing):
    computing = make_computing(device=110, config={"answer_headroom_tokens": 1})
    progress: dict[str, list[int]] = {}
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        computing.driver.submit(name, prompt, 60)
    preempt = computing.driver.scheduler._admission.preempt

    def record(state):
        progress.setdefault(state.request.id, []).append(state.num_output_tokens)
        preempt(state)

    computing.driver.scheduler._admission.preempt = record
    assert set(computing.run().values()) == {FinishReason.ANSWERED}
    assert any(len(counts) > 1 for counts in progress.values())
    for counts in progress.values():
        assert counts == sorted(set(counts)), "every preemption comes after a further token"


def test_an_answer_that_outgrows_the_device_ends_with_what_it_has(make_computing):
    computing = make_computing(device=100)
    computing.driver.submit("a", A, 1000)
    assert computing.run() == {"a": FinishReason.LENGTH}
    ended = computing.driver.answer("a")
    assert ended.num_output_tokens == 61 and ended.tokens == answer_of(A, 61), "the last token has no KV"
    assert ended.error == (
        "the answer was cut short after 61 tokens: with the 40 of the prompt it needs more than the 100 bytes of the "
        "device's pool"
    )


def test_beside_others_only_the_one_that_outgrows_the_device_is_cut_short(make_computing):
    computing = make_computing(device=100)
    for name, prompt, new in (("a", A, 1000), ("b", B[:10], 20), ("c", C[:10], 20)):
        computing.driver.submit(name, prompt, new)
    assert computing.run() == {"a": FinishReason.LENGTH, "b": FinishReason.ANSWERED, "c": FinishReason.ANSWERED}
    assert computing.driver.answer("b").tokens == answer_of(B[:10], 20)


def test_what_fits_with_a_page_is_accepted_and_what_does_not_is_refused(make_computing):
    computing = make_computing(device=40)
    with pytest.raises(ValueError, match=r"'r' needs 41 bytes for 40 \+ 1 tokens, in whole pages; the device's pool"):
        computing.driver.submit("r", A, 1000)
    computing.driver.submit("s", A[:38], 10**6)
    assert computing.run() == {"s": FinishReason.LENGTH}


def test_whole_answers_are_reserved_on_request_and_nobody_is_preempted(make_computing):
    computing = make_computing(device=150, config={"reserve_answers": True})
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        computing.driver.submit(name, prompt, 50)
    assert set(computing.run().values()) == {FinishReason.ANSWERED}
    assert not computing.preempted and computing.most == 1
    with pytest.raises(ValueError, match=r"needs 151 bytes for 40 \+ 111 tokens"):
        computing.driver.submit("r", A, 111)


def test_a_device_of_pages_reserves_whole_ones(make_computing):
    computing = make_computing(device=100)
    computing.driver.system.tiers.pools[Tier.DEVICE].whole_pages = True
    computing.driver.submit("a", A[:39], 2)
    computing.step()
    pool = computing.driver.system.tiers.pools[Tier.DEVICE]
    assert pool.used == 42 and pool.reserved == 4, "38 tokens are stored, for the other three there are two pages"


def test_a_prefill_gives_way_to_an_older_answer(make_computing):
    computing = make_computing(device=100, config={"answer_headroom_tokens": 1, "prefill_chunk_size": 4})
    computing.driver.submit("a", A, 55)
    computing.step()
    while computing.driver.scheduler.metrics.decode_tokens < 10:
        computing.step()
    computing.driver.submit("b", B, 5)
    assert set(computing.run().values()) == {FinishReason.ANSWERED}
    assert computing.preempted == ["b"] * len(computing.preempted) and computing.preempted
    assert computing.driver.answer("b").tokens == answer_of(B, 5)


def test_an_answer_without_memory_gives_its_place_to_loaded_prompts(make_computing):
    """They hold the memory that it needs, have the higher claim, and wait for its place in the batch."""
    computing = make_computing(device=100, config={"answer_headroom_tokens": 1, "max_num_seqs": 1})
    driver = computing.driver
    driver.serve("before", A)
    driver.send_down()
    driver.submit("loads", A, 5)
    driver.submit("runs", B, 50)
    assert set(computing.run().values()) == {FinishReason.ANSWERED}
    assert computing.preempted == ["runs"] and driver.answer("loads").loaded_tokens == 38
    assert driver.answer("runs").tokens == answer_of(B, 50) and driver.answer("loads").tokens == answer_of(A, 5)


@pytest.mark.parametrize("moment", range(40))
def test_cancelled_at_every_moment_of_a_crowd(make_computing, moment):
    """Whatever the cancelled one is doing, also while it waits after a preemption, the others' answers are right."""
    computing = make_computing(device=110, config={"answer_headroom_tokens": 1})
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        computing.driver.submit(name, prompt, 30)
    for _ in range(2 * moment):
        computing.step()
    computing.driver.cancel("abc"[moment % 3])
    computing.run()
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        ended = computing.driver.answer(name)
        assert ended.tokens == answer_of(prompt, 30)[: len(ended.tokens)]
        assert ended.finish_reason is FinishReason.ANSWERED or name == "abc"[moment % 3]
    assert computing.driver.system.tiers.pools[Tier.DEVICE].reserved == 0


def test_sixty_four_clients_that_say_the_rest_of_the_context(make_computing):
    """Answers of 60 tokens: how much was asked for makes next to no difference."""
    seconds = {}
    for maximum in (64, 16384):
        config = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "answer_headroom_tokens": 64}
        computing = make_computing(40_000, config, {f"r{n}": 60 for n in range(64)}, host=400_000)
        for number in range(64):
            computing.driver.submit(f"r{number}", [number * 5000 + k for k in range(1000)], maximum)
        assert set(computing.run().values()) == {FinishReason.ANSWERED}
        seconds[maximum] = computing.driver.clock()
    assert seconds[16384] <= seconds[64] / 0.9
