"""Random steps on tree and tiers with faults; after each, all counts are verified and everything read is correct.

`TENURE_TIER_STEPS` asks for a longer run than the one of continuous integration.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections import Counter
from random import Random
from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run

from tenure.serving import (
    LFU,
    LRU,
    AllocStatus,
    CacheHandle,
    DiskConfig,
    DiskPool,
    EagerWriteBackConfig,
    ExpectedTime,
    LinearCosts,
    LoadState,
    MemoryPool,
    StepsToExecution,
    Tier,
    TieredCache,
    TierPolicy,
    Urgency,
    VirtualClock,
    WriteBack,
)
from tenure.serving.kvcache.memory_pool import Pool
from tenure.serving.kvcache.transfer_threads import WorkerDiedError

STEPS = int(os.environ.get("TENURE_TIER_STEPS", "3000"))
STEPS_EACH = 60  # at most: many examples are shorter
PAGE = 2
SMALL = DiskConfig(block_tokens=4, label_bytes=256)
ORDERS = ("lru", "lfu", "ste", "expected")
BELOW = ("host", "host and disk", "disk", "nothing")
prompts = st.lists(st.integers(0, 1), max_size=10)
agents = st.sampled_from("abc")
flags = st.booleans()


class TierMachine(RuleBasedStateMachine):
    kv: Any  # set by the test
    steps = 0
    restarts: ClassVar[Counter[bool]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.values: dict[str, float] = {}
        self.handles: list[tuple[CacheHandle, list[int]]] = []

    @initialize(
        order=st.sampled_from(ORDERS),
        write_back=st.sampled_from([WriteBack.ALL, WriteBack.ALL, WriteBack.FIXED, WriteBack.NOTHING]),
        below=st.sampled_from(BELOW),
        eager=st.booleans(),
    )
    def begin(self, order, write_back, below, eager):
        costs = LinearCosts(100.0, (1000.0, 500.0))
        by_agent = {"ste": StepsToExecution(self.values), "expected": ExpectedTime(self.values, costs)}
        made = {"lru": LRU(), "lfu": LFU(), **by_agent}[order]
        eager = EagerWriteBackConfig() if eager and write_back is not WriteBack.NOTHING else None
        self.fingerprint = "kv"
        self.below, self.policy = below, TierPolicy(made, write_back, eager=eager)
        self.start()

    def start(self):
        """A process begins on the folder of the disk."""
        pools: dict[Tier, Pool] = {Tier.DEVICE: MemoryPool(12 * self.kv.token_bytes)}
        if "host" in self.below:
            pools[Tier.HOST] = MemoryPool(10 * self.kv.token_bytes)
        if "disk" in self.below:
            pools[Tier.DISK] = DiskPool(4500, self.folder.name, self.fingerprint, SMALL)
        self.clock = VirtualClock()
        self.copies = self.kv.FaultyTransfer(self.clock, self.kv.links)
        self.tiers = TieredCache(pools, self.copies, self.policy, PAGE, self.clock)

    def pick(self, data) -> tuple[CacheHandle, list[int]]:
        return self.handles[data.draw(st.integers(0, len(self.handles) - 1))]

    @precondition(lambda self: len(self.handles) < 4)
    @rule(prompt=prompts)
    def open(self, prompt):
        known, handle = self.tiers.lookup(prompt), self.tiers.open(prompt)
        assert handle.length == known.length and handle.length % PAGE == 0 and handle.length <= len(prompt)
        self.handles.append((handle, prompt))

    @rule(prompt=prompts, agent=st.none() | agents, fixed=st.integers(0, 14), compressed=flags, pages=flags)
    def serve(self, prompt, agent, fixed, compressed, pages=False):
        """Serves a request as an engine does, as far as there is room."""
        with self.tiers.open(prompt) as handle:
            if handle.wait(1e6) is not LoadState.READY:
                return
            self.kv.assert_holds(handle.payloads(), prompt[: handle.length])
            end = self.tiers.whole_pages(len(prompt))
            payload = self.kv.of(prompt, handle.length, end, compressed, pages) if end > handle.length else None
            if self.tiers.store(handle, prompt, payload, agent, fixed) is AllocStatus.PENDING:
                self.time_passes(1e6)
                self.tiers.store(handle, prompt, payload, agent, fixed)
            assert handle.wait(1e6) in (LoadState.READY, LoadState.LOST, LoadState.NO_ROOM)

    def pick_prompt(self, data) -> list[int]:
        """A prompt in the tree, one that is not on the device if there is one."""
        nodes = [node for node in self.tiers.tree if node.copies[Tier.DEVICE] is None] or list(self.tiers.tree)
        return self.kv.ids_of(nodes[data.draw(st.integers(0, len(nodes) - 1))]) if nodes else []

    @rule(data=st.data())
    def serve_again(self, data):
        self.serve(self.pick_prompt(data), None, 0, False)

    def give_up(self, nodes, random):
        """Starts loads and cancels them at some layer."""
        for node in nodes:
            with self.tiers.open(self.kv.ids_of(node)) as handle:
                handle.load(random.choice(tuple(Urgency)))
                self.time_passes(random.choice([0.0, 0.1, 1e6]))
                handle.load()

    @rule(seed=st.integers(0, 2**32))
    def serve_many(self, seed):
        """A burst, so that few choices of hypothesis fill the tiers."""
        random = Random(seed)
        if random.random() < 0.3:
            self.plan_a_fault(RuntimeError("failed"))
        for _ in range(6):
            prompt = [random.randrange(2) for _ in range(random.randrange(11))]
            self.serve(prompt, random.choice("abc"), random.randrange(10), random.random() < 0.3, random.random() < 0.5)
            if random.random() < 0.2:
                self.give_up(list(self.tiers.tree), random)
            on_disk = [node for node in self.tiers.tree if node.copies[Tier.DISK] is not None]
            if on_disk and random.random() < 0.3:
                node = random.choice(on_disk)
                self.kv.damage(node, random.choice(["flip", "cut", "remove"]))
                self.serve(self.kv.ids_of(node), None, 0, False)

    @precondition(lambda self: len(self.handles) < 4 and self.tiers.tree.prompt_ends)
    @rule(agent=agents)
    def open_agent(self, agent):
        handle = self.tiers.open_agent(agent)
        if handle is not None:
            self.handles.append((handle, self.kv.ids_of(handle.node)))

    @precondition(lambda self: self.handles)
    @rule(agent=st.none() | agents, fixed=st.integers(0, 12), compressed=flags, pages=flags, data=st.data())
    def insert(self, agent, fixed, compressed, pages, data):
        handle, prompt = self.pick(data)
        before = handle.length
        end = data.draw(st.sampled_from(range(before, len(prompt) + 1, PAGE)))
        payload = self.kv.of(prompt, before, end, compressed, pages) if end > before else None
        nbytes = 0 if payload is None else payload.nbytes
        reserved = nbytes if data.draw(st.booleans()) and self.tiers.reserve(nbytes) is AllocStatus.READY else 0
        status = self.tiers.store(handle, prompt[:end], payload, agent, min(fixed, end), reserved)
        stored = status is AllocStatus.READY
        assert handle.length == (end if stored else before)
        kept = self.tiers.reserved_bytes
        assert kept <= reserved and (stored or kept == reserved)
        self.tiers.unreserve(kept)

    @precondition(lambda self: self.handles)
    @rule(urgency=st.sampled_from(Urgency), only_lower_ranked=st.booleans(), data=st.data())
    def load(self, urgency, only_lower_ranked, data):
        handle, prompt = self.pick(data)
        if handle.load(urgency, only_lower_ranked=only_lower_ranked) is LoadState.READY:
            self.kv.assert_holds(handle.payloads(), prompt[: handle.length])

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def cancel(self, data):
        self.pick(data)[0].cancel_loads()

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def release(self, data):
        handle, _ = self.handles.pop(data.draw(st.integers(0, len(self.handles) - 1)))
        handle.release()

    @rule(seconds=st.sampled_from([0.0, 0.02, 0.1, 1.0, 100.0]))
    def time_passes(self, seconds):
        self.clock.advance_to(self.clock() + seconds)
        self.tiers.poll()

    @rule(fault=st.sampled_from([OSError(errno.ENOSPC, "no space left"), RuntimeError("failed"), WorkerDiedError()]))
    def plan_a_fault(self, fault):
        self.copies.fault = fault

    @rule(agent=agents, value=st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]))
    def value(self, agent, value):
        self.values[agent] = value
        self.tiers.values_changed([agent])

    @rule(agent=agents)
    def forget_agent(self, agent):
        self.tiers.forget_agent(agent)

    @rule(tier=st.sampled_from(Tier), share=st.sampled_from([0.3, 1.0]))
    def make_room(self, tier, share):
        if tier in self.tiers.pools:
            self.tiers.evictor.make_room(tier, int(share * self.tiers.pools[tier].capacity))

    @rule()
    def write_back_eagerly(self):
        self.tiers.write_back_eagerly()

    @rule()
    def merge_spans(self):
        self.tiers.merge_spans()

    @rule(prompt=prompts, chance=st.integers(0, 3))
    def flush(self, prompt, chance):
        """Rarely, or the tiers would stay empty."""
        if chance == 0:
            self.fingerprint += "!"
            self.tiers.flush(self.fingerprint)
            assert self.tiers.lookup(prompt).length == 0 and not self.tiers.tree.prompt_ends

    @rule(close=st.booleans(), chance=st.integers(0, 3))
    def restart(self, close, chance):
        """The next process finds what the disk has: of a pool that was closed, or of a process that was killed."""
        if chance or "disk" not in self.below:
            return
        on_disk = [node for node in self.tiers.tree if node.copies[Tier.DISK] is not None and not node.root.retired]
        if close:
            self.tiers.close()
            self.tiers.check()
        else:
            self.tiers.pools[Tier.DISK]._store._lock.release()  # all that the system does  # pyright: ignore
        self.handles.clear()
        for path in self.tiers.pools[Tier.DISK].folder.glob("*.kv"):  # pyright: ignore[reportAttributeAccessIssue]
            os.utime(path, (int(path.stem), int(path.stem)))  # the same order whatever the time
        self.start()
        restored = sum(node.copies[Tier.DISK] is not None for node in self.tiers.tree)
        assert on_disk or not restored
        self.restarts[restored > 0] += 1

    @invariant()
    def everything_is_counted(self):
        type(self).steps += 1
        self.tiers.check()

    def teardown(self):
        self.copies.fault = None
        for handle, _ in self.handles:
            handle.release()
        self.time_passes(1e6)
        while self.tiers.has_transfers:  # one that ended may have started an eager write-back
            self.time_passes(1e6)
        while any(pool.used for pool in self.tiers.pools.values()):  # a write-back refills the tier below it
            for tier, pool in self.tiers.pools.items():
                self.tiers.evictor.make_room(tier, pool.capacity)
                self.time_passes(1e6)
                self.tiers.check()
        assert self.tiers.tree.size == 0 and not self.tiers.tree.prompt_ends, "nothing is left"
        self.tiers.close()
        self.folder.cleanup()


def test_random_steps_with_faults(kv):
    machine = type("Machine", (TierMachine,), {"kv": kv, "steps": 0, "restarts": Counter()})
    run(
        machine,
        settings=settings(
            max_examples=-(-2 * STEPS // STEPS_EACH),
            stateful_step_count=STEPS_EACH,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
    assert machine.steps >= STEPS


def counters(tiers: TieredCache) -> dict[Any, int]:
    """All counts of a cache by name or link."""
    named = {name: value for name, value in vars(tiers.statistics).items() if isinstance(value, int)}
    return named | {(link, "moved"): value for link, value in tiers.statistics.bytes_moved.items()}


def test_bursts_of_requests_with_faults(kv):
    """The same, with more of what fills tiers and less of everything else; every counter must have moved."""
    random, counts = Random(0), Counter()
    for _ in range(max(1, STEPS // 100)):
        machine = type("Machine", (TierMachine,), {"kv": kv, "restarts": Counter()})()
        machine.begin(random.choice(ORDERS), WriteBack.ALL, random.choice(BELOW[:3]), random.random() < 0.5)
        for _ in range(12):
            machine.serve_many(random.randrange(2**32))
            machine.everything_is_counted()
            if random.random() < 0.1:
                counts.update(counters(machine.tiers))
                machine.restart(random.random() < 0.5, 0)
        counts.update(counters(machine.tiers))
        counts["restarts that found something"] += machine.restarts[True]
        machine.teardown()
    names = ("copies_failed", "copies_lost", "copies_cancelled", "dropped", "inserted", "refused", "tokens_found")
    assert all(counts[name] > 0 for name in (*names, "restarts that found something")), counts
    links = [(Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DEVICE), (Tier.HOST, Tier.DISK), (Tier.DISK, Tier.DEVICE)]
    assert all(counts[link, "moved"] > 0 for link in links), counts
