"""Rows of `tenure bench engine` that are times: decoding, joins, short prompts, overcommitted memory, submits."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .benching import BenchRow, alternate, median_ratio
from .engine_runs import PAGE, EngineBench, random_payload, request, run, step, store

if TYPE_CHECKING:
    import torch

    from ...serving import Request
    from ...serving.engine import Engine


def decode_rows(bench: EngineBench) -> Iterator[BenchRow]:
    """Tokens per second of a batch, from the first token of its last request on, against `model.generate`."""
    sizes = bench.sizes
    with bench.engine(2 * sizes.batch * (sizes.short + sizes.tokens + 2 * PAGE)) as engine:
        prompts = [bench.prompt(i, sizes.short) for i in range(sizes.batch)]
        requests = [request(f"r{i}", prompt, sizes.tokens) for i, prompt in enumerate(prompts)]
        peer = Generating(bench.plain, prompts, sizes.tokens)
        name = f"decode/b{sizes.batch}/ctx{sizes.short}/vs_generate"
        yield _decode_row(name, bench, engine, requests, peer, ">= 1.0")
    share = f"kept{round(100 * sizes.kept)}"
    tokens = sizes.batch * (sizes.context * (sizes.kept + 0.1) + sizes.tokens + 4 * PAGE)
    with bench.engine(max(tokens, sizes.context + 8 * PAGE), bench.compression) as engine:
        prompts = [bench.prompt(i, sizes.context) for i in range(sizes.batch)]
        requests = []
        for i, prompt in enumerate(prompts):
            store(engine, f"agent{i}", prompt, bench.compressed())
            prompt = [*prompt, 1]
            requests.append(request(f"r{i}", prompt, sizes.tokens, agent=f"agent{i}", fixed_tokens=sizes.context))
        peer = Generating(bench.plain, prompts, sizes.tokens, filled=True)
        name = f"decode/b{sizes.batch}/ctx{sizes.context}/{share}/vs_generate"
        yield _decode_row(name, bench, engine, requests, peer, ">= 2.0")


def _decode_row(
    name: str, bench: EngineBench, engine: Engine, requests: Sequence[Request], peer: Generating, target: str
) -> BenchRow:
    ours, theirs = [], []
    for turn in range(1 + bench.runs):
        both = decoding_speed(bench, engine, requests), peer.speed(bench.clock)
        if turn:
            ours.append(both[0])
            theirs.append(both[1])
    medians = statistics.median(ours), statistics.median(theirs)
    return BenchRow(name, *medians, median_ratio(ours, theirs), "tokens/s", bench.runs, target)


def decoding_speed(bench: EngineBench, engine: Engine, requests: Sequence[Request]) -> float:
    """Tokens per second from the step on in which the last of `requests` got its first token."""
    for each in requests:
        engine.submit(each)
    counts: dict[int, int] = {}
    while len(counts) < len(requests) or not all(counts.values()):
        counts = step(engine, counts)
    start, before = bench.clock(), sum(counts.values())
    while len(engine.system.scheduler):
        counts = step(engine, counts)
    return (sum(counts.values()) - before) / (bench.clock() - start)


class Generating:
    """Greedy decoding of a batch by transformers' `generate`.

    Args:
        model: of transformers.
        prompts: of equal lengths.
        tokens: of each answer.
        filled: the prompts are not computed: the cache has random keys and values of so many tokens.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], tokens: int, filled: bool = False) -> None:
        import torch
        from transformers import DynamicCache

        self.model, self.tokens, self.length = model, tokens, len(prompts[0])
        self.ids = torch.tensor([[*prompt, 1] if filled else prompt for prompt in prompts], device=model.device)
        self.cache: Any = None
        if filled:
            config = model.config.get_text_config(decoder=True)
            dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            shape = len(prompts), config.num_key_value_heads, self.length, dim
            self.cache = DynamicCache(config=config)
            for layer in range(config.num_hidden_layers):
                content = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
                self.cache.update(*content, layer)

    def speed(self, clock: Callable[[], float]) -> float:
        """Tokens per second after the first token of each answer."""
        import torch
        from transformers import StoppingCriteriaList

        times: list[float] = []

        def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            times.append(clock())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        with torch.no_grad():
            self.model.generate(
                self.ids, attention_mask=torch.ones_like(self.ids), past_key_values=self.cache, do_sample=False,
                max_new_tokens=self.tokens, min_new_tokens=self.tokens, pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([stop]),
            )  # fmt: skip
        if self.cache is not None:
            self.cache.crop(self.length - self.cache.get_seq_length())
        return len(self.ids) * (len(times) - 1) / (times[-1] - times[0])


def join_row(bench: EngineBench) -> BenchRow:
    """Seconds that a step takes longer when another request joins the batch on a stored prompt, and leaves again."""
    sizes, joins = bench.sizes, 4 * bench.runs
    with bench.engine(2 * sizes.context + (sizes.batch + 2) * (8 * joins + 4 * PAGE)) as engine:
        prompt = bench.prompt(0, sizes.context)
        store(engine, "agent", prompt, random_payload(engine.kv, sizes.context))
        fixed = {"agent": "agent", "fixed_tokens": sizes.context}
        for i in range(sizes.batch):
            engine.submit(request(f"r{i}", [*prompt, i], 8 * joins, **fixed))

        def join() -> None:
            engine.submit(request("joins", [*prompt, sizes.batch], 1, **fixed))
            step(engine)

        for _ in range(2):
            step(engine)
        sides = {"before": lambda: step(engine), "join": join, "after": lambda: step(engine)}
        seconds = alternate(sides, joins, 1, bench.clock)
    without = [(a + b) / 2 for a, b in zip(seconds["before"], seconds["after"], strict=True)]
    longer = [join - step for join, step in zip(seconds["join"], without, strict=True)]
    medians = statistics.median(longer), statistics.median(without)
    name = f"join/b{sizes.batch}/ctx{sizes.context}"
    return BenchRow(name, *medians, median_ratio(longer, without), "s", joins, "<= 0.5 of a step")


def prefill_row(bench: EngineBench) -> BenchRow:
    """Seconds of many short prompts that arrive together, against one after the other."""
    sizes = bench.sizes
    turns = iter(range(1_000_000))
    with bench.engine(2 * sizes.prompts * (sizes.prompt + 2 * PAGE)) as engine:

        def requests() -> Iterator[Request]:
            turn = next(turns)
            for i in range(sizes.prompts):
                yield request(f"r{i}", bench.prompt(1000 * (turn + 1) + i, sizes.prompt), 1)

        def together() -> None:
            for each in requests():
                engine.submit(each)
            run(engine)

        def one_by_one() -> None:
            for each in requests():
                engine.submit(each)
                run(engine)

        seconds = alternate({"together": together, "one by one": one_by_one}, bench.runs, 1, bench.clock)
    ours, theirs = seconds["together"], seconds["one by one"]
    name = f"prefill/{sizes.prompts}x{sizes.prompt}/vs_one_by_one"
    medians = statistics.median(ours), statistics.median(theirs)
    return BenchRow(name, *medians, median_ratio(ours, theirs), "s", bench.runs, "<= 0.5")


@dataclass
class EndsAfter:
    """A token mask that allows everything, and ends the answer after so many tokens."""

    remaining: int

    def allowed(self, tokens: Sequence[int]) -> torch.Tensor | None:
        return None

    def accept(self, token: int) -> None:
        self.remaining -= 1

    @property
    def is_finished(self) -> bool:
        return self.remaining <= 0


@contextmanager
def context_of(model: Any, tokens: int) -> Iterator[None]:
    """The model accepts prompts and answers of so many tokens together; no answer gets that long."""
    config = model.config.get_text_config(decoder=True)
    before = config.max_position_embeddings
    config.max_position_embeddings = max(before, tokens)
    try:
        yield
    finally:
        config.max_position_embeddings = before


def overcommit_row(bench: EngineBench) -> BenchRow:
    """Tokens per second when clients ask for far more tokens than they use, against those who ask for what they use.

    The device has room for half of the clients.
    """
    sizes, (most, few) = bench.sizes, bench.sizes.asked
    turns = iter(range(1_000_000))
    lengths = [sizes.used // 3 + i * (sizes.used - sizes.used // 3) // sizes.clients for i in range(sizes.clients)]
    speeds: dict[int, list[float]] = {most: [], few: []}
    room = sizes.clients / 2 * (sizes.own + few + PAGE)

    def turn(engine: Engine, asked: int) -> float:
        from ...serving import Request, SamplingParams

        first = 100_000 + 1000 * next(turns)
        start = bench.clock()
        for i, length in enumerate(lengths):
            sampling = SamplingParams(ignore_eos=True, make_mask=lambda length=length: EndsAfter(length))
            engine.submit(Request(f"r{i}", bench.prompt(first + i, sizes.own), asked, sampling=sampling))
        run(engine)
        return sum(lengths) / (bench.clock() - start)

    with bench.engine(room) as engine, context_of(bench.session.model, sizes.own + most):
        for counted in range(1 + bench.runs):
            for asked, values in speeds.items():
                speed = turn(engine, asked)
                if counted:
                    values.append(speed)
    medians = statistics.median(speeds[most]), statistics.median(speeds[few])
    ratio = median_ratio(speeds[most], speeds[few])
    return BenchRow(f"overcommit/{most}/vs_{few}", *medians, ratio, "tokens/s", bench.runs, ">= 0.9")


def submit_row(bench: EngineBench) -> BenchRow:
    """Milliseconds that a `submit` holds an event loop while all workflows run, each with a client of its own."""
    from ...serving import AgentSpec, EdgeSpec, Request, SamplingParams, WorkflowSpec
    from ...serving.client import EngineClient

    sizes, taken = bench.sizes, []
    fixed, own, answer = 2 * PAGE, 4, 4

    async def client(engine: EngineClient, workflow: int) -> None:
        for call in range(sizes.calls):
            number = call % sizes.agents
            prompt = bench.prompt(100 * workflow + number, fixed) + bench.prompt(1_000_000 + 100 * workflow + call, own)
            start = time.perf_counter()
            stream = engine.submit(
                Request(
                    f"w{workflow}c{call}", prompt, answer, workflow=f"w{workflow}", agent=f"w{workflow}a{number}",
                    fixed_tokens=fixed, sampling=SamplingParams(ignore_eos=True),
                )
            )  # fmt: skip
            taken.append(1e3 * (time.perf_counter() - start))
            async for _ in stream:
                pass

    async def clients(engine: EngineClient) -> None:
        await asyncio.gather(*(client(engine, workflow) for workflow in range(sizes.workflows)))

    with bench.engine(sizes.workflows * sizes.calls * (fixed + own + answer + 2 * PAGE)) as engine:
        for workflow in range(sizes.workflows):
            agents = [f"w{workflow}a{i}" for i in range(sizes.agents)]
            edges = [EdgeSpec(one, agents[(i + 1) % len(agents)]) for i, one in enumerate(agents)]
            engine.system.graph.add_workflow(WorkflowSpec(f"w{workflow}", [AgentSpec(one) for one in agents], edges))
        with EngineClient(engine) as running:
            asyncio.run(clients(running))
    p99 = statistics.quantiles(taken, n=100)[-1]
    return BenchRow("submit/event_loop/p99", p99, None, p99, "ms", len(taken), "<= 5 ms")
