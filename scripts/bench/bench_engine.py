"""`tenure bench engine`: the serving engine against `generate`, and against what its requests need."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..loading import Dtype, find_gates, load_model
from ..output import OutputFile, make_console, write_rows
from . import engine_counts, engine_speed
from .benching import BenchRow, show
from .engine_runs import QUICK, EngineBench, EngineBenchSizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...retention import RetentionGates

# By the first part of the rows' names, in the order of the table.
ROWS: dict[str, Callable[[EngineBench], BenchRow | Iterator[BenchRow]]] = {
    "decode": engine_speed.decode_rows,
    "join": engine_speed.join_row,
    "memory": engine_counts.memory_rows,
    "prefill": engine_speed.prefill_row,
    "fanout": engine_counts.fanout_rows,
    "retry": engine_counts.retry_row,
    "overcommit": engine_speed.overcommit_row,
    "conversation": engine_counts.conversation_row,
    "submit": engine_speed.submit_row,
}


@dataclass
class EngineBenchConfig:
    """Measure the serving engine: decoding, joins, memory, shared and retried prompts, overcommitted memory, submits.

    Prompts are random tokens. Where what the KV contains does not matter, it is random and not computed. Times are
    medians of runs in which the sides take turns; counts are of one run.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo`."""
    gates: str | None = None
    """Trained gates: a folder or hub:OWNER/NAME; by default the gates shipped for the demo model."""
    dtype: Dtype = "float32"
    """The model's dtype."""
    only: tuple[str, ...] = tuple(ROWS)
    """Rows to measure, by the first part of their names."""
    kept: float = 0.2
    """Share of a compressed prompt's entries."""
    threads: int = 1
    """CPU threads."""
    runs: int = 5
    """Measured runs of each side; medians are reported."""
    cpu_time: bool = False
    """Count CPU seconds of this process instead of wall time, for a machine that others use; needs --threads 1."""
    quick: bool = False
    """Use few and short prompts."""
    seed: int = 0
    """Of the prompts."""
    json: OutputFile | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        if min(self.threads, self.runs) < 1:
            raise ValueError(f"got --threads {self.threads} --runs {self.runs}; accepted: 1 or more")
        if not 0 < self.kept < 1:
            raise ValueError(f"got --kept {self.kept}; accepted: a number between 0 and 1")
        if strange := sorted({*self.only} - {*ROWS}):
            raise ValueError(f"got --only {' '.join(strange)}; accepted: {', '.join(ROWS)}")
        if self.cpu_time and self.threads > 1:
            raise ValueError(f"got --cpu-time with --threads {self.threads}; accepted: --threads 1")


def main(config: EngineBenchConfig) -> int:
    import torch

    from ...retention import RetentionGates

    torch.set_num_threads(config.threads)
    gates = RetentionGates.from_pretrained(find_gates(config.model, config.gates))
    model, _ = load_model(config.model, "cpu", config.dtype)
    gates.check_model(model)
    rows = measure(model, gates, config)
    seconds = "CPU seconds" if config.cpu_time else "wall time"
    title = f"{config.model} in {config.dtype}, {config.threads} threads, {seconds}, torch {torch.__version__}"
    show(rows, title)
    if config.json:
        write_rows(rows, config.json)
    return 0


def measure(model: PreTrainedModel, gates: RetentionGates, config: EngineBenchConfig) -> list[BenchRow]:
    """The rows of `config.only`."""
    from ...eviction import evict

    sizes = replace(QUICK if config.quick else EngineBenchSizes(), kept=config.kept)
    clock = time.process_time if config.cpu_time else time.perf_counter
    # The peer is outside of the `evict` block, with the same weights.
    plain = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    rows: list[BenchRow] = []
    console = make_console()
    with evict(model, "full", gates=gates, observe=["retention"]) as session:
        bench = EngineBench(session, plain, sizes, config.runs, config.seed, clock)
        for name, make in ROWS.items():
            if name in config.only:
                with console.status(f"measuring {name}"):
                    found = make(bench)
                    rows += [found] if isinstance(found, BenchRow) else found
    return rows
