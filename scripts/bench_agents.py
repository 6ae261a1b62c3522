"""`tenure bench agents`: agent workflows on a real model, whose prompts do not fit on the device together."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .agent_runs import AGENTS, WORKFLOWS, Run, Setting, Workload, make_workload, one_run

if TYPE_CHECKING:
    from ..eviction import Session
    from ..serving import TensorPayload
    from ..serving.prompt_cache import Compression

BASELINE = "lru_reactive"
SYSTEMS = ("lru", "lru_reactive", "lru_prefetch", "ste", "ste_prefetch", "expected_time", "belady")
MIB = 2**20


@dataclass
class Config:
    """Run agent workflows with every way to manage prompts in two tiers, in turn; print wall-clock times and ratios.

    Ten agents, each with a fixed prompt; a call brings a short suffix and gets a short answer, and the next call comes
    when the one before is answered. Each turn draws its calls anew, the same for all. All prompts lie in the tiers at
    the start. The device pool is a share of what they take uncompressed, and room for one request beside it; host
    memory has room for all. Copies are real, held to a stated bandwidth.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo`."""
    gates: str | None = None
    """Trained gates, a folder or Hub id; the shipped ones for the demo model."""
    workflows: tuple[str, ...] = ("ring", "branching")
    """ring: each agent calls the next; branching: planner, workers, writer, critic."""
    systems: tuple[str, ...] = SYSTEMS
    """What is compared; ratios are against lru_reactive."""
    keep: tuple[float, ...] = (1.0, 0.25)
    """Shares of the fixed prompts' KV that are stored; below 1 the gates choose."""
    pools: tuple[float, ...] = (0.5,)
    """Device pools, as shares of all fixed prompts uncompressed."""
    wrong: tuple[float, ...] = (0.0,)
    """Shares of the calls that go to any other agent rather than along an edge."""
    habit: bool = False
    """Wrong calls of an agent all go to the same other one, which no edge of it names."""
    bandwidth: float = 60.0
    """MB/s of each direction of the link between device and host."""
    fixed: int = 512
    """Tokens of a fixed prompt."""
    suffix: int = 16
    """Tokens of what follows it."""
    answer: int = 8
    """Tokens of an answer at most."""
    rounds: int = 4
    """Calls in a run, in tens."""
    runs: int = 5
    """Counted runs of each system; medians are reported."""
    threads: int = 1
    """CPU threads of the model; copies have threads of their own."""
    seed: int = 0
    """Of the first turn, the next one's is one more: chooses ways at branches and wrong calls."""
    json: str | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        if min(self.fixed, self.suffix, self.answer, self.rounds, self.runs, self.threads) < 1:
            raise ValueError("--fixed, --suffix, --answer, --rounds, --runs and --threads accept 1 or more")
        strange = sorted({*self.workflows} - {*WORKFLOWS}) + sorted({*self.systems} - {*SYSTEMS})
        if strange or not (self.workflows and self.systems and self.keep and self.pools and self.wrong):
            raise ValueError(
                f"got {', '.join(strange) or 'an empty list'}; --workflows accepts {', '.join(WORKFLOWS)}, --systems "
                f"{', '.join(SYSTEMS)}"
            )
        shares = {"keep": self.keep, "pools": self.pools}
        for name, values in shares.items():
            if not all(0 < value <= 1 for value in values):
                raise ValueError(f"--{name} accepts numbers above 0 and up to 1, got {values}")
        if not all(0 <= value <= 1 for value in self.wrong):
            raise ValueError(f"--wrong accepts numbers from 0 to 1, got {self.wrong}")
        if not self.bandwidth > 0:
            raise ValueError(f"--bandwidth accepts MB/s above 0, got {self.bandwidth}")


def main(config: Config) -> int:
    import torch

    from ..eviction import evict
    from ..retention import RetentionGates
    from .demo import find_gates
    from .loading import load_model

    torch.set_num_threads(config.threads)
    gates = RetentionGates.from_pretrained(find_gates(config.model, config.gates))
    model, tokenizer = load_model(config.model, "cpu", "float32")
    gates.check_model(model)
    text = tokens(tokenizer)
    sizes = config.rounds, config.fixed, config.suffix, config.answer
    draws = [
        [make_workload(name, text, *sizes, wrong, config.seed + turn, config.habit) for turn in range(config.runs)]
        for name in config.workflows
        for wrong in config.wrong
    ]
    rows: list[dict[str, Any]] = []
    with evict(model, "full", gates=gates, observe=["retention"]) as session:
        for turns in draws:
            for pool in config.pools:
                rows += compare(session, turns, pool, config)
    if config.json:
        write(rows, config.json)
    return 0


def tokens(tokenizer: Any) -> list[int]:
    """The essays of the evaluation split, one after the other."""
    from ..training.assets import essays

    return [token for document in essays("eval") for token in tokenizer(document.text).input_ids]


def compare(session: Session, turns: Sequence[Workload], pool: float, config: Config) -> list[dict[str, Any]]:
    """Rows of all systems on the draws of one workload, each with and without compression; they run in turn."""
    from ..serving import LinearCosts
    from ..serving.prompt_cache import Compression, PromptKV

    workload = turns[0]
    byte_rate = PromptKV(session).bytes_per_token()
    per_prompt = config.fixed * byte_rate
    room = (config.fixed + config.suffix + config.answer) * byte_rate
    speed = prefill_speed(session, workload, config.fixed)
    bandwidth = config.bandwidth * 1e6
    cells: dict[tuple[str, float], Setting] = {}
    warm: dict[float, dict[str, TensorPayload]] = {}
    for keep in config.keep:
        how = None if keep == 1 else Compression("retention", keep)
        warm[keep] = prepared(session, workload, how)
        for system in config.systems:
            cells[system, keep] = Setting(
                system, how, int(pool * AGENTS * per_prompt) + room, 4 * AGENTS * per_prompt, bandwidth, bandwidth,
                LinearCosts(speed, (bandwidth, bandwidth), 0.0),
            )  # fmt: skip
    runs: dict[tuple[str, float], list[Run]] = {cell: [] for cell in cells}
    for turn, drawn in enumerate(turns):
        for cell, setting in cells.items():
            run = one_run(session, drawn, setting, warm[cell[1]])
            runs[cell].append(run)
            done = f"{workload.name} {pool:.0%} run {turn + 1}: {cell[0]} {cell[1]:.0%}"
            print(f"{done} {run.makespan_s:.1f} s, idle {run.makespan_s - run.busy_s:.2f} s", flush=True)
        for keep in config.keep:
            answers = {several[turn].answers for cell, several in runs.items() if cell[1] == keep}
            assert len(answers) == 1, "every system gives the same answers"
    rows = [row(workload, pool, cell, runs, cells[cell], warm[cell[1]]) for cell in cells]
    link = f"{config.bandwidth:g} MB/s, prefill {speed:.0f} tokens/s"
    show(rows, f"{workload.name}, pool {pool:.0%} of the prompts, {link}")
    return rows


def prefill_speed(session: Session, workload: Workload, count: int) -> float:
    """Tokens/s of a fixed prompt, the median of three: what the systems are told about computing."""
    import torch

    took = []
    ids = torch.tensor([next(iter(workload.fixed.values()))[:count]])
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            session.model(input_ids=ids, past_key_values=session.new_cache(), use_cache=True, logits_to_keep=1)
            took.append(time.perf_counter() - start)
    return count / statistics.median(took[1:])


def prepared(session: Session, workload: Workload, how: Compression | None) -> dict[str, TensorPayload]:
    """Every agent's fixed prompt, computed once for all runs."""
    from ..serving.prompt_cache import PromptKV

    kv = PromptKV(session)
    return {agent: kv.compute(prompt, how) for agent, prompt in workload.fixed.items()}


def row(
    workload: Workload,
    pool: float,
    cell: tuple[str, float],
    runs: dict[tuple[str, float], list[Run]],
    setting: Setting,
    warm: dict[str, TensorPayload],
) -> dict[str, Any]:
    """Medians over the runs; the ratios are those of the baseline without compression, turn by turn.

    `idle_s` are the seconds in which the model did not compute: what a policy answers for, whatever else the machine
    does meanwhile. `even` is the ratio if all that computed the same in a turn had done it in the same seconds.
    `agents_fit` is how many fixed prompts, as they are stored, the device pool has room for.
    """
    from ..serving import MemoryPool
    from ..serving.simulation.results import quantile

    charge = MemoryPool(setting.device_bytes).charge
    stored = statistics.mean(charge(payload) for payload in warm.values())
    own = runs[cell]
    base_cell = next(each for each in ((BASELINE, 1.0), (BASELINE, cell[1]), cell) if each in runs)
    base = runs[base_cell]
    waits = [wait for run in own for wait in run.ttft_s]
    even = [_even_s(runs, base_cell, turn) / _even_s(runs, cell, turn) for turn in range(len(own))]
    system, keep = cell
    return {
        "name": f"{workload.name}/pool{pool:.0%}",
        "policy": system if keep == 1 else f"{system}+{keep:.0%}",
        "makespan_s": statistics.median(run.makespan_s for run in own),
        "idle_s": statistics.median(run.makespan_s - run.busy_s for run in own),
        "ratio": statistics.median(b.makespan_s / o.makespan_s for b, o in zip(base, own, strict=True)),
        "even": statistics.median(even),
        "hit_rate": statistics.median(run.hit_rate for run in own),
        "stall_s": statistics.median(run.stall_s for run in own),
        "bytes_moved": int(statistics.median(run.bytes_moved for run in own)),
        "bytes_moved_per_call": statistics.median(run.bytes_moved for run in own) / len(workload.calls),
        "bytes_wasted": int(statistics.median(run.bytes_wasted for run in own)),
        "ttft_p50_s": quantile(waits, 0.5),
        "ttft_p99_s": quantile(waits, 0.99),
        "agents_fit": int(setting.device_bytes / stored),
        "paper_ratio": None,
    }


def _even_s(runs: dict[tuple[str, float], list[Run]], cell: tuple[str, float], turn: int) -> float:
    """Seconds of a run if it had computed for as long as the others of its turn that computed the same."""
    run = runs[cell][turn]
    alike = [each[turn] for other, each in runs.items() if other[1] == cell[1] and each[turn].computed == run.computed]
    return run.makespan_s - run.busy_s + statistics.median(each.busy_s for each in alike)


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    from rich.table import Table

    from .benching import make_console

    counts = ("fit", "hits", "stall s", "MiB a call", "wasted")
    columns = ("policy", "seconds", f"× {BASELINE}", "× even", "idle s", *counts, "TTFT P50", "P99")
    table = Table(*columns, title=title)
    for each in rows:
        table.add_row(
            each["policy"], f"{each['makespan_s']:.1f}", f"{each['ratio']:.2f}", f"{each['even']:.2f}",
            f"{each['idle_s']:.2f}",
            str(each["agents_fit"]), f"{each['hit_rate']:.2f}", f"{each['stall_s']:.1f}",
            f"{each['bytes_moved_per_call'] / MIB:.1f}", f"{each['bytes_wasted'] / MIB:.0f}",
            f"{each['ttft_p50_s']:.2f}", f"{each['ttft_p99_s']:.2f}",
        )  # fmt: skip
    make_console().print(table)


def write(rows: Sequence[dict[str, Any]], path: str) -> None:
    """The fields of a `SimulationRow` of `tenure simulate`, no more."""
    from ..serving.simulation.results import SimulationRow

    rows = [{field.name: each[field.name] for field in fields(SimulationRow)} for each in rows]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, target)
