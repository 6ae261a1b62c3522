"""Agent workflows on a model for real: whatever is cached, moved and evicted, the answers are those without it."""

from __future__ import annotations

import pytest

from tenure.eviction import evict
from tenure.serving import AllocStatus, FinishReason, Request, SamplingParams, Tier, system_names
from tenure.serving import engine as engine_module
from tenure.serving.engine import Compression
from tenure.serving.kvcache.base import Urgency
from tenure.serving.kvcache.transfer_queue import TransferJob

from .engines import (
    ANSWER,
    FIXED,
    PAGE,
    RETENTION,
    SUFFIX,
    answer_without_cache,
    calls,
    close,
    fixed_prompt,
    make_engine,
    request,
    tokens,
)

DEVICE_ONLY = ("lru", "vllm")


@pytest.mark.parametrize("how", [None, RETENTION], ids=["plain", "compressed"])
@pytest.mark.parametrize("name", system_names())
def test_answers_are_those_without_a_cache(session, name, how, tmp_path):
    """Too little room on the device and on the host: prompts go to the host, to disk, and come back."""
    disk = None if name in DEVICE_ONLY else tmp_path
    room = {"prompts": 1.7, "host": 1.5} if how is None else {"prompts": 0.7, "host": 0.8}
    engine = make_engine(session, name, how, disk=disk, **room)  # pyright: ignore[reportArgumentType]
    for number, (agent, prompt) in enumerate(calls()):
        engine.submit(request(number, agent, prompt))
        (ended,) = engine.run()
        assert ended.error is None and ended.finish_reason is FinishReason.ANSWERED
        assert ended.tokens == answer_without_cache(session, prompt, how), f"call {number}"
    statistics = engine.system.tiers.statistics
    assert statistics.evicted_copies > 0
    if name not in DEVICE_ONLY:  # these find nothing in a ring
        assert statistics.tokens_found > 0
        assert any(target is Tier.DEVICE for _, target in statistics.bytes_moved)
        assert statistics.bytes_moved[Tier.DEVICE, Tier.HOST] > 0
    if disk is not None:
        assert sum(moved for (source, _), moved in statistics.bytes_moved.items() if source is Tier.DISK) > 0
    if engine.system.prefetcher is not None:
        assert engine.system.prefetcher.statistics.started > 0
    close(engine)


@pytest.mark.parametrize("how", [None, RETENTION], ids=["plain", "compressed"])
@pytest.mark.parametrize("name", system_names())
def test_requests_that_run_together_do_not_disturb_each_other(session, name, how, monkeypatch, tmp_path):
    """Also while some are cancelled at any point: they leave the rows of a cache that others stay in."""
    widths = []
    real = engine_module.forward
    monkeypatch.setattr(engine_module, "forward", lambda *given: widths.append(len(given[1].tokens)) or real(*given))
    disk = None if name == "lru" else tmp_path
    engine = make_engine(session, name, how, prompts=3.7 if how is None else 2.7, host=1.5, disk=disk)
    wanted = {f"call{n}": answer_without_cache(session, prompt, how) for n, (_, prompt) in enumerate(calls())}
    numbers = [
        engine.submit(request(number, agent, prompt, session=f"s{number}"))
        for number, (agent, prompt) in enumerate(calls())
    ]
    ended = []
    for turn in range(1000):
        if turn % 4 == 3:
            engine.cancel(numbers[turn] if turn < len(numbers) else 0)
        ended += engine.step()
        if len(ended) == len(wanted):
            break
    assert {each.request.id for each in ended} == set(wanted) and len(ended) == len(wanted)
    assert max(widths) >= 3, "answers are decoded together"
    outcomes = {each.finish_reason for each in ended}
    assert outcomes == {FinishReason.ANSWERED, FinishReason.CANCELLED}
    for each in ended:
        if each.finish_reason is FinishReason.ANSWERED:
            assert each.tokens == wanted[each.request.id]
        else:
            assert each.tokens == wanted[each.request.id][: len(each.tokens)]
    close(engine)


def test_answers_that_were_decoded_together_are_stored(session):
    """Prompts of different lengths; a request that goes on from prompt and answer finds both."""
    engine = make_engine(session, "lru_reactive", prompts=20.0)
    prompts = [fixed_prompt(agent) + tokens(50 + agent, 9 + 5 * agent) for agent in range(3)]
    for number, prompt in enumerate(prompts):
        engine.submit(Request(f"first{number}", prompt, 12))
    answers = {each.request.id: each.tokens for each in engine.run()}
    for number, prompt in enumerate(prompts):
        known = prompt + answers[f"first{number}"]
        longer = known + tokens(60 + number, 7)
        engine.submit(Request(f"second{number}", longer, ANSWER))
        (ended,) = engine.run()
        assert ended.cached_tokens >= (len(known) - 1) // PAGE * PAGE > len(prompt)
        assert ended.tokens == answer_without_cache(session, longer, None)
    close(engine)


def test_a_forward_that_fails_ends_the_request_that_makes_it_fail(session, monkeypatch):
    """The others are tried alone, and go on; the pages of the one that failed are free."""
    engine = make_engine(session, "lru_reactive", prompts=6.0)
    real, bad = engine_module.forward, 0  # no prompt or answer here has it

    def failing(model, cache, rows):
        if any(bad in one.ids for one in cache.tokens):
            raise RuntimeError("this token breaks the device")
        return real(model, cache, rows)

    monkeypatch.setattr(engine_module, "forward", failing)
    for number, (agent, prompt) in enumerate(calls(1)[:3]):
        assert bad not in prompt
        engine.submit(request(number, agent, [*prompt, bad] if number == 1 else prompt))
    ended = {each.request.id: each for each in engine.run()}
    assert ended["call1"].finish_reason is FinishReason.FAILED and "breaks the device" in (ended["call1"].error or "")
    for number in (0, 2):
        assert ended[f"call{number}"].tokens == answer_without_cache(session, calls(1)[number][1], None)
    close(engine)


def test_a_compressed_prompt_takes_its_share_of_the_memory(session):
    """40 % of the entries, and the free slots of each head's last page."""
    plain, small = (make_engine(session, "ste", how, prompts=20.0) for how in (None, RETENTION))
    prompt = fixed_prompt(0)
    whole, part = (engine.prepare(prompt) for engine in (plain, small))
    assert (whole.tokens, part.tokens) == (FIXED, FIXED)
    assert 0.4 < part.nbytes / whole.nbytes < 0.4 + PAGE / FIXED
    for engine, payload in ((plain, whole), (small, part)):
        assert engine.store("agent0", prompt, payload) is AllocStatus.READY
        assert engine.store("agent0", prompt, engine.prepare(prompt)) is AllocStatus.READY, "it is there already"
        engine.submit(request(0, 0, prompt + tokens(7, SUFFIX)))
        (ended,) = engine.run()
        assert ended.cached_tokens == FIXED
        assert ended.tokens == answer_without_cache(session, prompt + tokens(7, SUFFIX), engine.compression)
        close(engine)


def test_a_compressed_prompt_never_needs_more_than_the_plain_one(session):
    """90 % of the entries in whole pages are as many pages as all of them, and there is no room beside the request."""
    how = Compression("retention", 0.9, sinks=2, recent=4)
    engine = make_engine(session, "ste", how, prompts=0.0)
    for number, (agent, prompt) in enumerate(calls()[:2]):
        engine.submit(request(number, agent, prompt))
        (ended,) = engine.run()
        assert ended.error is None and ended.tokens == answer_without_cache(session, prompt, how)
    close(engine)


def test_prompts_of_other_lengths_and_kinds_are_not_mixed(session):
    """One agent's fixed prompt is the beginning of another's, and some requests name no agent."""
    engine = make_engine(session, "lru_reactive", RETENTION, prompts=10.0)
    prompt = fixed_prompt(0) + tokens(8, 16)
    for number, fixed in enumerate((FIXED, FIXED + 16, 24, FIXED)):
        one = Request(f"call{number}", prompt, ANSWER, workflow="ring", agent=f"agent{number}", fixed_tokens=fixed)
        engine.submit(one)
        (ended,) = engine.run()
        boundary = min(fixed, len(prompt) - 1) // PAGE * PAGE
        assert ended.tokens == answer_without_cache(session, prompt, RETENTION, boundary), f"fixed {fixed}"
        # The last one finds the first one's fixed prompt, compressed, and what was stored behind it.
        assert ended.cached_tokens == (FIXED + PAGE if number == 3 else 0)
    engine.submit(Request("plain", prompt, ANSWER))
    (ended,) = engine.run()
    assert ended.tokens == answer_without_cache(session, prompt, None)
    close(engine)


class BrokenMask:
    is_finished = False

    def allowed(self, tokens):
        raise RuntimeError("no token")

    def accept(self, token):
        pass


def test_one_that_fails_ends_alone(session):
    engine = make_engine(session, "lru_reactive", prompts=6.0)
    for number, (agent, prompt) in enumerate(calls(1)[:3]):
        sampling = SamplingParams(make_mask=BrokenMask if number == 1 else None)
        engine.submit(request(number, agent, prompt, sampling=sampling))
    ended = {each.request.id: each for each in engine.run()}
    assert ended["call1"].finish_reason is FinishReason.FAILED and "no token" in (ended["call1"].error or "")
    for number in (0, 2):
        assert ended[f"call{number}"].tokens == answer_without_cache(session, calls(1)[number][1], None)
    close(engine)


def test_a_payload_that_was_split_gives_up_its_pages_whoever_still_has_it(session):
    """A copying thread has its last job, and with it the payload, a little longer than the cache."""
    engine = make_engine(session, "lru", prompts=6.0, host=0)
    tiers, prompt = engine.system.tiers, fixed_prompt(0)
    assert engine.store("agent0", prompt, engine.prepare(prompt)) is AllocStatus.READY
    (node,) = tiers.tree
    payload = node.copies[Tier.DEVICE]
    namespace = node.root.namespace
    with tiers.open(prompt[:PAGE] + tokens(1, PAGE), namespace) as handle:
        assert handle.length == PAGE and tiers.tree.size == 2
    tiers.evictor.make_room(Tier.DEVICE, tiers.capacity())
    assert tiers.tree.size == 0 and engine.pages.num_free == engine.pages.num_pages
    assert payload is not None
    close(engine)


def start_two_on_one_beginning(engine, monkeypatch) -> tuple[list[int], TransferJob]:
    """Two requests that have computed the same beginning, and a job that keeps the first one's copy from being split.

    The job is left for the caller to submit. The cache has the pages of one of the two then.
    """
    tiers, prompt = engine.system.tiers, fixed_prompt(0)
    waiting: list[TransferJob] = []
    engine.submit(Request("first", prompt, 40))
    while not (nodes := [node for node in tiers.tree if node.copies[Tier.DEVICE] is not None]):
        engine.step()
    with monkeypatch.context() as patched, tiers.lock:
        patched.setattr(tiers.transfers.backend, "submit", waiting.append)
        assert tiers.transfers.start(nodes[0], Tier.HOST, Urgency.EAGER) is not None
    branch = prompt[: 2 * PAGE] + tokens(70, FIXED)
    engine.submit(Request("second", branch, 40))
    while sum(node.copies[Tier.DEVICE] is not None for node in tiers.tree) < 3:
        engine.step()
    return branch, waiting[0]


def payloads_in_use(engine) -> int:
    """The most payloads that a request's handle has; all pages of the handles are those that the requests hold."""
    most = 0
    for state, answering in engine._answering.items():
        assert state.handle is not None and answering.sequence is not None
        payloads = state.handle.payloads()
        stored = {page for payload in payloads for page in payload.table.flat}
        assert stored <= {page for pages in answering.sequence.held for page in pages.numbers.flat}
        most = max(most, len(payloads))
    return most


def test_a_request_uses_the_pages_that_the_cache_keeps_of_two(session, monkeypatch):
    """A copy in transfer cannot be split, so another request computes the beginning, whose pages stay in the cache."""
    engine = make_engine(session, "lru_reactive", prompts=6.0)
    branch, job = start_two_on_one_beginning(engine, monkeypatch)
    engine.system.tiers.transfers.backend.submit(job)
    ended, most = [], 0
    while len(engine.system.scheduler):
        ended += engine.step()
        most = max(most, payloads_in_use(engine))
    assert most > 1, "the first prompt was split"
    answers = {each.request.id: each.tokens for each in ended}
    assert answers == {
        "first": answer_without_cache(session, fixed_prompt(0), None, count=40),
        "second": answer_without_cache(session, branch, None, count=40),
    }
    close(engine)


def test_storing_a_fixed_prompt_counts_the_pages_that_a_transfer_has_left_to_requests(session, monkeypatch):
    """The same, but it is `store` that finds the transfer ended: no page is held that the pool does not count."""
    engine = make_engine(session, "lru_reactive", prompts=6.0)
    tiers = engine.system.tiers
    _, job = start_two_on_one_beginning(engine, monkeypatch)
    other = fixed_prompt(1)
    payload, seen = engine.prepare(other), tiers.num_events
    tiers.transfers.backend.submit(job)
    assert tiers.wait(seen, 30.0)
    assert engine.store("agent1", other, payload) is AllocStatus.READY
    assert payloads_in_use(engine) > 1, "the first prompt was split"
    held = (engine.pages.num_pages - engine.pages.num_free) * engine.pages.geometry.page_bytes
    assert held <= tiers.pools[Tier.DEVICE].used
    for _ in engine.run():
        pass
    close(engine)


def test_a_sampler_that_fails_ends_its_requests_and_not_the_engine(session, monkeypatch):
    engine = make_engine(session, "lru_reactive", prompts=6.0)
    agent, prompt = calls(1)[0]
    with monkeypatch.context() as patched:
        patched.setattr(engine._sampler, "sample", lambda *_: 1 / 0)
        engine.submit(request(0, agent, prompt))
        (ended,) = engine.run()
    assert ended.finish_reason is FinishReason.FAILED and "division by zero" in (ended.error or "")
    engine.submit(request(1, agent, prompt))
    (ended,) = engine.run()
    assert ended.tokens == answer_without_cache(session, prompt, None)
    close(engine)


def test_what_an_engine_refuses(session):
    engine = make_engine(session, "lru", host=0)
    with pytest.raises(ValueError, match=r"got 519 tokens of prompt and answer; accepted: the model's 512"):
        engine.submit(Request("long", tokens(1, 513), ANSWER))
    with pytest.raises(ValueError, match="got a fixed prompt of 7 tokens; accepted: a page of 8 at the least"):
        engine.prepare(tokens(1, 7))
    with pytest.raises(ValueError, match="policy 'snapkv' needs"):
        make_engine(session, "lru", Compression("snapkv"))
    with pytest.raises(ValueError, match="unknown policy 'nothing'"):
        Compression("nothing")
    close(engine)


def test_an_engine_says_itself_what_is_compressed(tiny_llama):
    wrong = pytest.raises(ValueError, match="got a session under policy 'keydiff'")
    with evict(tiny_llama, "keydiff", 0.5) as evicting, wrong:
        make_engine(evicting, "lru", host=0)
