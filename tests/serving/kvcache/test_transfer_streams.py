"""Copies on the streams of a GPU: who waits for what, shown on a simulated GPU whose streams run as late as they may.

`Gpu` puts streams in place of CUDA's. A stream executes what is queued on it only when somebody synchronises with it,
directly or through an event, and copies read and write at that moment. So whatever is read too early has its old
content, and a test that reads the right content has shown that the order was enforced, not that it happened to hold.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tenure.serving import (
    LRU,
    DiskPool,
    LinearCosts,
    LoadState,
    MemoryPool,
    TensorPayload,
    ThreadedTransfer,
    Tier,
    TieredCache,
    TierPolicy,
    VirtualClock,
    VirtualTransfer,
    WriteBack,
    build_system,
)
from tenure.serving.kvcache.memory_pool import check_devices

ALL = TierPolicy(LRU(), WriteBack.ALL)
A, B = [1, 1, 2, 2], [5, 5, 6, 6]
TOKEN_BYTES = 4


class Stream:
    """Work in the order in which it was queued, executed when `run` is called."""

    running = threading.RLock()

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.done = 0

    def run(self, until: int | None = None) -> None:
        with self.running:
            end = len(self.queue) if until is None else until
            while self.done < end:
                self.done += 1
                self.queue[self.done - 1]()

    def record_event(self) -> Event:
        return Event(self, len(self.queue))

    def wait_event(self, event: Event) -> None:
        self.queue.append(event.synchronize)


class Event:
    def __init__(self, stream: Stream, place: int) -> None:
        self.stream, self.place = stream, place

    def synchronize(self) -> None:
        self.stream.run(self.place)


class GpuTensor(torch.Tensor):
    """A tensor that says it is on cuda:0. Copies from or to it are queued on the current stream."""

    gpu: Gpu
    device = torch.device("cuda:0")  # type: ignore[assignment]

    def record_stream(self, s: Any) -> None:
        self.gpu.users.add((self.untyped_storage().data_ptr(), s))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.copy_:
                target, source = (each.as_subclass(torch.Tensor) for each in args[:2])
                cls.gpu.current.queue.append(lambda: target.copy_(source))
                return args[0]
            if func is torch.Tensor.cpu:
                cls.gpu.current.run()
                return args[0].as_subclass(torch.Tensor).clone()
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if isinstance(result, torch.Tensor) else result


class Gpu:
    """The streams of a simulated GPU; each thread has a current one, first the default stream."""

    def __init__(self) -> None:
        self.default = Stream()
        self.streams = [self.default]
        self.users: set[tuple[int, Stream]] = set()  # (address, stream): what an allocator has been told
        self._local = threading.local()

    @property
    def current(self) -> Stream:
        return getattr(self._local, "stream", self.default)

    def new_stream(self, device: object = None) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    @contextmanager
    def on(self, stream: Stream):
        before, self._local.stream = self.current, stream
        try:
            yield
        finally:
            self._local.stream = before

    def memory(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8).as_subclass(GpuTensor)


class GpuPool(MemoryPool):
    def __init__(self, capacity: int, gpu: Gpu) -> None:
        super().__init__(capacity, "cuda")
        self.gpu = gpu

    def _memory(self, nbytes: int) -> torch.Tensor:
        return self.gpu.memory(nbytes)


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(GpuTensor, "gpu", gpu, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: gpu.current)
    monkeypatch.setattr(torch.cuda, "Stream", gpu.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", gpu.on)
    return gpu


def content(prompt: list[int]) -> torch.Tensor:
    return torch.tensor(prompt, dtype=torch.float32).view(1, 1, -1, 1)


def computed(gpu: Gpu, prompt: list[int]) -> TensorPayload:
    """KV whose computation is queued on the current stream."""
    tensor = gpu.memory(TOKEN_BYTES * len(prompt)).view(torch.float32).view(1, 1, -1, 1)
    tensor.copy_(content(prompt))
    return TensorPayload({"layers.0.key": tensor}, len(prompt), memory=gpu.memory)


def host_content(payload) -> list[float]:
    """What the host sees now, without waiting for anything."""
    return payload.tensors["layers.0.key"].as_subclass(torch.Tensor).flatten().tolist()


@pytest.fixture
def start(gpu: Gpu, tmp_path: Path):
    made = []

    def begin(*lower: Tier, device: int = 4) -> TieredCache:
        pools = {Tier.DEVICE: GpuPool(device * TOKEN_BYTES, gpu)}
        if Tier.HOST in lower:
            pools[Tier.HOST] = MemoryPool(40 * TOKEN_BYTES)  # pyright: ignore[reportArgumentType]
        if Tier.DISK in lower:
            pools[Tier.DISK] = DiskPool(10**5, tmp_path)  # pyright: ignore[reportArgumentType]
        made.append(TieredCache(pools, ThreadedTransfer(), ALL, 2))
        return made[-1]

    yield begin
    for tiers in made:
        tiers.close()
        tiers.check()


def store(tiers: TieredCache, gpu: Gpu, prompt: list[int]) -> None:
    """Stores a prompt, on a stream of its own as an engine may have; waits for room."""
    with gpu.on(gpu.new_stream()), tiers.open(prompt) as handle:
        payload = computed(gpu, prompt)
        for _ in range(500):
            events = tiers.num_events
            if tiers.store(handle, prompt, payload).name == "READY":
                return
            tiers.wait(events, 0.01)
    raise AssertionError("no room")


def settle(tiers: TieredCache) -> None:
    while tiers.has_transfers:
        events = tiers.num_events
        tiers.poll()
        if tiers.has_transfers:
            tiers.wait(events, 0.01)


def test_a_copy_to_the_host_has_the_computed_content_when_it_is_reported(start, gpu):
    """The prompt's computation is still queued, on a stream that is not the one of whoever starts the copy."""
    tiers = start(Tier.HOST)
    store(tiers, gpu, A)
    (node,) = tiers.tree
    assert host_content(node.copies[Tier.DEVICE]) != A, "it is not computed yet"
    tiers.evictor.make_room(Tier.DEVICE, 4 * TOKEN_BYTES)
    settle(tiers)
    assert host_content(node.copies[Tier.HOST]) == A
    assert len(gpu.default.queue) == 0, "copies have a stream of their own"


def test_a_loaded_prompt_is_complete_when_it_is_reported(start, gpu):
    tiers = start(Tier.HOST)
    store(tiers, gpu, A)
    store(tiers, gpu, B)
    settle(tiers)
    with tiers.open(A) as handle:
        while handle.wait(1.0) is not LoadState.READY:
            pass
        assert host_content(handle.payloads()[0]) == A


@pytest.mark.parametrize("by_host", [False, True])
def test_the_disk_gets_the_computed_content(by_host, start, gpu):
    tiers = start(Tier.DISK, *([Tier.HOST] if by_host else []))
    store(tiers, gpu, A)
    tiers.evictor.make_room(Tier.DEVICE, 4 * TOKEN_BYTES)
    settle(tiers)
    if by_host:
        tiers.evictor.make_room(Tier.HOST, 40 * TOKEN_BYTES)
        settle(tiers)
    (node,) = tiers.tree
    assert node.copies[Tier.HOST] is None
    assert node.copies[Tier.DISK].read(0)["layers.0.key"].flatten().tolist() == A
    with tiers.open(A) as handle:
        assert handle.wait(5.0) is LoadState.READY
        assert host_content(handle.payloads()[0]) == A


def test_a_load_waits_for_what_still_uses_its_memory(gpu, start, monkeypatch):
    """The allocator hands out memory whose last use is queued on the stream of whoever allocates."""
    tiers = start(Tier.HOST)
    store(tiers, gpu, A)
    tiers.evictor.make_room(Tier.DEVICE, 4 * TOKEN_BYTES)
    settle(tiers)
    used_again = gpu.memory(4 * TOKEN_BYTES)
    used_again.as_subclass(torch.Tensor).fill_(7)
    seen = torch.zeros(4 * TOKEN_BYTES, dtype=torch.uint8)
    gpu.default.queue.append(lambda: seen.copy_(used_again.as_subclass(torch.Tensor)))
    monkeypatch.setattr(gpu, "memory", lambda nbytes: used_again)
    with tiers.open(A) as handle:
        assert handle.wait(5.0) is LoadState.READY
        assert host_content(handle.payloads()[0]) == A
    gpu.default.run()
    assert seen.tolist() == [7] * len(seen), "the earlier reader saw the earlier content"


def test_parts_of_a_split_prompt_are_read_after_they_were_written(start, gpu):
    """Split by a thread with another current stream than those that computed the prompt and that read it."""
    tiers = start(device=8)
    store(tiers, gpu, A)
    (node,) = tiers.tree
    source, splitting = node.copies[Tier.DEVICE].tensors["layers.0.key"].untyped_storage().data_ptr(), gpu.new_stream()
    with gpu.on(splitting):
        handle = tiers.open([1, 1, 9, 9])
    assert handle.length == 2
    assert (source, splitting) in gpu.users, "the source, freed now, is still being read"
    with gpu.on(gpu.new_stream()), handle:
        got = handle.payloads()[0].read(0)["layers.0.key"].cpu()
        assert got.flatten().tolist() == [1, 1]
        joined = handle.payloads()[0].join(tiers.lookup(A).nodes[-1].copies[Tier.DEVICE])
    with gpu.on(gpu.new_stream()):
        assert joined.read(0)["layers.0.key"].cpu().flatten().tolist() == A


def test_memory_is_freed_only_when_a_failed_copy_has_stopped(start, gpu):
    tiers = start(Tier.HOST)
    store(tiers, gpu, A)
    pool, pending = tiers.pools[Tier.HOST], []
    real = pool.new_builder

    def new_builder(payload):
        builder = real(payload)
        write = builder.write

        def fail(layer, tensors):
            write(layer, tensors)
            raise RuntimeError("after the copy was queued")

        builder.write = fail
        builder.abort = lambda: pending.extend(len(stream.queue) - stream.done for stream in gpu.streams[2:])
        return builder

    pool.new_builder = new_builder
    tiers.evictor.make_room(Tier.DEVICE, 4 * TOKEN_BYTES)
    settle(tiers)
    assert tiers.statistics.copies_failed == 1 and pending == [0]


def test_no_stream_is_touched_without_a_gpu(kv, monkeypatch):
    def fail(*_):
        raise AssertionError("CUDA was asked for")

    for name in ("current_stream", "Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, fail)
    pools = {Tier.DEVICE: MemoryPool(4 * kv.token_bytes), Tier.HOST: MemoryPool(10**4)}
    tiers = TieredCache(pools, ThreadedTransfer(), ALL, 2)
    with tiers.open(A) as handle:
        tiers.store(handle, A, kv.of(A, 0, 4))
    tiers.evictor.make_room(Tier.DEVICE, 4 * kv.token_bytes)
    settle(tiers)
    (node,) = tiers.tree
    kv.assert_holds([node.copies[Tier.HOST]], A)
    tiers.close()


def test_pools_that_do_not_fit_the_model_are_refused(gpu, kv):
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    check_devices({Tier.DEVICE: GpuPool(10, gpu), Tier.HOST: MemoryPool(10)}, cuda)
    check_devices({Tier.DEVICE: MemoryPool(10), Tier.HOST: MemoryPool(10)}, cpu)
    message = r"got a pool of Tier.DEVICE on cpu for a model on cuda:0; accepted: MemoryPool\(…, device='cuda:0'\)"
    with pytest.raises(ValueError, match=message):
        check_devices({Tier.DEVICE: MemoryPool(10)}, cuda)
    with pytest.raises(ValueError, match=r"got a pool of Tier\.HOST on cuda for a model on cpu"):
        check_devices({Tier.DEVICE: MemoryPool(10), Tier.HOST: GpuPool(10, gpu)}, cpu)
    with pytest.raises(ValueError, match=r"got a pool of Tier\.DEVICE on cuda for a model on cuda:1"):
        check_devices({Tier.DEVICE: GpuPool(10, gpu)}, torch.device("cuda:1"))
    clock = VirtualClock()
    with pytest.raises(ValueError, match=message):
        build_system(
            "lru", {Tier.DEVICE: MemoryPool(10)}, VirtualTransfer(clock, {}), clock=clock,
            costs=LinearCosts(1.0, (1.0, 1.0)), bytes_per_token=1, device=cuda,
        )  # fmt: skip


def test_a_payload_elsewhere_than_the_device_tier_is_refused(gpu, kv, start):
    tiers = start()
    with (
        tiers.open(A) as handle,
        pytest.raises(ValueError, match="got a payload on cpu; accepted: cuda, as the dev"),
    ):
        tiers.store(handle, A, kv.of(A, 0, 4))
    assert tiers.tree.size == 0 and tiers.pools[Tier.DEVICE].used == 0
