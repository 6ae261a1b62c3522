"""Lives of an `Engine` on a tiny real model with little room: every answer is compared token for token.

A life is a random sequence of submits, steps, cancellations, evictions, flushes, hints, prepared prompts, and restarts
on one disk folder. After every action the memory that is counted is the memory that is held. `clients_life` drives an
engine from many threads instead.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from ...serving import (
    AgentSpec,
    DiskPool,
    EdgeSpec,
    EngineClient,
    FinishReason,
    Gone,
    Hint,
    LinearCosts,
    MemoryPool,
    QueueFull,
    Request,
    RequestOutput,
    SchedulerConfig,
    StorePolicy,
    ThreadedTransfer,
    Tier,
    WorkflowSpec,
    build_system,
)
from ...serving.scheduler.request_state import RequestState

if TYPE_CHECKING:
    from ...eviction import Session
    from ...serving import Compression, Engine

AGENTS, PAGE, VOCAB, END = 5, 8, 128, 2
COMMON, FIXED, MAX_SUFFIX, MAX_ANSWER = 16, 40, 11, 24  # tokens; all agents' fixed prompts begin with the common ones
SYSTEMS = ("lru", "lru_reactive", "lru_prefetch", "ste_prefetch", "expected_time")
PATIENCE_S = 120.0  # for the end of a client's thread, after which it counts as stuck
PATIENCE_STEPS = 50_000  # for the end of all requests: minutes of an engine that only waits, whatever else runs
CLIENTS = 3
LINK_BYTES_PER_S = 2e6  # slow enough that steps meet loads in progress
CONFIG = SchedulerConfig(
    max_num_batched_tokens=40, prefill_chunk_size=24, answer_headroom_tokens=1, page_patience_s=0.05,
    max_num_seqs=4, max_queued_requests=16,
)  # fmt: skip


def prompt_of(agent: int, suffix: int) -> list[int]:
    """Whole numbers below the vocabulary's end, the same in every life."""
    common, own, rest = Random(-1), Random(agent), Random(1000 + suffix)
    fixed = [common.randrange(3, VOCAB) for _ in range(COMMON)]
    fixed += [own.randrange(3, VOCAB) for _ in range(FIXED - COMMON)]
    return fixed + [rest.randrange(3, VOCAB) for _ in range(1 + suffix % MAX_SUFFIX)]


class Answers:
    """The model's greedy answer to each prompt without any cache, computed once."""

    def __init__(self, session: Session, compression: Compression) -> None:
        self.session, self.compression = session, compression
        self._known: dict[tuple[int, int, bool], list[int]] = {}
        self._lock = threading.Lock()

    def __call__(self, agent: int, suffix: int, compressed: bool) -> list[int]:
        """At most `MAX_ANSWER` tokens; not while an engine computes on the same model."""
        with self._lock:
            key = agent, suffix, compressed
            if key not in self._known:
                self._known[key] = self._compute(prompt_of(agent, suffix), compressed)
            return self._known[key]

    def _compute(self, following: list[int], compressed: bool) -> list[int]:
        from ...serving import PromptKV

        kv, cache, answer = PromptKV(self.session), self.session.new_cache(), []
        if compressed:
            kv.forward(cache, following[:FIXED])
            kv.compress(cache, self.compression)
            following = following[FIXED:]
        while len(answer) < MAX_ANSWER and answer[-1:] != [END]:
            answer.append(int(kv.forward(cache, following).argmax()))
            following = answer[-1:]
        return answer


@contextmanager
def tiny_answers() -> Iterator[Answers]:
    """A block of a random Llama with gates, of two layers; torch uses one thread in it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ...eviction import evict
    from ...retention import RetentionGates
    from ...serving import Compression

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=END,
            initializer_range=0.2,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        gates = RetentionGates.for_model(model, gate_width=8, init_std=0.5, initial_bias=2.0)
    torch.set_num_threads(1)  # the model is far too small for more
    try:
        with evict(model, "full", gates=gates, observe=["retention"]) as session:
            yield Answers(session, Compression("retention", 0.4, sinks=2, recent=4))
    finally:
        torch.set_num_threads(threads)


class EngineWorld:
    """An engine, what it was asked, and what became of it.

    Args:
        answers: of the model.
        random: chooses system, tiers and, later, actions.
        folder: of the disk tier.
    Attributes:
        counts: what happened.
    """

    def __init__(self, answers: Answers, random: Random, folder: Path) -> None:
        self.answers, self.random, self.folder = answers, random, folder
        self.name, self.compressed = random.choice(SYSTEMS), random.random() < 0.5
        self.host, self.disk = random.choice([0.0, 1.0, 4.0]), random.random() < 0.6
        self.prompts, self.max_num_seqs = random.choice([0.7, 0.7, 2.0]), random.choice([1, 2, 4])
        self.asked: dict[int, tuple[int, int, bool]] = {}
        self.counts: Counter[str] = Counter()
        self.engine = self._start()

    def _start(self) -> Engine:
        from ...serving import Engine, PromptKV

        session, compression = self.answers.session, self.answers.compression
        rate = PromptKV(session, PAGE).bytes_per_token()
        room = self.prompts * FIXED + FIXED + MAX_SUFFIX + MAX_ANSWER + 2 * PAGE
        pools: dict[Tier, Any] = {Tier.DEVICE: MemoryPool(int(rate * room))}
        if self.host:
            pools[Tier.HOST] = MemoryPool(int(rate * self.host * FIXED))
        if self.disk:
            pools[Tier.DISK] = DiskPool(10**6, self.folder)
        links = {(a, b): LINK_BYTES_PER_S for a in Tier for b in Tier if a != b}
        system = build_system(
            self.name, pools, ThreadedTransfer(links), costs=LinearCosts(2000.0, (1e8, 1e8)), bytes_per_token=rate,
            clock=time.monotonic, page_size=PAGE,
            scheduler_config=replace(CONFIG, max_num_seqs=self.max_num_seqs),
        )  # fmt: skip
        names = [f"agent{i}" for i in range(AGENTS)]
        edges = [EdgeSpec(name, names[(i + 1) % AGENTS]) for i, name in enumerate(names)]
        system.graph.add_workflow(WorkflowSpec("ring", [AgentSpec(name) for name in names], edges))
        engine = Engine(session, system, compression if self.compressed else None)
        self.counts["prompts restored from disk"] += sum(n.copies[Tier.DISK] is not None for n in system.tiers.tree)
        return engine

    # Actions ----------------------------------------------------------------------------------------------------

    def act(self) -> None:
        """One random action, and the checks."""
        actions = (self.submit, self.step, self.cancel, self.evict, self.flush, self.prepare, self.hint, self.restart)
        self.random.choices(actions, (20, 60, 8, 3, 0.5, 2, 2, 0.5))[0]()
        self.check()

    def new_request(self, random: Random) -> tuple[Request, tuple[int, int, bool]]:
        agent, suffix, named = random.randrange(AGENTS), random.randrange(12), random.random() < 0.8
        options: dict[str, Any] = {}
        if named:
            options = {"agent": f"agent{agent}", "fixed_tokens": FIXED, "workflow": random.choice(["ring", None])}
        if random.random() < 0.1:
            options["timeout_s"] = random.choice([0.001, 0.02])
        policy = random.choice([StorePolicy.NEUTRAL, StorePolicy.NEUTRAL, StorePolicy.DISCARD])
        count, client = random.randint(1, MAX_ANSWER), random.choice(["", "x", "y"])
        request = Request("r", prompt_of(agent, suffix), count, store_policy=policy, client=client, **options)
        return request, (agent, suffix, named and self.compressed)

    def submit(self) -> None:
        request, key = self.new_request(self.random)
        try:
            self.asked[self.engine.submit(request)] = key
        except QueueFull:
            self.counts["refused"] += 1
        else:
            self.counts["submitted"] += 1

    def step(self) -> None:
        for ended in self.engine.step(0.002):
            self.take(ended)
        self.counts["engine steps"] += 1

    def take(self, ended: RequestOutput) -> None:
        """An output is what the model answers, up to where the request ended."""
        key = self.asked.pop(ended.number)
        self.compare(key, ended)

    def compare(self, key: tuple[int, int, bool], ended: RequestOutput) -> None:
        answer, reason = self.answers(*key), ended.finish_reason
        assert reason is not FinishReason.FAILED, ended.error
        assert ended.tokens == answer[: len(ended.tokens)], f"{ended.tokens} of {answer} for {key}"
        if reason is FinishReason.ANSWERED:
            assert ended.tokens == answer[: ended.request.max_new_tokens]
        self.counts[reason.value] += 1
        self.counts["tokens compared"] += len(ended.tokens)
        self.counts["cached tokens"] += ended.cached_tokens
        self.counts["loaded tokens"] += ended.loaded_tokens
        self.counts["preemptions"] += ended.num_preemptions

    def cancel(self) -> None:
        states: dict[int, RequestState] = self.engine.system.scheduler._requests
        if states:
            number = self.random.choice(list(states))
            self.counts[f"cancelled while {states[number].status.name}"] += 1
            self.engine.cancel(number)

    def evict(self) -> None:
        tiers = self.engine.system.tiers
        tiers.evictor.make_room(Tier.DEVICE, int(self.random.choice([0.3, 1.0]) * tiers.capacity()))

    def flush(self) -> None:
        self.engine.flush()
        self.counts["flushes"] += 1

    def prepare(self) -> None:
        agent = self.random.randrange(AGENTS)
        fixed = prompt_of(agent, 0)[:FIXED]
        self.engine.store(f"agent{agent}", fixed, self.engine.prepare(fixed))

    def hint(self) -> None:
        self.engine.hint(Hint("kvflow", steps={f"agent{self.random.randrange(AGENTS)}": 5 * self.random.random()}))

    def restart(self) -> None:
        """The engine is closed with whatever runs, and another one continues with the same folder."""
        self.close()
        self.engine = self._start()
        self.counts["restarts"] += 1

    # Checks -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """All pages that the pool counts are held, but for those reserved and not written, or being copied to."""
        engine = self.engine
        tiers, pages, pool = engine.system.tiers, engine.pages, engine.system.tiers.pools[Tier.DEVICE]
        pages.check()
        with tiers.lock:
            arriving = sum(job.allocated for job in tiers.transfers.jobs.values() if job.target is Tier.DEVICE)
            held = (pages.num_pages - pages.num_free) * pages.geometry.page_bytes
            counted = f"{held} held, {pool.used} used, {pool.reserved} reserved, {arriving} arriving"
            assert pool.used - pool.reserved - arriving <= held <= pool.used <= pool.capacity, counted
            if self.name != "expected_time":  # the ranks of which change with time
                engine.system.scheduler.check()

    def close(self) -> None:
        """All requests end, and no page is held any more."""
        engine = self.engine
        engine.system.scheduler.close("the life is over")
        for ended in engine.step(0.0):
            self.take(ended)
        assert not self.asked, "every request has ended"
        engine.system.close()
        engine.pages.check()
        assert engine.pages.num_free == engine.pages.num_pages, "nobody holds pages any more"

    def end(self) -> None:
        """Every request that is left ends by itself."""
        scheduler = self.engine.system.scheduler
        for _ in range(PATIENCE_STEPS):
            if not len(scheduler):
                return self.close()
            self.step()
            self.check()
        stages = ", ".join(state.status.name for state in scheduler._requests.values())
        raise AssertionError(f"{len(scheduler)} requests do not end: {stages}")


def engine_life(answers: Answers, seed: int, steps: int) -> Counter[str]:
    """One life of `steps` actions chosen by the seed; returns what happened."""
    random = Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        world = EngineWorld(answers, random, Path(folder))
        for _ in range(steps):
            world.act()
        world.end()
    world.counts["actions"] += steps
    return world.counts


def clients_life(answers: Answers, seed: int, seconds: float) -> Counter[str]:
    """An engine behind an `EngineClient`, whose threads submit, read, cancel, hint and flush; what happened."""
    for key in ((a, s, c) for a in range(AGENTS) for s in range(12) for c in (False, True)):
        answers(*key)  # before the engine's thread uses the model
    failures: list[BaseException] = []
    with tempfile.TemporaryDirectory() as folder:
        world = EngineWorld(answers, Random(seed), Path(folder))
        counting, end = threading.Lock(), time.monotonic() + seconds

        def one_client(number: int) -> None:
            random = Random(seed * 1000 + number)
            while time.monotonic() < end and not failures:
                request, key = world.new_request(random)
                try:
                    _ask(client, random, request, key, world, counting)
                except BaseException as error:
                    failures.append(error)

        with EngineClient(world.engine) as client:
            threads = [threading.Thread(target=one_client, args=(n,), daemon=True) for n in range(CLIENTS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(seconds + PATIENCE_S)
            assert not any(thread.is_alive() for thread in threads), "a client waits for ever"
        if failures:
            raise failures[0]
        world.close()
    return Counter({f"clients: {name}": n for name, n in world.counts.items()})


def _ask(
    client: EngineClient, random: Random, request: Request, key: tuple[int, int, bool], world: EngineWorld,
    counting: threading.Lock,
) -> None:  # fmt: skip
    """A request as a client handles it: read to its end, or cancelled after some tokens."""
    luck, tokens, output = random.random(), [], None
    patience = random.randrange(4) if luck < 0.3 else None
    if luck > 0.98:
        client.flush()
    elif luck > 0.9:
        client.hint(Hint("kvflow", steps={f"agent{random.randrange(AGENTS)}": 1.0}))
    try:
        with client.submit(request) as stream:
            for event in stream:
                tokens += event.tokens
                output = event.output or output
                if patience is not None and len(tokens) > patience:
                    break
    except (Gone, QueueFull) as error:
        output = getattr(error, "output", None)
    with counting:
        world.counts["requests"] += 1
        if output is not None:
            assert tokens == list(output.tokens), "the stream is the answer"
            world.compare(key, output)
        else:
            assert tokens == world.answers(*key)[: len(tokens)]
            world.counts["left or refused"] += 1
