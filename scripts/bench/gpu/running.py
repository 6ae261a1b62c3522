"""Checks and times the cases, and records why a row or peer is missing."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .case import H100, Call, Ceilings, KernelBenchCase
from .stopwatch import Stopwatch

GIB = 2**30


@dataclass(frozen=True)
class KernelCheck:
    """A kernel against its twin at a small size; `problem` is None if they agree."""

    kernel: str
    shape: str
    error: float | None
    tolerance: float
    problem: str | None


@dataclass
class KernelRow:
    """One kernel at one shape.

    Attributes:
        us, host_us, runs: see `Timing`; None if it was not timed.
        bound_us: of docs/results/kernels.md, for an H100.
        of_h100, of_card: the bound's share of the time, at the data sheet's ceilings and at those measured here.
        peers: by name, median microseconds.
        absent: by name, why a peer was not timed.
        skipped: why nothing was timed.
        failed: the kernel did not run, or its check failed.
    """

    kernel: str
    shape: str
    bound_us: float
    us: float | None = None
    host_us: float | None = None
    runs: int = 0
    of_h100: float | None = None
    of_card: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None
    failed: bool = False


def check_all(cases: Iterable[KernelBenchCase], device: str, interpreted: bool) -> Iterator[KernelCheck]:
    """Every case at its small size, each size once."""
    for case in progress([*dict.fromkeys(case.small(interpreted) for case in cases)], "checking"):
        error = problem = None
        try:
            error = case.error(device)
            if not error <= case.tolerance:
                problem = f"it differs from its twin by {error:.2g}; up to {case.tolerance:g} is accepted"
        except Exception as failure:
            problem = first_line(failure)
        yield KernelCheck(case.kernel, case.shape, error, case.tolerance, problem)


@dataclass
class KernelTimer:
    """Times cases on one device.

    Attributes:
        ceilings: measured on it.
        wrong: kernels whose checks have failed; they are not timed.
        ends: when no further case is begun, on `clock`.
        free: bytes of memory that a case may take.
    """

    device: str
    watch: Stopwatch
    ceilings: Ceilings
    wrong: frozenset[str]
    ends: float
    free: Callable[[str], float]
    clock: Callable[[], float] = time.monotonic

    def row(self, case: KernelBenchCase) -> KernelRow:
        """Never raises for what a kernel or a peer does: it says so."""
        work = case.work()
        row = KernelRow(case.kernel, case.shape, work.bound_us(H100))
        needed, free = case.memory(), self.free(self.device)
        if case.kernel in self.wrong:
            row.skipped, row.failed = "its check failed", True
        elif self.clock() > self.ends:
            row.skipped = "the time is up"
        elif needed > free:
            row.skipped = f"it takes about {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
        else:
            self._fill(row, case)
        if row.us is not None:
            row.of_h100, row.of_card = row.bound_us / row.us, work.bound_us(self.ceilings) / row.us
        return row

    def _fill(self, row: KernelRow, case: KernelBenchCase) -> None:
        try:
            sides = case.sides(self.device)
            timing = self.watch.time(sides.ours, sides.reset)
        except Exception as failure:
            row.skipped = first_line(failure)
            row.failed = not isinstance(failure, torch.OutOfMemoryError)
            return self._tidy()
        row.us, row.host_us, row.runs, row.absent = timing.us, timing.host_us, timing.runs, dict(sides.absent)
        for name, call in sides.peers.items():
            self._time_peer(row, name, call, sides.reset)
        del sides
        self._tidy()

    def _time_peer(self, row: KernelRow, name: str, call: Call, reset: Call | None) -> None:
        try:
            row.peers[name] = self.watch.time(call, reset).us
        except Exception as failure:  # a peer that this card or this version of torch does not run
            row.absent[name] = first_line(failure)
            self._tidy()

    def _tidy(self) -> None:
        gc.collect()
        if self.watch.on_card:
            torch.cuda.empty_cache()


def progress(cases: Sequence[KernelBenchCase], what: str) -> Iterator[KernelBenchCase]:
    """The cases, and on a terminal which of them is at work."""
    for number, case in enumerate(cases, 1):
        if sys.stderr.isatty():
            text = f"\r\033[K{what} {number}/{len(cases)}: {case.kernel}, {case.shape}"
            print(text, end="", file=sys.stderr, flush=True)
        yield case
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def first_line(failure: Exception) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0]}" if lines else type(failure).__name__


def free_memory(device: str) -> float:
    """Bytes; the host's memory is not inspected."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else float("inf")
