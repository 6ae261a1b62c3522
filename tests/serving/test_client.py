"""The engine's thread and its clients: threads, event loops, refusals, ends and deaths, on a tiny model."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from tenure.eviction import Session, evict
from tenure.serving import (
    AgentSpec,
    BadRequest,
    Draining,
    EdgeSpec,
    EngineClient,
    EngineClientConfig,
    EngineDead,
    FinishReason,
    Gone,
    Hint,
    LinearCosts,
    MemoryPool,
    QueueFull,
    Request,
    RequestFailed,
    RequestOutput,
    SchedulerConfig,
    ServingError,
    System,
    ThreadedTransfer,
    Tier,
    TokenEvent,
    TooLarge,
    WorkflowSpec,
    build_system,
)
from tenure.serving.engine import Engine
from tenure.serving.prompt_cache import PromptKV
from tenure.serving.sampling.stop import StopChecker

PAGE = 8


class WatchedEngine(Engine):
    """An engine that can be stopped between two steps.

    Attributes:
        between: called before each step; what it raises ends the engine's thread.
        threads: those that have called `step`.
    """

    def __init__(self, session: Session, system: System) -> None:
        super().__init__(session, system)
        self.between: Any = lambda: None
        self.threads: set[int] = set()
        self.flushed = 0

    def step(self, patience_s: float = 0.1) -> list[RequestOutput]:
        self.threads.add(threading.get_ident())
        self.between()
        return super().step(patience_s)

    def flush(self) -> None:
        self.flushed += 1
        super().flush()


@pytest.fixture
def session(tiny_llama) -> Iterator[Session]:
    with evict(tiny_llama, "full") as session:
        yield session


def make_engine(session: Session, tokens: int = 4000, **options: Any) -> WatchedEngine:
    rate = PromptKV(session).bytes_per_token()
    pools: dict[Tier, Any] = {Tier.DEVICE: MemoryPool(rate * tokens), Tier.HOST: MemoryPool(rate * tokens)}
    system = build_system(
        "expected_time", pools, ThreadedTransfer(), costs=LinearCosts(2000.0, (1e8, 1e8), 0.0), bytes_per_token=rate,
        clock=time.monotonic, page_size=PAGE, **options,
    )  # fmt: skip
    return WatchedEngine(session, system)


@pytest.fixture
def loop_engine(session) -> Iterator[WatchedEngine]:
    loop_engine = make_engine(session)
    yield loop_engine
    loop_engine.system.close()


@pytest.fixture
def client(loop_engine) -> Iterator[EngineClient]:
    with EngineClient(loop_engine, EngineClientConfig(idle_wait_s=5.0)) as client:
        yield client


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy_answer(session: Session, prompt: list[int], count: int) -> list[int]:
    kv = PromptKV(session)
    cache = session.new_cache()
    answer, following = [], prompt
    while len(answer) < count and answer[-1:] != [2]:
        answer.append(int(kv.forward(cache, following).argmax()))
        following = answer[-1:]
    return answer


def hold(loop_engine: WatchedEngine) -> tuple[threading.Event, threading.Event]:
    """Stops the engine before its next step: set when it has stopped, and to be set to let it go on."""
    reached, go_on = threading.Event(), threading.Event()

    def between() -> None:
        reached.set()
        assert go_on.wait(10)

    loop_engine.between = between
    loop_engine.wake()
    assert reached.wait(10)
    return reached, go_on


def test_many_threads_and_many_tasks_get_the_answers_of_the_model(session, loop_engine):
    prompts = [tokens(n, 12 + n % 5) for n in range(24)]
    wanted = [greedy_answer(session, prompt, 6) for prompt in prompts]
    with EngineClient(loop_engine) as client:

        def read(n: int) -> list[int]:
            events = list(client.submit(Request("the same label", prompts[n], 6)))
            last = events[-1].output
            assert last is not None and last.finish_reason is FinishReason.ANSWERED
            assert last.times.first_token is not None and all(each.output is None for each in events[:-1])
            assert [token for each in events for token in each.tokens] == last.tokens
            return last.tokens

        async def read_in_task(n: int) -> list[int]:
            found = []
            async for event in client.submit(Request("label", prompts[n], 6)):
                found += event.tokens
            return found

        async def read_all() -> list[list[int]]:
            return await asyncio.gather(*(read_in_task(n) for n in range(12, 24)))

        with ThreadPoolExecutor(13) as pool:
            in_loop = pool.submit(asyncio.run, read_all())
            in_threads = list(pool.map(read, range(12)))
            assert in_threads == wanted[:12] and in_loop.result(20) == wanted[12:]
        health = client.health()
        assert health.alive and health.accepting and (health.num_waiting, health.num_running) == (0, 0)
    assert len(loop_engine.threads) == 1 and threading.get_ident() not in loop_engine.threads


def test_a_slow_reader_gets_its_tokens_in_one_event_and_holds_up_nobody(session, client):
    prompt = tokens(1, 20)
    slow = client.submit(Request("slow", prompt, 12))
    assert client.submit(Request("other", tokens(2, 9), 12)).result(10).tokens
    output = slow.result(10)
    (event,) = slow
    assert event.output is output and event.tokens == output.tokens == greedy_answer(session, prompt, 12)
    assert list(slow) == [], "a stream that was read to its end stays at it"


def test_an_event_loop_is_woken_once_a_step_for_all_its_streams(loop_engine, client):
    async def run() -> tuple[int, int]:
        wakes, steps = 0, 0
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def counted(callback: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal wakes
            wakes += callback.__name__ == "_resolve"
            return call(callback, *args, **kwargs)

        def between() -> None:
            nonlocal steps
            steps += 1

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        loop_engine.between = between
        streams = [client.submit(Request(f"r{n}", tokens(n, 10), 16)) for n in range(16)]
        await asyncio.gather(*(stream.aresult() for stream in streams))
        return wakes, steps

    wakes, steps = asyncio.run(run())
    assert 1 <= wakes <= steps


def test_a_submit_does_not_wait_for_a_step(loop_engine, client):
    _, go_on = hold(loop_engine)
    begun = time.perf_counter()
    stream = client.submit(Request("r", tokens(1, 10), 2))
    future = client.add_workflow(WorkflowSpec("w", [AgentSpec("a")]))
    client.hint(Hint("kvflow", steps={"a": 1.0}))
    client.cancel(stream)
    assert client.health().num_waiting == 1
    assert time.perf_counter() - begun < 0.2, "the step goes on for as long as the test likes"
    go_on.set()
    with pytest.raises(Gone, match="the request 'r' ended: the request was cancelled"):
        stream.result(10)
    assert future.result(10) is None and "w" in loop_engine.system.graph


def test_refusals_are_raised_by_the_stream_and_concern_that_request_only(session, client):
    good = client.submit(Request("good", tokens(1, 10), 4))
    much, other = (client.submit(Request("much", tokens(1, 10), count)) for count in (600, 700))
    with pytest.raises(TooLarge, match="got 610 tokens of prompt and answer; accepted: the model's 512"):
        next(much)
    with pytest.raises(ValueError, match="got 710 tokens of prompt and answer; accepted: the model's 512"):
        other.result(10)
    with pytest.raises(BadRequest, match="got the token id 5000 in a prompt; accepted: 0 to 127"):
        client.submit(Request("unknown", [3, 5000], 4)).result(10)
    assert good.result(10).tokens == greedy_answer(session, tokens(1, 10), 4)
    with pytest.raises(ValueError, match="there is no workflow 'none'"):
        client.remove_workflow("none").result(10)
    assert client.health().alive


def test_refusals_of_the_scheduler_have_their_kinds(session):
    loop_engine = make_engine(session, 100, scheduler_config=SchedulerConfig(max_queued_requests=2))
    with EngineClient(loop_engine) as client:
        with pytest.raises(TooLarge, match="the device's pool has"):
            client.submit(Request("large", tokens(1, 200), 4)).result(10)
        _, go_on = hold(loop_engine)
        streams = [client.submit(Request(f"r{n}", [3, 4], 1)) for n in range(3)]
        go_on.set()
        with pytest.raises(QueueFull, match="at most 2 requests may wait"):
            streams[2].result(10)
        assert streams[0].result(10).tokens and streams[1].result(10).tokens
        loop_engine.system.close("maintenance")
        with pytest.raises(Draining, match="the scheduler is closed: maintenance"):
            client.submit(Request("late", [3], 1)).result(10)


def test_a_system_that_is_closed_during_a_step_ends_the_requests_and_not_the_thread(session):
    loop_engine = make_engine(session)
    begun, go_on = threading.Event(), threading.Event()

    def wait_for_close(*_: Any) -> None:
        begun.set()
        assert go_on.wait(10)

    hook = session.model.get_input_embeddings().register_forward_pre_hook(wait_for_close)
    try:
        with EngineClient(loop_engine) as client:
            _, submitted = hold(loop_engine)
            streams = [client.submit(Request(f"r{n}", tokens(n, 20), 30)) for n in range(3)]
            submitted.set()
            assert begun.wait(10)
            closing = threading.Thread(target=loop_engine.system.close, args=("shutting down",))
            closing.start()
            while loop_engine.system.scheduler._closed is None:
                time.sleep(0.001)
            go_on.set()
            for stream in streams:
                with pytest.raises(Gone, match="shutting down"):
                    stream.result(10)
            closing.join(10)
            assert client.health().alive and client.health().error is None
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", [TooLarge, QueueFull, Draining])
def test_the_engines_own_errors_are_passed_on(loop_engine, client, kind):
    def refuse(request: Request) -> int:
        raise kind("not this one")

    loop_engine.submit = refuse
    with pytest.raises(kind, match="not this one"):
        client.submit(Request("r", [3], 1)).result(10)


def test_an_engine_that_cannot_take_a_request_goes_on(loop_engine, client):
    submit = loop_engine.submit
    loop_engine.submit = lambda request: submit(request) if request.id == "good" else {}["missing"]
    with pytest.raises(RequestFailed, match="the request 'bad' was refused: KeyError") as failure:
        client.submit(Request("bad", [3], 1)).result(10)
    assert isinstance(failure.value.__cause__, KeyError)
    assert client.submit(Request("good", [3], 1)).result(10).tokens


def test_at_most_so_many_requests_and_messages_wait(loop_engine):
    with EngineClient(loop_engine, EngineClientConfig(max_unfinished=2, max_messages=3)) as client:
        _, go_on = hold(loop_engine)
        streams = [client.submit(Request(f"r{n}", [3, 4], 1)) for n in range(2)]
        with pytest.raises(QueueFull, match="got the request 'r2' while 2 have not ended; accepted: up to 2"):
            client.submit(Request("r2", [3, 4], 1))
        client.hint(Hint("kvflow"))
        with pytest.raises(QueueFull, match="got a message while 3 wait for the engine; accepted: up to 3"):
            client.hint(Hint("kvflow"))
        client.cancel(streams[0])
        go_on.set()
        with pytest.raises(Gone):
            streams[0].result(10)
        streams[1].result(10)
        assert client.submit(Request("r2", [3, 4], 1)).result(10).tokens


def test_leaving_the_block_of_a_stream_cancels_it(loop_engine, client):
    with client.submit(Request("r", tokens(1, 10), 400)) as stream:
        assert next(stream).tokens

    async def leave() -> Any:
        async with client.submit(Request("s", tokens(2, 10), 400)) as stream:
            async for event in stream:
                assert event.tokens
                break
        return stream

    for left in (stream, asyncio.run(leave())):
        with pytest.raises(Gone) as gone:
            left.result(10)
        assert gone.value.output is not None and 1 <= len(gone.value.output.tokens) < 400
    assert client.health().num_running == 0


def test_a_task_that_is_cancelled_leaves_the_stream_to_the_next_reader(loop_engine, client):
    async def run() -> list[int]:
        _, go_on = hold(loop_engine)
        stream = client.submit(Request("r", tokens(1, 10), 4))
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task reads the stream of 'r'; accepted: one"):
            await anext(stream)
        first.cancel()
        await asyncio.sleep(0)
        loop_engine.between = lambda: None
        go_on.set()
        return (await stream.aresult()).tokens

    assert asyncio.run(run())


def test_text_is_made_by_the_reader(client):
    """In its own thread, in whole characters."""
    threads = set()

    def decode(ids: list[int]) -> str:
        threads.add(threading.get_ident())
        return bytes(ids).decode(errors="replace")

    events = list(client.submit(Request("r", tokens(1, 10), 30), StopChecker(decode)))
    output = events[-1].output
    assert output is not None and threads == {threading.get_ident()}
    assert "".join(event.text or "" for event in events) == bytes(output.tokens).decode(errors="replace")


def test_logprobs_and_the_engines_text_are_collected_with_the_tokens():
    class Scripted:
        """Reports two steps before anything is read."""

        system: Any = None

        def __init__(self) -> None:
            self.events: list[TokenEvent] = []
            self.woken = threading.Event()

        def submit(self, request: Request) -> int:
            self.events += [TokenEvent(7, [1, 2], [-0.1, -0.2], None, "ab"), TokenEvent(7, [3], [-0.3], None, "c")]
            return 7

        def wake(self) -> None:
            self.woken.set()

        def step(self, patience_s: float) -> list[RequestOutput]:
            self.woken.wait(patience_s)
            self.woken.clear()
            return []

        def take_events(self) -> list[TokenEvent]:
            events, self.events = self.events, []
            return events

        def cancel(self, number: int) -> None: ...

        def hint(self, hint: Hint) -> None: ...

        def flush(self) -> None: ...

        def snapshot(self) -> Any:
            raise AssertionError("nobody looks")

    with EngineClient(Scripted()) as client:
        stream = client.submit(Request("r", [1], 3))
        while not client.health().num_running:
            time.sleep(0.001)
        event = next(stream)
        assert (event.tokens, event.logprobs, event.text) == ([1, 2, 3], [-0.1, -0.2, -0.3], "abc")
    with pytest.raises(Gone, match="the request has ended: the engine was closed"):
        next(stream)


def test_draining_finishes_what_runs_and_refuses_the_rest(session, client):
    streams = [client.submit(Request(f"r{n}", tokens(n, 10), 20)) for n in range(6)]
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(client.drain, 20.0)
        while client.health().accepting:
            time.sleep(0.001)
        with pytest.raises(Draining, match="got the request 'late', but no new ones are accepted: the engine is drain"):
            client.submit(Request("late", [3], 1))
        assert drained.result(20) is True
    assert [stream.result().tokens for stream in streams] == [
        greedy_answer(session, tokens(n, 10), 20) for n in range(6)
    ]
    assert client.health().alive and client.hint(Hint("kvflow")).result(10) is None
    with pytest.raises(ValueError, match="got timeout_s=-1 to drain; accepted: seconds from 0 up"):
        client.drain(-1)


def test_draining_cancels_what_has_not_ended_in_time(client):
    streams = [client.submit(Request(f"r{n}", tokens(n, 10), 400)) for n in range(3)]
    assert client.drain(0.0) is False
    for stream in streams:
        with pytest.raises(Gone):
            stream.result(0)


def test_closing_while_a_step_is_computed_ends_every_request_with_a_reason(loop_engine):
    client = EngineClient(loop_engine)
    streams = [client.submit(Request(f"r{n}", tokens(n, 100), 300)) for n in range(4)]
    next(streams[0])
    client.close("shutting down")
    assert not client.health().alive and client.health().error is None
    for stream in streams:
        with pytest.raises(Gone, match=r"shutting down|cancelled"):
            stream.result(0)
    with pytest.raises(Draining, match="accepted: shutting down"):
        client.submit(Request("late", [3], 1))
    with pytest.raises(Draining, match="got a message, but none are accepted: shutting down"):
        client.flush()
    client.close()
    loop_engine.system.scheduler.check()
    assert not len(loop_engine.system.scheduler) and not loop_engine.system.tiers.handles


def test_when_the_thread_dies_everybody_hears_of_it(loop_engine):
    client = EngineClient(loop_engine)
    _, go_on = hold(loop_engine)
    streams = [client.submit(Request(f"r{n}", tokens(n, 10), 300)) for n in range(3)]

    async def read() -> None:
        await streams[0].aresult()

    def fail() -> None:
        raise RuntimeError("the device is gone")

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asyncio.run, read())
        pending = client.flush()
        loop_engine.between = fail
        go_on.set()
        with pytest.raises(EngineDead, match="the engine's thread has died: RuntimeError: the device is gone"):
            waiting.result(10)
    for stream in streams:
        with pytest.raises(EngineDead, match="the device is gone") as dead:
            stream.result(10)
        assert isinstance(dead.value.__cause__, RuntimeError)
    assert wait([pending], 10).done
    for call in (lambda: client.submit(Request("r", [3], 1)), client.flush, lambda: client.drain(1.0)):
        with pytest.raises(EngineDead, match="the device is gone"):
            call()
    health = client.health()
    assert not health.alive and not health.accepting and "the device is gone" in (health.error or "")
    client.close()


def test_health_shows_a_step_that_does_not_end(loop_engine, client):
    _, go_on = hold(loop_engine)
    time.sleep(0.05)
    assert client.health().last_step_age_s >= 0.05
    go_on.set()


def test_a_snapshot_is_shared_for_a_while(loop_engine, client):
    release = threading.Event()
    loop_engine.between = lambda: release.wait(20)
    first = client.snapshot()
    assert client.snapshot() is first, "it waits for the step to end"
    release.set()
    found = first.result(20)
    assert found.system == loop_engine.system.name and found.requests == [] and found.cost_s < 5
    time.sleep(client.config.snapshot_interval_s + 0.1)
    stream = client.submit(Request("r", tokens(1, 20), 4))
    output = stream.result(20)
    later = client.snapshot().result(20)
    assert later.taken > found.taken and later.submitted == 1 and later.finished["answered"] == 1
    assert output.num_output_tokens <= later.recent.total.decode_tokens + 4
    client.close()
    time.sleep(client.config.snapshot_interval_s + 0.1)
    with pytest.raises(Draining):
        client.snapshot()


def test_flush_and_cancelled_messages(loop_engine, client):
    assert client.flush().result(10) is None and loop_engine.flushed == 1
    _, go_on = hold(loop_engine)
    message = client.flush()
    assert message.cancel()
    go_on.set()
    assert client.hint(Hint("kvflow")).result(10) is None and loop_engine.flushed == 1


def test_errors_are_those_that_callers_expect():
    for kind in (BadRequest, QueueFull, Draining):
        assert issubclass(kind, ServingError) and issubclass(kind, ValueError)
    for kind in (Gone, RequestFailed, EngineDead):
        assert issubclass(kind, ServingError) and issubclass(kind, RuntimeError)


def test_the_example_of_the_guide_runs(loop_engine):
    text = (Path(__file__).parents[2] / "docs" / "guides" / "serve-agents.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "EngineClient(" in block]
    scope = {"engine": loop_engine, "prompt": tokens(1, 20)}
    exec(code, scope)  # our own documentation
    assert scope["tokens"] == scope["output"].tokens and not scope["client"].health().alive  # type: ignore[attr-defined]


def test_a_submit_from_an_event_loop_takes_no_time_with_a_hundred_workflows(client):
    """The callers' share of the work; the engine's thread computes meanwhile."""
    for w in range(100):
        agents = [f"w{w}a{i}" for i in range(10)]
        edges = [EdgeSpec(agents[i], agents[(i + 1) % 10]) for i in range(10)]
        client.add_workflow(WorkflowSpec(f"w{w}", [AgentSpec(agent) for agent in agents], edges))

    async def run() -> list[float]:
        held: list[float] = []

        async def talk(w: int) -> None:
            for n in range(2):
                begun = time.perf_counter()
                call = {"workflow": f"w{w}", "agent": f"w{w}a{n}", "fixed_tokens": 64}
                stream = client.submit(Request("r", tokens(100 * w + n, 64) + tokens(n, 8), 4, **call))
                held.append(time.perf_counter() - begun)
                await stream.aresult()

        await asyncio.gather(*(talk(w) for w in range(100)))
        return sorted(held)

    held = asyncio.run(run())
    assert held[len(held) // 2] < 0.002
