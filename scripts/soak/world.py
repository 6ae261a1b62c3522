"""A complete serving system under test: every step is followed by integrity checks, and every request is accounted for.

Steps are chosen by drivers: `random_step` for long random runs, and hypothesis in the tests, which shrinks failures.
"""

from __future__ import annotations

import errno
import warnings
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

from ...serving import (
    AgentSpec,
    DiskPool,
    EdgeSpec,
    FinishReason,
    HintReader,
    LinearCosts,
    LinkSpeed,
    MemoryPool,
    PrefetchConfig,
    Request,
    RequestOutput,
    ScheduledBatch,
    ScheduledPrefill,
    SchedulerConfig,
    StorePolicy,
    TensorPayload,
    Tier,
    VirtualClock,
    WorkflowSpec,
    build_system,
)
from ...serving.kvcache.memory_pool import Pool
from ...serving.kvcache.radix_tree import Node
from ...serving.kvcache.transfer_threads import WorkerDiedError
from .faulty_kv import TOKEN_BYTES, FaultyTransfer, assert_holds, damage, kv_of

PAGE = 2
SYSTEMS = ("lru", "lfu", "lru_reactive", "hicache", "lru_prefetch", "ste", "ste_prefetch", "expected_time")
BELOW = ("host", "host and disk", "disk", "nothing")
AGENTS = tuple("abcde")
FIXED = {
    agent: [ord(agent) % 3, 1, 0, ord(agent) % 2, 1, ord(agent) % 5][: 2 + 2 * (ord(agent) % 3)] for agent in AGENTS
}
FAULTS: tuple[Exception, ...] = (
    OSError(errno.ENOSPC, "no space left"),
    RuntimeError("failed"),
    WorkerDiedError("dead"),
)
LINKS = {(a, b): LinkSpeed(500.0) for a in Tier for b in Tier if a != b}
HINTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sglang", {"agent_id": "a", "reuse_hint": "keep", "cache_ttl_ms": 2000, "children_step_ids": ["b", "c"]}),
    ("sglang", {"agent_id": "b", "reuse_hint": "discard", "expected_tool_duration_ms": 1500}),
    ("dynamo", {"agent_hints": {"priority": 7, "speculative_prefill": True}, "session_control": {"session_id": "s"}}),
    ("vllm", {"session_id": "s", "cache_control": {"type": "ephemeral", "ttl": 5}}),
    ("kv_hints", {"message_id": "m1", "agent_id": "c", "actions": [{"action_type": "kv.fetch"}]}),
    ("kv_hints", {"message_id": "m2", "agent_id": "d", "actions": [{"action_type": "kv.evict"}]}),
    ("kvflow", {"agent_data": {"a": 3, "b": 1, "e": 0}, "timestep_cnt": 4}),
    ("kvflow", {"timestep_data": {"0": ["c"], "2": ["d", "a"]}, "timestep_cnt": 3}),  # late
)


class World:
    """A system, its requests, and what became of them.

    Args:
        name: of the system. below: which of `BELOW` there is below the device.
        folder: of the disk tier.
        compressed: fixed prompts are stored compressed. pages: KV is joined and split like lists of pages.
    Attributes:
        out: the work that is being computed. ended: how often requests ended, by outcome.
    """

    def __init__(self, name: str, below: str, folder: str, compressed: bool = False, pages: bool = False) -> None:
        pools: dict[Tier, Pool] = {Tier.DEVICE: MemoryPool(24 * TOKEN_BYTES)}
        if "host" in below:
            pools[Tier.HOST] = MemoryPool(20 * TOKEN_BYTES)
        if "disk" in below:
            pools[Tier.DISK] = DiskPool(4500, folder)
        self.clock, self.compressed, self.pages = VirtualClock(), compressed, pages
        self.copies = FaultyTransfer(self.clock, LINKS)
        self.system = build_system(
            name,
            pools,
            self.copies,
            clock=self.clock,
            costs=LinearCosts(8.0, (500.0, 500.0)),
            bytes_per_token=TOKEN_BYTES,
            page_size=PAGE,
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=9,
                max_num_seqs=3,
                max_concurrent_loads=2,
                max_queued_requests=8,
                timeout_s=60,
                allocation_patience_s=3,
                answer_headroom_tokens=1,
                page_patience_s=2.0,
                max_prefill_tokens_per_step=5,
            ),
            prefetch_config=PrefetchConfig(look_ahead_s=20.0, max_in_flight=2),
            learn=True,
        )
        self.scheduler, self.tiers = self.system.scheduler, self.system.tiers
        self.reader = HintReader()
        self.live: dict[int, Request] = {}  # by number
        self.answers: dict[int, list[int]] = {}
        self.ended: Counter[FinishReason] = Counter()
        self.read = self.submitted = self.refused = 0
        self.out: ScheduledBatch | None = None
        self.add_workflow("ring")
        self.add_workflow("tree")

    def add_workflow(self, name: str) -> None:
        """Adds the workflow, or removes it if it is running."""
        graph = self.system.graph
        if name in graph:
            graph.remove_workflow(name)
            return
        edges = [(a, b, 1.0) for a, b in zip(AGENTS, AGENTS[1:] + AGENTS[:1], strict=True)]
        if name == "tree":
            edges = [("a", "b", 0.5), ("a", "c", 0.5), ("b", "d", 1.0), ("c", "d", 1.0), ("d", "a", 0.7)]
        graph.add_workflow(
            WorkflowSpec(name, [AgentSpec(a, call_s=2.0) for a in AGENTS], [EdgeSpec(*e) for e in edges], ["a"])
        )

    # Requests ---------------------------------------------------------------------------------------------------

    def submit(self, suffix: Sequence[int], agent: str | None, number: int, options: dict[str, Any]) -> None:
        """A request for `number % 10 + 1` tokens; what can never fit is refused, clearly."""
        label = f"r{self.submitted % 3}"  # clients use labels again
        self.submitted += 1
        prompt = [*(FIXED[agent] if agent else []), *suffix]
        workflow = ("ring", "tree", "other", None)[number % 4]
        marked = len(FIXED[agent]) if agent and number % 3 else 0
        try:
            request = Request(
                label,
                prompt,
                1 + number % 10,
                workflow=workflow,
                agent=agent,
                fixed_tokens=marked,
                explain_cache=number % 2 == 0,
                **options,
            )
            name = self.scheduler.submit(request)
        except ValueError as error:
            assert any(known in str(error) for known in ("empty prompt", "the queue is full", "pool has")), error
            self.refused += 1
        else:
            self.live[name], self.answers[name] = request, []

    def cancel(self, choice: int) -> None:
        names = [*self.live, 0]
        self.scheduler.cancel(names[choice % len(names)])

    def begin(self, max_steps: int = 1) -> None:
        """Takes the next work, and reads everything that it is to be built on."""
        self.out = self.scheduler.next_batch(max_steps)
        if self.out is None:
            return
        assert self.out.num_tokens <= 9 or max_steps > 1, "a batch keeps within its budget"
        assert all(state.handle is None and not state.reserved_bytes for state in self.out.preempted)
        for item in self.out.prefills:
            assert item.start < item.end and item.start >= item.handle.length
            if item.first:
                assert item.start == item.handle.length, "what is cached is not computed again"
                assert_holds(item.handle.payloads(), item.state.token_ids(0, item.handle.length))
                self.read += item.handle.length

    def finish(self, seed: int, fails: str = "") -> None:
        """Completes the batch. `fails` is "" or the part that fails: item, batch or payload."""
        work, self.out = self.out, None
        if work is None:
            return
        random = Random(seed)
        if fails == "batch":
            self.scheduler.complete(work, RuntimeError("out of memory"))
            return
        items = [*work.prefills, *work.decodes]
        for item in items:
            name = item.state.number
            if isinstance(item, ScheduledPrefill):
                tokens = [random.randrange(3)] if item.last else []
                if item.store is not None and random.random() < 0.9:
                    item.payload = self._payload(item)
            else:
                tokens = [random.randrange(3) for _ in range(random.randint(1, min(work.steps, item.remaining)))]
            if tokens and random.random() < 0.95:
                item.tokens = tokens
                self.answers[name] += tokens
                item.finished = random.random() < 0.2
                span = None if isinstance(item, ScheduledPrefill) else item.store_span()
                missing = self.compressed and span is not None and span[0] < item.state.num_fixed_tokens
                if span is not None and not missing:
                    item.payload = kv_of([*item.request.prompt, *self.answers[name]], *span, pages=self.pages)
        if fails == "item" and items:
            random.choice(items).error = RuntimeError("NaN")
        elif fails == "payload" and items:
            random.choice(items).payload = kv_of([1, 2, 3], 0, 3)
        self.scheduler.complete(work)

    def _payload(self, item: ScheduledPrefill) -> TensorPayload | None:
        """The KV that a chunk stores; a compressed fixed prompt has none before its end, and then as a whole."""
        assert item.store is not None
        start, end = item.store
        fixed = item.state.num_fixed_tokens if self.compressed else 0
        if start < fixed:
            return kv_of(item.state.token_ids(0, end), 0, end, compressed=True) if (start, end) == (0, fixed) else None
        return kv_of(item.state.token_ids(0, end), start, end, pages=self.pages)

    # The rest of the world --------------------------------------------------------------------------------------

    def hint(self, choice: int, client: str) -> None:
        source, document = HINTS[choice % len(HINTS)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.scheduler.hint(self.reader.read(source, document, client))

    def time_passes(self, seconds: float) -> None:
        """Advances the clock; `seconds` may be negative."""
        self.clock.now = max(0.0, self.clock.now + seconds)

    def fault(self, choice: int) -> None:
        self.copies.fault = FAULTS[choice % len(FAULTS)]

    def damage(self, choice: int, how: str) -> None:
        on_disk = [node for node in self.tiers.tree if isinstance(node.copies[Tier.DISK], object) and self._idle(node)]
        if on_disk:
            damage(on_disk[choice % len(on_disk)], how)

    @staticmethod
    def _idle(node: Node) -> bool:
        return node.copies[Tier.DISK] is not None

    def register(self, agent: str) -> None:
        if self.system.prefetcher is not None:
            self.system.prefetcher.register(agent, FIXED[agent])

    def make_room(self, share: float) -> None:
        pool = self.tiers.pools[Tier.DEVICE]
        self.tiers.evictor.make_room(Tier.DEVICE, int(share * pool.capacity))

    def wait(self) -> None:
        """Advances the clock to the next event, like a driver without work."""
        due = self.scheduler.next_time()
        if due is not None:
            self.clock.advance_to(due)

    def check(self) -> None:
        """Everything is counted anew."""
        self.scheduler.check()
        for ended in self.scheduler.take_finished():
            self._take(ended)
        assert len(self.live) == len(self.scheduler), "no request is lost"

    def _take(self, ended: RequestOutput) -> None:
        request = self.live.pop(ended.number)  # a KeyError: it has ended twice
        assert ended.request is request
        self.ended[ended.finish_reason] += 1
        told = self.answers.pop(ended.number)
        assert ended.tokens == told[: len(ended.tokens)] and ended.num_output_tokens <= request.max_new_tokens
        if ended.finish_reason is FinishReason.ANSWERED:
            assert ended.error is None and ended.num_output_tokens >= 1
        else:
            assert ended.error, "an end without an answer says why"
        report = ended.cache
        if report is not None:
            spans = report.computed
            begins, ends = [each.start for each in spans], [report.reused_tokens, *(each.end for each in spans)]
            assert [*begins, report.prompt_tokens] == ends, "a prompt is what was reused, and what was computed behind"
            assert all(each.start < each.end for each in spans), "no reason is given for nothing"

    def counts(self) -> dict[str, int]:
        """Counters of everything that happened."""
        found = {"submitted": self.submitted, "refused": self.refused, "tokens read back": self.read}
        found.update({outcome.value: number for outcome, number in self.ended.items()})
        parts = {"": self.scheduler.metrics, "tiers: ": self.tiers.statistics}
        if self.system.prefetcher is not None:
            parts["prefetch: "] = self.system.prefetcher.statistics
        for kind, statistics in parts.items():
            numbers = {name: n for name, n in vars(statistics).items() if isinstance(n, int) and name != "submitted"}
            found.update({f"{kind}{name}": number for name, number in numbers.items()})
        return found

    def end(self, rounds: int = 400) -> None:
        """Faults stop; every request ends by itself, and what is left can be evicted to the last byte."""
        self.copies.fault = None
        self.finish(0)
        for number in range(rounds):
            if not len(self.scheduler):
                break
            self.begin()
            if self.out is None:
                self.wait()
            else:
                self.clock.advance_to(self.clock() + 0.1)
                self.finish(number)
            self.check()
        assert not len(self.scheduler), "every request ends"
        self.scheduler.close()
        for _ in range(rounds):  # the end of a transfer may begin an eager write-back
            self.clock.advance_to(self.clock() + 1e6)
            self.tiers.poll()
            if not self.tiers.has_transfers:
                break
        self.check()
        assert not self.tiers.handles and not self.tiers.has_transfers and not self.live
        assert self.tiers.pools[Tier.DEVICE].reserved == 0
        self.system.close()


def random_step(world: World, random: Random) -> str:
    """Performs one random step, weighted towards normal operation; returns its name."""
    name = random.choices(STEPS, WEIGHTS)[0]
    if name == "submit":
        options: dict[str, Any] = {"client": random.choice(["", "", "x", "y"]), "priority": random.random()}
        if random.random() < 0.2:
            options |= {"timeout_s": random.choice([0.5, 3.0]), "expected_tokens": 2}
            options["store_policy"] = StorePolicy.DISCARD
        suffix = [random.randrange(3) for _ in range(random.randrange(7))]
        world.submit(suffix, random.choice([*AGENTS, None]), random.randrange(60), options)
    elif name == "work":
        if world.out is None:
            world.begin(random.choice([1, 1, 3]))
        world.finish(random.randrange(2**32), random.choice([""] * 12 + ["item", "batch", "payload"]))
    elif name == "begin":
        if world.out is None:
            world.begin()
    elif name == "time":
        world.time_passes(random.choice([0.0, 0.02, 0.02, 0.1, 0.1, 1.0, 5.0]))
    elif name == "jump":
        world.time_passes(random.choice([-3.0, 100.0]))
    elif name == "wait":
        world.wait()
    elif name == "cancel":
        world.cancel(random.randrange(8))
    elif name == "hint":
        world.hint(random.randrange(len(HINTS)), random.choice(["", "x", "y"]))
    elif name == "fault":
        world.fault(random.randrange(len(FAULTS)))
    elif name == "damage":
        world.damage(random.randrange(8), random.choice(["flip", "cut", "remove"]))
    elif name == "room":
        world.make_room(random.choice([0.3, 1.0]))
    elif name == "graph":
        world.add_workflow(random.choice(["ring", "tree"]))
    else:
        world.register(random.choice(AGENTS))
    return name


STEPS = (
    "submit", "work", "begin", "time", "jump", "wait", "cancel", "hint", "fault", "damage", "room", "graph", "register"
)  # fmt: skip
WEIGHTS = (20, 40, 6, 25, 0.5, 10, 4, 4, 2, 2, 2, 1, 1)
