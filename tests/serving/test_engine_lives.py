"""Lives of requests and of engines: preempted, restarted, flushed, cancelled, sampled, and read by many clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tenure.eviction import Session, evict
from tenure.serving import (
    EngineClient,
    EngineClientConfig,
    FinishReason,
    Gone,
    QueueFull,
    Request,
    SamplingParams,
    SchedulerConfig,
    Tier,
    system_names,
)
from tenure.serving.engine import Compression, Engine
from tenure.serving.fingerprint import kv_fingerprint
from tenure.serving.sampling.params import FinishedBy
from tenure.serving.scheduler.request_state import RequestStatus

from .engines import (
    PAGE,
    RETENTION,
    answer_without_cache,
    check_memory,
    close,
    fixed_prompt,
    gates_of,
    make_engine,
    tokens,
)

both = pytest.mark.parametrize("how", [None, RETENTION], ids=["plain", "compressed"])
CANCELLED_IN = [status for status in RequestStatus if status is not RequestStatus.ENDED]
ROOMY = SchedulerConfig(answer_headroom_tokens=1, page_patience_s=0.0)


class Letters:
    """A tokenizer of which every token is a letter."""

    def decode(self, ids, **_):
        return "".join(chr(ord("a") + token % 26) for token in ids)


def stepped(engine: Engine, most: int = 2000) -> Iterator:
    """The outputs of all requests; the memory is counted after every step."""
    for _ in range(most):
        if not len(engine.system.scheduler):
            break
        yield from engine.step()
        check_memory(engine)
    yield from engine._take_finished()


# Preemption -----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", system_names())
def test_answers_that_are_preempted_again_and_again_are_the_same(session, name, how, tmp_path):
    """Room for two answers of five: tokens that were sampled are kept, and computed anew or found in the cache."""
    disk = None if name == "lru" else tmp_path
    engine = make_engine(session, name, how, prompts=0.5, host=2.0, disk=disk, config=ROOMY)
    sampling = [SamplingParams(), *(SamplingParams(temperature=1.0, seed=i, ignore_eos=True) for i in range(1, 5))]
    agents = range(5) if how is None else [0] * 5  # who share what is compressed, so that all of them run
    prompts = [fixed_prompt(agent)[:40] + tokens(70 + i, 3) for i, agent in enumerate(agents)]
    options = [{"agent": f"agent{agent}", "fixed_tokens": 40} for agent in agents]
    wanted = {}
    for i in range(5):
        alone = make_engine(session, "lru", how, prompts=4.0, host=0)
        alone.submit(Request(str(i), prompts[i], 40, sampling=sampling[i], **options[i]))
        (wanted[str(i)],) = (one.tokens for one in alone.run())
        close(alone)
    assert wanted["0"] == answer_without_cache(session, prompts[0], how, 40, count=40)
    for i in range(5):
        engine.submit(Request(str(i), prompts[i], 40, sampling=sampling[i], **options[i]))
    ended = list(stepped(engine))
    assert {one.request.id: one.tokens for one in ended} == wanted
    assert sum(one.num_preemptions for one in ended) >= 2
    assert sum(len(one.tokens) for one in ended) == sum(map(len, wanted.values()))
    close(engine)


@both
def test_an_answer_that_fills_the_device_ends_with_what_there_is(session, how):
    engine = make_engine(session, "lru_reactive", how, prompts=0.0, host=0, config=ROOMY)
    prompt = tokens(1, 45)
    engine.submit(Request("r", prompt, 200, agent="a", fixed_tokens=40, sampling=SamplingParams(ignore_eos=True)))
    (ended,) = stepped(engine)
    assert ended.finish_reason is FinishReason.LENGTH and "it needs more than" in (ended.error or "")
    assert 20 <= ended.num_output_tokens == len(ended.tokens) < 200
    roomy = make_engine(session, "lru_reactive", how, prompts=8.0, host=0)
    sampling = SamplingParams(ignore_eos=True)
    roomy.submit(Request("r", prompt, len(ended.tokens), agent="a", fixed_tokens=40, sampling=sampling))
    assert [one.tokens for one in roomy.run()] == [ended.tokens]
    close(roomy)
    close(engine)


# Restarts, flushes, weights -------------------------------------------------------------------------------------------


def first_life(session: Session, how: Compression | None, folder) -> list[int]:
    """An engine whose prompt ends on disk; returns the prompt."""
    engine = make_engine(session, "lru_reactive", how, prompts=1.0, host=0, disk=folder)
    prompt = tokens(1, 61)
    for i, one in enumerate([prompt, *(tokens(50 + i, 61) for i in range(5))]):
        engine.submit(Request("r", one, 2, agent=f"a{i}", fixed_tokens=40))
        list(engine.run())
    close(engine)
    return prompt


def second_life(session: Session, how: Compression | None, folder, prompt: list[int], page: int = PAGE) -> int:
    """Cached tokens of the same prompt in a further engine on the folder; its answer is right."""
    engine = make_engine(session, "lru_reactive", how, prompts=2.0, host=0, disk=folder)
    engine.submit(Request("r", prompt, 3, agent="a0", fixed_tokens=40))
    (ended,) = engine.run()
    assert ended.tokens == answer_without_cache(session, prompt, how, 40, count=3)
    close(engine)
    return ended.cached_tokens


@both
def test_an_engine_finds_the_prompts_of_the_one_before_it(session, how, tmp_path):
    prompt = first_life(session, how, tmp_path)
    assert second_life(session, how, tmp_path, prompt) == 56
    if how is not None:
        other = replace(how, budget=0.5)
        assert second_life(session, other, tmp_path, prompt) == 0, "compressed in another way"
        assert second_life(session, None, tmp_path, prompt) == 0
    assert second_life(session, how, tmp_path, prompt) == 56


@both
def test_an_engine_of_another_kind_finds_nothing(tiny_model, how, tmp_path):
    """Other weights, other gates, gates that compute otherwise with the same weights, and another dtype."""
    model = tiny_model("llama")
    with evict(model, "full", gates=gates_of(model), observe=["retention"]) as session:
        prompt = first_life(session, how, tmp_path)
        known = kv_fingerprint(session)
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 0.5
    changed = gates_of(model, activation="relu")
    changed.load_state_dict(gates_of(model).state_dict())
    halved = tiny_model("llama").bfloat16()
    kinds = [(other, gates_of(other)), (model, gates_of(model, seed=2)), (model, changed), (halved, gates_of(halved))]
    prints = {known}
    for one, gates in kinds:
        with evict(one, "full", gates=gates, observe=["retention"]) as session:
            prints.add(kv_fingerprint(session))
            if one is not halved:  # whose greedy answer depends on how it is computed
                assert second_life(session, how, tmp_path / str(len(prints)), prompt) == 0
    assert len(prints) == 5
    with evict(model, "full", gates=gates_of(model), observe=["retention"]) as session:
        assert kv_fingerprint(session) == known and second_life(session, how, tmp_path, prompt) == 56


@both
def test_another_kind_on_the_same_folder_finds_nothing(tiny_model, how, tmp_path):
    model = tiny_model("llama")
    with evict(model, "full", gates=gates_of(model), observe=["retention"]) as session:
        prompt = first_life(session, how, tmp_path)
    with evict(model, "full", gates=gates_of(model, seed=2), observe=["retention"]) as session:
        assert second_life(session, how, tmp_path, prompt) == 0


@both
@pytest.mark.parametrize("told", [True, False], ids=["flush", "noticed"])
def test_new_weights_in_the_middle(session, how, told, tmp_path):
    """What runs on old KV ends, what waits goes on; nothing that was stored before is found, in no tier."""
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64)
    engine = make_engine(session, "lru_reactive", how, prompts=3.0, host=3.0, disk=tmp_path, config=config)
    prompt, options = tokens(1, 61), {"agent": "a", "fixed_tokens": 40}
    engine.submit(Request("before", prompt, 2, **options))
    list(engine.run())
    running = engine.submit(Request("running", tokens(2, 20), 30))
    waiting = engine.submit(Request("waiting", prompt, 4, **options))
    for _ in range(4):
        engine.step()
    with torch.no_grad():
        weight = session.model.model.layers[0].self_attn.k_proj.weight
        if told:
            weight.data = weight.data * 1.5
            engine.flush()
        else:
            weight.mul_(1.5)
    ended = {one.number: one for one in stepped(engine)}
    assert ended[running].finish_reason is FinishReason.CANCELLED
    assert ended[running].error == "the cache was flushed, as what made its KV has changed"
    assert ended[waiting].cached_tokens == 0
    assert ended[waiting].tokens == answer_without_cache(session, prompt, how, 40, count=4)
    engine.submit(Request("after", prompt, 4, **options))
    (after,) = engine.run()
    assert after.cached_tokens == 56 and after.tokens == ended[waiting].tokens
    close(engine)


# Cancellation ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("status", CANCELLED_IN)
def test_a_request_is_cancelled_in_every_state(session, how, status, monkeypatch):
    """Its memory is free, and the others' answers are theirs."""
    config = SchedulerConfig(
        max_num_seqs=2, max_num_batched_tokens=32, prefill_chunk_size=16, load_timeout_factor=1e6
    )  # fmt: skip
    loads = status in (RequestStatus.LOADING, RequestStatus.LOADED)
    speed = 3e5 if status is RequestStatus.LOADING else None
    engine = make_engine(session, "lru_reactive", how, prompts=2.6, host=20.0, speed=speed, config=config)
    prompt, options = tokens(1, 61), {"agent": "a", "fixed_tokens": 40}
    for i, one in enumerate([prompt, *(tokens(90 + i, 61) for i in range(5))]):
        engine.submit(Request("before", one, 1, agent=f"a{i}" if i else "a", fixed_tokens=40))
        list(engine.run())
    while engine.system.tiers.has_transfers:  # what has made room
        engine.step(0.01)
    busy = status is RequestStatus.WAITING
    greedy = SamplingParams(ignore_eos=True)
    others = [engine.submit(Request("other", tokens(5 + i, 9), 30, sampling=greedy)) for i in range(2 if busy else 1)]
    for _ in range(3):
        engine.step()
    mine = prompt if loads else tokens(7, 90)
    number = engine.submit(Request("mine", mine, 20, **options))
    state = engine.system.scheduler._requests[number]
    ended = []
    if status is RequestStatus.LOADED:  # the last place in the batch is taken while it loads
        backend, held = engine.system.tiers.transfers.backend, []
        copy = backend.submit
        with monkeypatch.context() as patched:
            patched.setattr(backend, "submit", lambda job: (held.append if job.target is Tier.DEVICE else copy)(job))
            while not (state.status is RequestStatus.LOADING and held) and not state.ended:
                ended += engine.step(0.001)
            others.append(engine.submit(Request("other", tokens(6, 9), 30, sampling=greedy)))
            while len(engine._answering) < 2 and not state.ended:
                ended += engine.step(0.001)
        for job in held:
            backend.submit(job)
    for _ in range(200):
        if state.status is status or state.ended:
            break
        ended += engine.step(0.001)
    assert state.status is status
    engine.cancel(number)
    ended += stepped(engine)
    found = {one.number: one for one in ended}
    assert found[number].finish_reason is FinishReason.CANCELLED
    for other in others:
        wanted = answer_without_cache(session, found[other].request.prompt.tolist(), None, count=30)
        assert found[other].tokens[: len(wanted)] == wanted and len(found[other].tokens) == 30
    engine.submit(Request("again", mine, 4, **options))
    (again,) = engine.run()
    assert again.tokens == answer_without_cache(session, mine, how, 40, count=4)
    close(engine)


# Sampling -------------------------------------------------------------------------------------------------------------


def test_stop_texts_end_answers_before_them(session):
    engine = make_engine(session, "lru_reactive", prompts=8.0, tokenizer=Letters())
    prompt = tokens(1, 20)
    sampling = SamplingParams(ignore_eos=True)
    engine.submit(Request("whole", prompt, 12, sampling=sampling))
    (whole,) = engine.run()
    text = Letters().decode(whole.tokens)
    stop = text[4:6]
    at = text.index(stop)
    number = engine.submit(Request("cut", prompt, 12, sampling=replace(sampling, stop=(stop,))))
    events = []
    while len(engine.system.scheduler):
        engine.step()
        events += engine.take_events()
    assert all(event.number == number for event in events)
    assert "".join(event.text or "" for event in events) == text[:at]
    cut = events[-1].finished
    assert cut is not None and cut.finished_by is FinishedBy.STOP_TEXT and cut.finish_reason is FinishReason.ANSWERED
    assert cut.tokens == whole.tokens[: at + 2] == [token for event in events for token in event.tokens]
    plain = make_engine(session, "lru_reactive", prompts=8.0)
    with pytest.raises(ValueError, match="got stop texts for an engine without a tokenizer"):
        plain.submit(Request("cut", prompt, 12, sampling=replace(sampling, stop=(stop,))))
    close(plain)
    close(engine)


@both
def test_seeds_give_the_same_answers_whatever_else_is_computed(session, how):
    sampling = [SamplingParams(temperature=0.9, top_p=0.9, seed=i, ignore_eos=True) for i in range(4)]
    prompts = [fixed_prompt(i)[:40] + tokens(i, 7) for i in range(4)]
    answers = []
    for order, config in (
        ((0, 1, 2, 3), None),
        ((2, 0, 3, 1), SchedulerConfig(max_num_batched_tokens=21, max_num_seqs=3)),
    ):
        engine = make_engine(session, "lru_reactive", how, prompts=20.0, config=config)
        for i in order:
            engine.submit(Request(str(i), prompts[i], 15, agent=f"a{i}", fixed_tokens=40, sampling=sampling[i]))
            assert not engine.step(), "none has ended yet"
        answers.append({one.request.id: one.tokens for one in stepped(engine)})
        close(engine)
    assert answers[0] == answers[1] and len({tuple(one) for one in answers[0].values()}) == 4


# Clients --------------------------------------------------------------------------------------------------------------


@both
def test_many_clients_read_the_answers_of_the_model(session, how):
    """From threads and from asyncio at once, with too little room for all."""
    prompts = [fixed_prompt(i % 3)[:40] + tokens(200 + i, 5 + i % 4) for i in range(16)]
    wanted = [answer_without_cache(session, prompt, how, 40) for prompt in prompts]
    engine = make_engine(session, "lru_reactive", how, prompts=2.0, host=4.0, config=ROOMY)
    with EngineClient(engine) as client:

        def make(i: int) -> Request:
            return Request("same", prompts[i], 6, agent=f"agent{i % 3}", fixed_tokens=40)

        async def read(i: int) -> list[int]:
            return [token async for event in client.submit(make(i)) for token in event.tokens]

        async def read_all() -> list[list[int]]:
            return await asyncio.gather(*(read(i) for i in range(8, 16)))

        with ThreadPoolExecutor(9) as pool:
            in_loop = pool.submit(asyncio.run, read_all())
            in_threads = list(pool.map(lambda i: client.submit(make(i)).result(60).tokens, range(8)))
            assert in_threads == wanted[:8] and in_loop.result(60) == wanted[8:]
    close(engine)


def test_several_answers_to_one_prompt_compute_it_once(session):
    engine = make_engine(session, "lru_reactive", prompts=20.0)
    prompt = tokens(1, 61)
    request = Request("r", prompt, 10, sampling=SamplingParams(n=4, temperature=1.0, seed=7, ignore_eos=True))
    with pytest.raises(ValueError, match=r"got n=4 for one request; accepted: a request for each"):
        engine.submit(request)
    with EngineClient(engine, EngineClientConfig(max_unfinished=5)) as client:
        with pytest.raises(ValueError, match="got 1 detokenizers for n=4; accepted: one for each answer, or none"):
            client.submit_choices(request, [object()])  # pyright: ignore[reportArgumentType]
        streams = client.submit_choices(request)
        answers = [stream.result(30).tokens for stream in streams]
        assert len({tuple(answer) for answer in answers}) == 4 and all(len(answer) == 10 for answer in answers)
        assert engine.system.scheduler.metrics.prefill_tokens == 61 + 3 * 5
        again = [stream.result(30).tokens for stream in client.submit_choices(request)]
        assert again == answers
        (first,) = client.submit_choices(replace(request, sampling=replace(request.sampling, n=1)))
        assert first.result(30).tokens == answers[0]
    close(engine)


def test_several_answers_are_taken_all_or_none(session):
    engine = make_engine(session, "lru_reactive", prompts=20.0)
    request = Request("r", tokens(1, 20), 400, sampling=SamplingParams(n=4, ignore_eos=True))
    with EngineClient(engine, EngineClientConfig(max_unfinished=5)) as client:
        other = client.submit_choices(replace(request, sampling=SamplingParams(n=2, ignore_eos=True)))
        with pytest.raises(QueueFull):
            client.submit_choices(request)
        for stream in other:
            client.cancel(stream)
        with pytest.raises(Gone):
            other[0].result(30)
        assert client.drain(30.0), "the three that were taken have been cancelled"
    close(engine)
