"""Timing with CUDA events, and the GPU's measured ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ....retention.ops.kernel_choice import LAUNCH_OPTIONS
from ....retention.ops.triton_language import jit, tl
from .case import MICRO, Call, Ceilings

MIB = 2**20
FLUSHED = 256 * MIB  # written before every run: several times an H100's L2
WAITED = 1_500_000  # clock ticks that the card waits before a run, about 1 ms: meanwhile the host queues its launches
SLOW_S, FEWEST, MOST = 1.0, 3, 50


@dataclass(frozen=True)
class Timing:
    """Median microseconds on the card, and of the host until everything was queued; runs that were counted."""

    us: float
    host_us: float
    runs: int


class Stopwatch:
    """Medians over runs with cold caches.

    Args:
        device: `cuda`, or `cpu` where kernels are interpreted: then one run by the host's clock, which says nothing.
        seconds: about so long each side runs.
    """

    def __init__(self, device: str, seconds: float) -> None:
        self.on_card, self.seconds = device == "cuda", seconds
        self._flushed = torch.empty(FLUSHED if self.on_card else 1, dtype=torch.uint8, device=device)

    def time(self, call: Call, reset: Call | None = None) -> Timing:
        """Warms up (Triton compiles), then counts runs; `reset` runs before each and is not counted."""
        reset = reset or (lambda: None)
        reset()
        if not self.on_card:
            begun = time.perf_counter()
            call()
            spent = (time.perf_counter() - begun) * MICRO
            return Timing(spent, spent, 1)
        call()
        spent = self._wall(call, reset)
        runs = max(FEWEST if spent < SLOW_S else 1, min(MOST, int(self.seconds / spent)))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        hosts = []
        for start, end in events:
            reset()
            self._flushed.zero_()
            torch.cuda._sleep(WAITED)
            start.record()
            begun = time.perf_counter()
            call()
            hosts.append(time.perf_counter() - begun)
            end.record()
        torch.cuda.synchronize()
        on_card = statistics.median(start.elapsed_time(end) for start, end in events)
        return Timing(on_card * 1e3, statistics.median(hosts) * MICRO, runs)

    @staticmethod
    def _wall(call: Call, reset: Call) -> float:
        reset()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return max(time.perf_counter() - begun, 1e-6)


@jit
def _exponentials(numbers, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (blocks,): as many exponentials one after the other of each number, which stays between 1/2 and 1."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(numbers + at)
    for _ in range(ROUNDS):
        value = tl.exp2(-value)
    tl.store(numbers + at, value)


def measure_ceilings(watch: Stopwatch, device: str) -> Ceilings:
    """Measured limits of this GPU: a 1 GiB copy, a bf16 product of size 8192, exponentials, the pinned host link."""
    size, side, blocks, rounds = (1024 * MIB, 8192, 132 * 64, 4096) if watch.on_card else (1024, 32, 1, 2)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    factor = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(factor)
    numbers = torch.rand(blocks, 1024, device=device)
    pinned = torch.empty(size // 4, dtype=torch.uint8, pin_memory=watch.on_card)

    def rate(amount: float, call: Callable[[], object]) -> float:
        return amount / watch.time(call).us * MICRO

    return Ceilings(
        torch.cuda.get_device_name() if watch.on_card else "no card: interpreted, times say nothing",
        rate(2 * size, lambda: target.copy_(source)),
        rate(2 * side**3, lambda: torch.mm(factor, factor, out=product)),
        rate(numbers.numel() * rounds, lambda: _exponentials[(blocks,)](numbers, rounds, 1024, **LAUNCH_OPTIONS)),
        rate(size // 4, lambda: pinned.copy_(source[: size // 4], non_blocking=True)),
        rate(size // 4, lambda: source[: size // 4].copy_(pinned, non_blocking=True)),
    )
