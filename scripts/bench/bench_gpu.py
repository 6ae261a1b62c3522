"""`python scripts/bench/bench_gpu.py` or `tenure bench gpu`: check every kernel, then time it on this GPU.

As a script it needs a checkout with torch and Triton, nothing else: it imports only the kernels' modules.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from ..output import OutputFile
else:  # run as a script, without the package
    OutputFile = Path

FAILED, NO_CARD = 1, 2
SECONDS, QUICK_SECONDS = 0.3, 0.1  # of timing a side
LIMIT_S = 440.0  # after which no row is begun; the slowest one ends well within 8 minutes
# Packages whose own `__init__` imports transformers, and which a script can do without.
PACKAGES = ("retention", "eviction", "eviction/policies")


@dataclass
class GpuBenchConfig:
    """Check every Triton kernel against its plain-torch twin, then time it on this GPU against the twin, SDPA and
    FlexAttention at the shapes of Qwen3-4B and Llama-3.1-8B. Takes at most 8 minutes. The exit code is 1 if a check
    fails or a kernel does not run, and 2 without a GPU."""

    json: OutputFile | None = None
    """Also write everything to this file."""
    quick: bool = False
    """Limit contexts to 32K, with fewer runs."""
    interpret: bool = False
    """Without a GPU: run all checks at small shapes in Triton's interpreter; times are meaningless."""


def read_arguments(arguments: Sequence[str]) -> GpuBenchConfig:
    """The flags of `Config` without tyro, which need not be installed where this file runs as a script."""
    description = inspect.cleandoc(GpuBenchConfig.__doc__ or "")
    parser = argparse.ArgumentParser("bench_gpu.py", description=description)
    parser.add_argument("--json", metavar="PATH", help="also write everything to this file")
    parser.add_argument("--quick", action="store_true", help="limit contexts to 32K, with fewer runs")
    parser.add_argument("--interpret", action="store_true", help="no GPU: small shapes in Triton's interpreter")
    return GpuBenchConfig(**vars(parser.parse_args(arguments)))


def main(config: GpuBenchConfig) -> int:
    problem = missing(config.interpret)
    if problem:
        print(f"bench_gpu: {problem}", file=sys.stderr)
        return NO_CARD
    # Triton reads the first when it is imported, the operations the second at each call.
    os.environ |= {"TRITON_INTERPRET": "1" if config.interpret else "0", "TENURE_KERNELS": "triton"}
    import torch
    import triton

    from .gpu.all_cases import all_cases
    from .gpu.running import KernelTimer, check_all, free_memory, progress
    from .gpu.stopwatch import Stopwatch, measure_ceilings
    from .gpu.table import ceilings_text, checks_text, rows_text

    begun = time.monotonic()
    device = "cpu" if config.interpret else "cuda"
    watch = Stopwatch(device, QUICK_SECONDS if config.quick else SECONDS)
    ceilings = measure_ceilings(watch, device)
    print(ceilings_text(ceilings), flush=True)
    cases = all_cases(config.quick)
    checks = list(check_all(cases, device, config.interpret))
    print(checks_text(checks), flush=True)
    if config.interpret:
        cases = list(dict.fromkeys(case.small(interpreted=True) for case in cases))
    wrong = frozenset(check.kernel for check in checks if check.problem)
    timer = KernelTimer(device, watch, ceilings, wrong, begun + LIMIT_S, free_memory)
    rows = [timer.row(case) for case in progress(cases, "timing")]
    print(rows_text(rows))
    if config.json:
        report: dict[str, Any] = {
            "ceilings": asdict(ceilings),
            "interpreted": config.interpret,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "seconds": round(time.monotonic() - begun, 1),
            "checks": [asdict(check) for check in checks],
            "rows": [asdict(row) for row in rows],
        }
        Path(config.json).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return FAILED if wrong or any(row.failed for row in rows) else 0


def missing(interpret: bool) -> str | None:
    """One sentence on missing requirements; None if there are none."""
    absent = [name for name in ("torch", "triton") if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} must be installed, nothing else: pip install {' '.join(absent)}"
    import torch

    if interpret or torch.cuda.is_available():
        return None
    return "there is no CUDA device here; --interpret runs the checks without one, and times nothing"


def use_checkout(root: Path) -> None:
    """Makes a checkout importable as `tenure.…` without running the `__init__` of `tenure` or of `PACKAGES`."""
    for name in ("", *PACKAGES):
        module = types.ModuleType(".".join(["tenure", *filter(None, name.split("/"))]))
        module.__path__ = [str(root / name)]
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    use_checkout(Path(__file__).resolve().parents[2])
    bench_gpu = import_module("tenure.scripts.bench.bench_gpu")  # this file, as a module of its package

    sys.exit(bench_gpu.main(bench_gpu.read_arguments(sys.argv[1:])))
