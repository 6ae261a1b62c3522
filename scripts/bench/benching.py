"""Shared by all benchmarks: interleaved timing, result rows and their table, prompts."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output import make_console

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BenchRow:
    """One comparison.

    Attributes:
        name: what was measured, e.g. `attention/T2048/vs_naive`.
        ours, peer: medians, in `unit`; peer is None where it was not run.
        ratio: the number `target` speaks of (times faster, or share), always of the two sides of one run.
        unit: of `ours` and `peer`.
        n: counted runs of each side.
        target: the target, in words.
    """

    name: str
    ours: float
    peer: float | None
    ratio: float
    unit: str
    n: int
    target: str = ""


def alternate(
    sides: Mapping[str, Callable[[], object]],
    runs: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds on `clock` of each measured run; the sides alternate, so that drift affects all of them equally."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + runs):
        for name, side in sides.items():
            start = clock()
            side()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios turn by turn."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


# Instructions on which the speed of matrix products and attention depends, as Linux names them (x86, then Arm).
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "i8mm", "sve", "sve2")


def cpu_name(cpuinfo: str | None = None) -> str:
    """This machine's processor with those of `CPU_FEATURES` that it has, from the text of /proc/cpuinfo (Linux)."""
    if cpuinfo is None:
        file = Path("/proc/cpuinfo")
        cpuinfo = file.read_text() if file.exists() else ""
    fields = dict(line.split(":", 1) for line in reversed(cpuinfo.splitlines()) if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    name = values.get("model name") or platform.processor() or platform.machine()
    flags = (values.get("flags") or values.get("Features") or "").split()
    return f"{name} ({', '.join(one for one in CPU_FEATURES if one in flags) or 'features unknown'})"


def show(rows: Sequence[BenchRow], title: str) -> None:
    """A table on stdout, with the CPU under it."""
    from rich.table import Column, Table

    columns = (Column("row", no_wrap=True), "ours", "peer", "unit", "ratio", "aim", "n")
    table = Table(*columns, title=title, caption=cpu_name())
    for row in rows:
        ratio = f"{row.ratio:.3f}" if row.ratio < 0.1 else f"{row.ratio:.2f}"
        peer = "-" if row.peer is None else f"{row.peer:.4g}"
        table.add_row(row.name, f"{row.ours:.4g}", peer, row.unit, ratio, row.target, str(row.n))
    make_console().print(table)


def status_kib(field: str) -> int:
    """A field of /proc/self/status in KiB (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def essay_prompts(tokenizer: Any, count: int, length: int) -> torch.Tensor:
    """int64 `(count, length)`: the essays of the evaluation split one after the other."""
    import torch

    from ...training.assets import essays

    ids: list[int] = []
    for document in essays("eval"):
        ids += tokenizer(document.text).input_ids
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).view(count, length)
    raise ValueError(f"the essays have {len(ids)} tokens, {count * length} are needed")
