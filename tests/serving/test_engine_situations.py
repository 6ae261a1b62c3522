"""Situations that clients and machines get an engine into: each ends what it concerns, and nothing else."""

from __future__ import annotations

import shutil
import threading
import time

import numpy as np
import pytest
import torch

from tenure.serving import AllocStatus, BadRequest, FinishReason, Request, SchedulerConfig, Tier, TooLarge
from tenure.serving.engine import Engine
from tenure.serving.kvcache import page_pool

from .engines import ANSWER, FIXED, PAGE, RETENTION, answer_without_cache, check_memory, close, make_engine, tokens

both = pytest.mark.parametrize("how", [None, RETENTION], ids=["plain", "compressed"])


def ask(engine: Engine, prompt: list[int], count: int = ANSWER, **options) -> tuple[list[int], int]:
    """The answer, and the number of cached tokens, of a request that is alone."""
    engine.submit(Request("ask", prompt, count, **options))
    (ended,) = engine.run()
    assert ended.finish_reason is FinishReason.ANSWERED, ended.error
    return ended.tokens, ended.cached_tokens


@pytest.mark.parametrize("when", [0, 1, 3, 6])
def test_a_retry_under_the_same_label_is_another_request(session, when):
    """Cancelled while it waits, in its prompt, or beside others; the answer, and what it stores, are its own."""
    config = SchedulerConfig(max_num_batched_tokens=40, prefill_chunk_size=16, max_num_seqs=6)
    engine = make_engine(session, "lru_reactive", prompts=12.0, config=config)
    old, new, others = tokens(1, 40), tokens(2, 40), [tokens(10 + i, 20) for i in range(2)]
    for prompt in others:
        engine.submit(Request("other", prompt, 20))
    cancelled = engine.submit(Request("chat-1", old, 20, client="alice"))
    ended = [one for _ in range(when) for one in engine.step()]
    engine.cancel(cancelled)
    retry = engine.submit(Request("chat-1", new, 17, client="bob"))
    for one in [*ended, *engine.run()]:
        wanted = answer_without_cache(session, list(one.request.prompt), None, count=one.request.max_new_tokens)
        if one.number == cancelled:
            assert one.finish_reason is FinishReason.CANCELLED and one.tokens == wanted[: len(one.tokens)]
        else:
            assert one.finish_reason is FinishReason.ANSWERED and one.tokens == wanted
        if one.number == retry:
            bob = one.tokens
    longer = [*new, *bob, *tokens(5, 9)]  # pyright: ignore[reportPossiblyUnboundVariable]
    answer, cached = ask(engine, longer, client="carol")
    assert cached >= 48 and answer == answer_without_cache(session, longer, None)
    close(engine)


def test_tokens_beyond_the_vocabulary_are_refused_before_anything_is_computed(session):
    engine = make_engine(session, "lru_reactive", prompts=6.0)
    with pytest.raises(BadRequest, match="got the token id 128 in a prompt; accepted: 0 to 127"):
        engine.submit(Request("r", [*tokens(1, 9), 128], 4))
    with pytest.raises(BadRequest, match="got the token id 500 in a prompt; accepted: 0 to 127"):
        engine.prepare([500, *tokens(1, 9)])
    with pytest.raises(TooLarge, match="got 520 tokens of a fixed prompt; accepted: the model's 512"):
        engine.prepare(tokens(1, 520))
    assert not len(engine.system.scheduler)
    close(engine)


def test_a_payload_of_another_prompt_is_refused(session, monkeypatch):
    """And the bytes reserved for one that cannot be copied are given back."""
    engine = make_engine(session, "lru_reactive", prompts=6.0)
    payload = engine.prepare(tokens(1, 16))
    with pytest.raises(
        ValueError, match=r"got a payload of 16 tokens for a prompt of 9; accepted: `prepare\(prompt\)`"
    ):
        engine.store("a", tokens(1, 9), payload)
    monkeypatch.setattr(page_pool.PagePool, "allocate", lambda *_: (_ for _ in ()).throw(MemoryError("no pages")))
    with pytest.raises(MemoryError):
        engine.store("a", tokens(1, 16), payload)
    monkeypatch.undo()
    assert engine.system.tiers.reserved_bytes == 0
    assert engine.store("a", tokens(1, 16), payload) is AllocStatus.READY
    close(engine)


@both
def test_agents_that_start_together_compute_their_common_prompt_once(session, how):
    engine = make_engine(session, "lru_reactive", how, prompts=12.0)
    shared, ends = tokens(1, 160), [tokens(50 + i, 5) for i in range(6)]
    for end in ends:
        engine.submit(Request("sub", shared + end, 3, agent="researcher", fixed_tokens=160))
    for one in engine.run():
        assert one.tokens == answer_without_cache(session, list(one.request.prompt), how, 160, count=3)
    assert engine.system.scheduler.metrics.prefill_tokens == 160 + 6 * 5
    close(engine)


def test_roots_of_namespaces_that_hold_nothing_are_gone(session):
    """A namespace for every request: what is remembered is bounded by what is cached."""
    engine = make_engine(session, "lru_reactive", RETENTION, prompts=3.0, host=0)
    for i in range(40):
        ask(engine, tokens(i % 3, 40), 1, namespace=f"salt-{i}", agent="planner", fixed_tokens=24)
    tree = engine.system.tiers.tree
    assert len(tree.roots) <= tree.size <= 3 * FIXED * 2 // PAGE
    before = len(tree.roots)
    for i in range(20):
        assert not engine.system.tiers.lookup(tokens(1, 16), namespace=f"asked-{i}").nodes
    assert len(tree.roots) == before
    close(engine)


@both
def test_a_disk_that_loses_its_folder_is_a_cache_that_forgets(session, how, tmp_path):
    engine = make_engine(session, "lru_reactive", how, prompts=1.0, host=0.5, disk=tmp_path / "kv")
    prompts = [tokens(i, 61) for i in range(4)]
    wanted = [answer_without_cache(session, prompt, how, 40) for prompt in prompts]
    for turn in range(3):
        for i, prompt in enumerate(prompts):
            assert ask(engine, prompt, agent=f"a{i}", fixed_tokens=40)[0] == wanted[i], (turn, i)
        if turn == 0:
            shutil.rmtree(engine.system.tiers.pools[Tier.DISK].folder)  # pyright: ignore[reportAttributeAccessIssue]
    close(engine)


def test_tenants_with_the_same_names_share_no_answers_and_no_secrets(session):
    """The same agent's name and prompt in two namespaces: neither finds what the other has computed."""
    engine = make_engine(session, "expected_time", RETENTION, prompts=12.0)
    prompt = tokens(1, 61)
    found = {}
    for tenant in ("a", "b", "a", "b"):
        options = {"client": tenant, "namespace": tenant, "agent": "planner", "fixed_tokens": FIXED}
        answer, cached = ask(engine, prompt, **options)
        assert answer == answer_without_cache(session, prompt, RETENTION)
        found.setdefault(tenant, []).append(cached)
    assert found == {"a": [0, 56], "b": [0, 56]}
    close(engine)


def test_no_namespace_of_a_client_is_that_of_another_kind_of_prompt(session):
    """A client that names the namespaces of the engine's tree gets, and leaves, plain KV of its own."""
    engine = make_engine(session, "lru_reactive", RETENTION, prompts=12.0)
    prompt = tokens(1, 61)
    fixed = {"agent": "planner", "fixed_tokens": FIXED}
    ask(engine, prompt, **fixed)
    (kind,) = [root for root in engine.system.tiers.tree.roots if root[0] == "compressed"]  # pyright: ignore
    for namespace in (kind, ("plain", None), ("to be compressed", None)):
        answer, cached = ask(engine, prompt, namespace=namespace)
        assert cached == 0 and answer == answer_without_cache(session, prompt, None)
    assert ask(engine, prompt, **fixed) == (answer_without_cache(session, prompt, RETENTION), 56)
    close(engine)


@pytest.mark.parametrize("steps_before", [0, 4], ids=["prefill", "decode"])
def test_the_system_is_closed_by_another_thread_in_the_middle_of_a_step(session, steps_before, caplog):
    engine = make_engine(session, "lru_reactive", prompts=12.0)
    for i in range(3):
        engine.submit(Request(f"r{i}", tokens(i, 20), 400))
    for _ in range(steps_before):
        assert not engine.step(0.0)
    entered, go_on, ended, failed = threading.Event(), threading.Event(), [], []

    def hook(*_) -> None:
        entered.set()
        assert go_on.wait(10)

    def work() -> None:
        try:
            for _ in range(3):
                ended.extend(engine.step(0.0))
        except BaseException as error:
            failed.append(error)

    handle = session.model.model.layers[1].register_forward_pre_hook(hook)
    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(10)
    engine.system.close("shutting down")
    go_on.set()
    thread.join(20)
    handle.remove()
    assert not failed and {one.error for one in ended} == {"shutting down"} and len(ended) == 3
    assert "failed" not in caplog.text, "closing is no failure of a request"
    assert not engine._answering and engine.pages.num_free == engine.pages.num_pages


@both
def test_requests_over_one_stored_prompt_take_the_memory_that_is_counted(session, how):
    engine = make_engine(session, "lru_reactive", how, prompts=8.0)
    shared = tokens(1, 160)
    assert engine.store("agent", shared, engine.prepare(shared)) is AllocStatus.READY
    for i in range(5):
        engine.submit(Request(f"r{i}", shared + tokens(i, 9), 12, agent="agent", fixed_tokens=160))
    most = 0
    while len(engine.system.scheduler):
        engine.step()
        check_memory(engine)
        most = max(most, len(engine._answering))
    assert most == 5
    close(engine)


def test_a_prompt_is_what_it_was_when_it_was_submitted(session):
    """The caller's buffer is used again at once."""
    engine = make_engine(session, "lru_reactive", prompts=12.0)
    first, second = tokens(1, 41), tokens(2, 41)
    buffer = np.array(first)
    numbers = [engine.submit(Request("a", buffer, 4))]
    buffer[:] = second
    numbers.append(engine.submit(Request("b", torch.from_numpy(buffer), 4)))
    buffer[:] = 3
    answers = {one.number: one.tokens for one in engine.run()}
    assert [answers[n] for n in numbers] == [
        answer_without_cache(session, one, None, count=4) for one in (first, second)
    ]
    answer, cached = ask(engine, [*first, 5])
    assert cached == 40 and answer == answer_without_cache(session, [*first, 5], None)
    close(engine)


@both
@pytest.mark.parametrize("host", [40.0, 0.5], ids=["host", "disk"])
def test_the_same_prompt_again_and_the_same_beginning_are_found_below_the_device(session, how, host, tmp_path):
    engine = make_engine(session, "lru_reactive", how, prompts=1.0, host=host, disk=tmp_path)
    prompt = tokens(1, 61)

    def others(seed: int) -> None:
        for i in range(4):
            ask(engine, tokens(seed + i, 80), 2, agent=f"other{i}", fixed_tokens=40)

    options = {"agent": "a", "fixed_tokens": 40}
    assert ask(engine, prompt, **options) == (answer_without_cache(session, prompt, how, 40), 0)
    others(100)
    assert ask(engine, prompt, **options) == (answer_without_cache(session, prompt, how, 40), 56)
    others(200)
    cut = prompt[:40] + tokens(3, 20)
    assert ask(engine, cut, **options) == (answer_without_cache(session, cut, how, 40), 40)
    close(engine)


def test_branches_that_have_gone_leave_no_cuts_that_cost(session):
    """Prefixes branch off a prompt at every page; with joins that copy nothing, only cuts with branches remain."""
    engine = make_engine(session, "lru_reactive", prompts=8.0, host=0)
    base, tree = tokens(1, 161), engine.system.tiers.tree
    ask(engine, base, 1)
    for i in range(16):
        ask(engine, base[: 8 * (i + 1)] + tokens(1000 + i, 12), 1)
        assert ask(engine, base, 1)[1] == 160
    assert tree.size > 20
    for i in range(12):
        ask(engine, tokens(5000 + i, 120), 1)
        assert ask(engine, base, 1)[1] == 160
    assert sum(1 for node in tree if len(node.children) > 1) == 0
    engine.system.tiers.merge_spans()
    assert tree.size <= 6
    close(engine)


@both
def test_a_prompt_that_is_cancelled_before_its_end_is_gone_on_with(session, how):
    """As a client with a timeout retries it: what was computed is found again, and nothing is computed twice."""
    config = SchedulerConfig(max_num_batched_tokens=70, prefill_chunk_size=32, max_num_seqs=8)
    engine = make_engine(session, "lru_reactive", how, prompts=12.0, config=config)
    prompt, found, ended = tokens(1, 220), [], []
    while not ended or ended[-1].finish_reason is FinishReason.CANCELLED:
        number = engine.submit(Request("retried", prompt, 2, agent="a", fixed_tokens=200, client=f"try {len(ended)}"))
        ended += [one for _ in range(4) for one in engine.step()]
        engine.cancel(number)
        ended += engine.run()
        found.append(ended[-1].cached_tokens)
        check_memory(engine)
    assert found[:2] == [0, 128] and len(found) == 3 and found[2] >= 200
    assert ended[-1].tokens == answer_without_cache(session, prompt, how, 200, count=2)
    assert engine.system.scheduler.metrics.prefill_tokens <= 220 + 2 * PAGE
    close(engine)


def test_what_was_computed_of_a_fixed_prompt_is_of_use_to_others_that_begin_alike(session):
    """Plain KV is the same however, and up to which token, it will be compressed; not across namespaces."""
    config = SchedulerConfig(max_num_batched_tokens=70, prefill_chunk_size=32, max_num_seqs=8)
    engine = make_engine(session, "lru_reactive", RETENTION, prompts=12.0, config=config)
    prompt = tokens(1, 150)
    number = engine.submit(Request("given up", prompt, 2, agent="a", fixed_tokens=144))
    for _ in range(3):
        engine.step()
    engine.cancel(number)
    list(engine.run())
    for fixed, namespace, cached in ((96, "n", 0), (96, None, 88), (120, None, 96), (64, None, 56)):
        fork = [*prompt[:fixed], *tokens(7, 9)]
        answer, found = ask(engine, fork, agent=f"agent {fixed}", fixed_tokens=fixed, namespace=namespace)
        assert answer == answer_without_cache(session, fork, RETENTION, fixed) and found == cached
    answer, found = ask(engine, prompt)
    assert found == 0 and answer == answer_without_cache(session, prompt, None), "plain prompts are apart"
    close(engine)


@both
def test_a_conversation_computes_each_of_its_tokens_once(session, how):
    engine = make_engine(session, "lru_reactive", how, prompts=12.0)
    talk, computed = tokens(1, FIXED), engine.system.scheduler.metrics
    for turn in range(6):
        talk = talk + tokens(100 + turn, 30)
        answer, cached = ask(engine, talk, 4, agent="a", fixed_tokens=FIXED, session="s")
        assert answer == answer_without_cache(session, talk, how, count=4)
        assert turn == 0 or cached >= len(talk) - 30 - PAGE
        talk = talk + answer
    assert computed.prefill_tokens < len(talk) + 6 * PAGE
    close(engine)


@both
def test_a_cache_that_cannot_store_ends_no_request(session, how, monkeypatch):
    """Whichever of the stores fail: the request goes on with its own pages."""
    for failing in range(4):
        engine = make_engine(session, "lru_reactive", how, prompts=8.0)
        tiers, real, count = engine.system.tiers, engine.system.tiers.store, iter(range(1000))

        def store(*args, count=count, failing=failing, real=real, **kwargs):
            if next(count) == failing:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(*args, **kwargs)

        monkeypatch.setattr(tiers, "store", store)
        prompt = tokens(1, 70)
        options = {"agent": "a", "fixed_tokens": FIXED}
        assert ask(engine, prompt, 20, **options)[0] == answer_without_cache(session, prompt, how, count=20)
        assert engine.system.scheduler.metrics.stores_failed == 1
        assert ask(engine, prompt, **options)[0] == answer_without_cache(session, prompt, how)
        close(engine)


def test_one_that_finds_no_pages_fails_alone(session, monkeypatch):
    engine = make_engine(session, "lru_reactive", prompts=8.0)
    numbers = [engine.submit(Request("old", tokens(i, 20), 12)) for i in range(3)]
    for _ in range(3):
        engine.step()
    real, left = engine.pages.allocate, [1]

    def allocate(count: int):
        if left[0]:
            left[0] -= 1
            raise MemoryError("no pages")
        return real(count)

    monkeypatch.setattr(engine.pages, "allocate", allocate)
    last = engine.submit(Request("new", tokens(9, 41), 3))
    reasons = {one.number: one.finish_reason for one in engine.run()}
    failed = [n for n, reason in reasons.items() if reason is FinishReason.FAILED]
    assert failed == [last] and all(reasons[n] is FinishReason.ANSWERED for n in numbers)
    close(engine)


@both
def test_memory_that_was_never_written_is_never_seen(session, how, nan_outputs):
    """Pages of the pool that contain NaN: free slots, padding, and heads without entries have no weight."""
    engine = make_engine(session, "lru_reactive", how, prompts=8.0)
    for buffer in engine.pages.buffers.values():
        buffer.fill_(torch.nan)
    prompts = [tokens(1, 61), tokens(2, 50), tokens(3, 70)]
    for i, prompt in enumerate(prompts):
        engine.submit(Request("r", prompt, ANSWER, agent=f"a{i}", fixed_tokens=FIXED))
    for one in engine.run():
        assert one.tokens == answer_without_cache(session, one.request.prompt.tolist(), how)  # pyright: ignore
    close(engine)


def test_a_request_whose_time_is_over_frees_its_pages_for_the_next(session):
    """The device holds one of them only; the second is admitted in the step in which the first times out."""
    engine = make_engine(session, "lru_reactive", prompts=0.0, host=0)
    first = engine.submit(Request("late", tokens(1, 48), 20, timeout_s=0.2))
    engine.step()
    second = engine.submit(Request("next", tokens(2, 48), 4))
    time.sleep(0.25)
    reasons = {one.number: one.finish_reason for one in engine.run()}
    assert reasons == {first: FinishReason.TIMED_OUT, second: FinishReason.ANSWERED}
    close(engine)
