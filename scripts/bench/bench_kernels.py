"""`tenure bench kernels`: compile every Triton kernel for A100 and H100, without a GPU, and report its resources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..output import OutputFile, make_console

if TYPE_CHECKING:
    from .compiling import Compiled, KernelCase

KIB = 1024


@dataclass
class KernelsBenchConfig:
    """Compile every Triton kernel for A100 (sm_80) and H100 (sm_90) as it is launched at the shapes of Qwen3-4B and
    Llama-3.1-8B, and print registers, shared memory, spills and use of tensor cores. Needs no GPU; nothing is timed.
    The exit code is 1 if a kernel spills or does not fit."""

    only: str = ""
    """Compile only kernels whose name contains this text."""
    json: OutputFile | None = None
    """Also write the rows to this file."""


def main(config: KernelsBenchConfig) -> int:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):  # read when Triton is imported: too late to change
        environment = os.environ | {"TRITON_INTERPRET": "0"}
        command = [sys.executable, "-m", "tenure", "bench", "kernels", "--only", config.only]
        return subprocess.run([*command, *(["--json", config.json] if config.json else [])], env=environment).returncode
    rows = compile_all(config.only)
    if not rows:
        raise ValueError(f"no kernel's name contains {config.only!r}")
    _show(rows)
    if config.json:
        Path(config.json).write_text(json.dumps([asdict(row) | {"problems": row.problems} for row in rows], indent=2))
    return int(any(row.problems for row in rows))


def compile_all(only: str = "") -> list[Compiled]:
    """Every case on every card. Triton keeps what it compiled, so equal kernels of two models take the time of one."""
    from rich.progress import track

    from .compiling import CAPABILITIES, compile_kernel

    rows = []
    pending = [(case, capability) for capability in CAPABILITIES for case in _cases(capability) if only in case.name]
    for case, capability in track(pending, "Compiling", transient=True, disable=not sys.stderr.isatty()):
        rows.append(compile_kernel(case, capability))
    return rows


def _cases(capability: int) -> list[KernelCase]:
    from . import eviction_kernel_cases as of_eviction
    from . import retention_kernel_cases as of_retention

    return [*of_retention.compile_cases(capability), *of_eviction.compile_cases(capability)]


def _show(rows: list[Compiled]) -> None:
    """A line for each kernel, the cards side by side; models whose kernels come out alike share the line."""
    import triton
    from rich.table import Column, Table

    cards = sorted({row.capability for row in rows})
    columns = [Column(name, justify="right") for name in ("registers", "KiB", "spills", "blocks/SM", "products")]
    title = f"Triton {triton.__version__}, {' / '.join(f'sm_{card}' for card in cards)}: compiled, not run"
    table = Table(Column("kernel"), *columns, title=title)
    for name, cells in dict.fromkeys((row.name, _cells(rows, row)) for row in rows):
        table.add_row(name, *cells)
    console = make_console()
    console.print(table)
    for row in rows:
        for problem in row.problems:
            console.print(f"{row.name}, {row.shape}, sm_{row.capability}: {problem}", style="red")


def _cells(rows: list[Compiled], like: Compiled) -> tuple[str, ...]:
    """Table cells of a kernel at one model's shapes: registers, shared memory, spills, blocks, tensor cores."""
    found = [row for row in rows if (row.name, row.shape) == (like.name, like.shape)]
    values = [
        [str(row.registers) for row in found],
        [f"{row.shared / KIB:.0f}" for row in found],
        [str(row.spills) for row in found],
        [str(row.blocks_per_sm) for row in found],
        [row.tensor_cores for row in found],
    ]
    return tuple("/".join(value) for value in values)
