"""Engine, clients and transfers in threads with a short switch interval, injected faults and a watchdog."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from ...serving import (
    AgentSpec,
    DiskPool,
    EdgeSpec,
    FinishReason,
    HintReader,
    LinearCosts,
    MemoryPool,
    PrefetchConfig,
    Request,
    ScheduledBatch,
    SchedulerConfig,
    System,
    ThreadedTransfer,
    Tier,
    WorkflowSpec,
    build_system,
)
from ...serving.kvcache.base import KVPayload, PromptKey
from ...serving.kvcache.memory_pool import PayloadBuilder, Pool
from .faulty_kv import TOKEN_BYTES, assert_holds, kv_of
from .world import HINTS

AGENTS = tuple("abcdefgh")
SILENCE_S = 60.0  # without any end of a request, after which the watchdog speaks of a deadlock
CLIENTS = 4


class FlakyPool(MemoryPool):
    """Host memory of which one write in a hundred fails, and one in a thousand kills the thread that writes."""

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity)
        self.random = Random(seed)

    def new_builder(self, payload: KVPayload, prompt: PromptKey | None = None) -> PayloadBuilder:
        builder, luck = super().new_builder(payload, prompt), self.random.random()
        if luck < 0.011:
            error: BaseException = RuntimeError("a bit flipped") if luck < 0.01 else SystemExit()

            def write(*_: object) -> None:
                raise error

            builder.write = write  # type: ignore[method-assign]
        return builder


class Stress:
    """Clients submit, cancel and hint; one engine computes; another thread evicts, merges and checks.

    Attributes:
        ended: by outcome. read: tokens of cached KV that were compared with what was written. hints: taken.
        failures: what went wrong in any thread.
    """

    def __init__(self, folder: str, seed: int) -> None:
        pools: dict[Tier, Pool] = {
            Tier.DEVICE: MemoryPool(160 * TOKEN_BYTES),
            Tier.HOST: FlakyPool(120 * TOKEN_BYTES, seed),
            Tier.DISK: DiskPool(20_000, folder),
        }
        name = ("ste_prefetch", "expected_time", "lru_prefetch")[seed % 3]
        self.system: System = build_system(
            name,
            pools,
            ThreadedTransfer({(Tier.HOST, Tier.DEVICE): 1e5}),
            clock=time.monotonic,
            costs=LinearCosts(5000.0, (1e5, 1e5)),
            bytes_per_token=TOKEN_BYTES,
            page_size=2,
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=48,
                max_num_seqs=6,
                max_concurrent_loads=4,
                max_queued_requests=64,
                timeout_s=20.0,
                answer_headroom_tokens=1,
            ),
            prefetch_config=PrefetchConfig(look_ahead_s=5.0),
        )
        edges = [EdgeSpec(a, b) for a, b in zip(AGENTS, AGENTS[1:] + AGENTS[:1], strict=True)]
        self.system.graph.add_workflow(WorkflowSpec("ring", [AgentSpec(a) for a in AGENTS], edges, ["a"]))
        self.seed, self.stop = seed, threading.Event()
        self.ended: Counter[FinishReason] = Counter()
        self.failures: list[BaseException] = []
        self.read = self.submitted = self.refused = self.hints = 0
        self.last_end = time.monotonic()
        self._counting = threading.Lock()

    def run(self, seconds: float) -> None:
        """Runs for so long, then lets every request end.

        Raises:
            RuntimeError: nothing has ended for a minute.
            BaseException: the first failure of a thread.
        """
        engine = threading.Thread(target=self._guarded, args=(self._engine,), daemon=True)
        threads = [threading.Thread(target=self._guarded, args=(self._client, n), daemon=True) for n in range(CLIENTS)]
        threads.append(threading.Thread(target=self._guarded, args=(self._caretaker,), daemon=True))
        with switching_often():
            for thread in (engine, *threads):
                thread.start()
            end = time.monotonic() + seconds
            while time.monotonic() < end and not self.failures:
                self._watch()
            self.stop.set()
            for thread in (*threads, engine):
                while thread.is_alive():
                    self._watch()
        if self.failures:
            raise self.failures[0]
        self._finish()

    def _watch(self) -> None:
        time.sleep(0.02)
        if time.monotonic() - self.last_end > SILENCE_S:
            import faulthandler

            faulthandler.dump_traceback(all_threads=True)
            raise RuntimeError(f"no request has ended for {SILENCE_S:g} s: {len(self.system.scheduler)} are left")

    def _guarded(self, target, *args: int) -> None:
        try:
            target(*args)
        except BaseException as error:
            self.failures.append(error)
            self.stop.set()

    def _finish(self) -> None:
        assert self.submitted == sum(self.ended.values()), "every request has ended once"
        scheduler, tiers = self.system.scheduler, self.system.tiers
        scheduler.close()
        scheduler.check()
        self.system.close()
        tiers.check()
        assert not tiers.handles and not tiers.has_transfers

    def _client(self, number: int) -> None:
        random, mine, client = Random(self.seed * 100 + number), 0, f"c{number % 2}"
        reader = HintReader()
        while not self.stop.is_set():
            agent = random.choice(AGENTS)
            fixed = [ord(agent), *range(11)]
            prompt = [*fixed, *(random.randrange(3) for _ in range(random.randrange(1, 12)))]
            name = f"{number}/{mine % 3}"  # labels are used again
            mine += 1
            workflow = "ring" if random.random() < 0.7 else None
            try:
                request_number = self.system.scheduler.submit(
                    Request(name, prompt, random.randint(1, 20), workflow, agent, 12, client=client)
                )
            except ValueError as error:
                assert "the queue is full" in str(error), error
                time.sleep(0.005)
                with self._counting:
                    self.refused += 1
                continue
            with self._counting:
                self.submitted += 1
            if random.random() < 0.05:
                self.system.scheduler.cancel(request_number)
            if random.random() < 0.1:
                self.system.scheduler.hint(reader.read(*random.choice(HINTS), client))
                with self._counting:
                    self.hints += 1
            time.sleep(random.choice([0, 0, 0.001, 0.01]))

    def _caretaker(self) -> None:
        random, system = Random(self.seed), self.system
        while not self.stop.is_set():
            action = random.randrange(4)
            if action == 0:
                with system.tiers.lock:
                    system.tiers.evictor.make_room(Tier.DEVICE, 100 * TOKEN_BYTES)
            elif action == 1:
                system.tiers.merge_spans()
            elif action == 2 and system.prefetcher is not None:
                agent = random.choice(AGENTS)
                system.prefetcher.register(agent, [ord(agent), *range(11)])
            else:
                system.tiers.check()
            time.sleep(0.01)

    def _engine(self) -> None:
        scheduler, random = self.system.scheduler, Random(self.seed)
        while not self.stop.is_set() or len(scheduler):
            work = scheduler.next_batch()
            for ended in scheduler.take_finished():
                assert bool(ended.error) == (ended.finish_reason is not FinishReason.ANSWERED)
                self.ended[ended.finish_reason] += 1
                self.last_end = time.monotonic()
            if work is None:
                scheduler.wait(0.05)
                continue
            self._compute(work, random)
            if random.random() < 0.01:
                scheduler.complete(work, RuntimeError("out of memory"))
            else:
                scheduler.complete(work)
        for ended in scheduler.take_finished():
            self.ended[ended.finish_reason] += 1

    def _compute(self, work: ScheduledBatch, random: Random) -> None:
        for item in work.prefills:
            if item.first:
                assert_holds(item.handle.payloads(), item.state.token_ids(0, item.handle.length))
                self.read += item.handle.length
            if item.store is not None:
                item.payload = kv_of(item.state.token_ids(0, item.end), *item.store)
            if item.last:
                item.tokens = [random.randrange(3)]
        for item in work.decodes:
            item.tokens = [random.randrange(3)]
            span = item.store_span()
            if span is not None:
                item.payload = kv_of([*item.state.token_ids(0, span[1]), *item.tokens], *span)


@contextmanager
def switching_often(seconds: float = 1e-5) -> Iterator[None]:
    """Python's threads take turns a few hundred times as often as usual."""
    before, level = sys.getswitchinterval(), logging.getLogger("tenure.serving").level
    logging.getLogger("tenure.serving").setLevel(logging.CRITICAL)  # faults are injected on purpose
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        logging.getLogger("tenure.serving").setLevel(level)
