"""`tenure bench agents`: run agent workflows on a real model when their prompts do not all fit on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output import OutputFile, make_console, write_json
from .agent_runs import AGENTS, WORKFLOWS, AgentRun, AgentRunSetting, AgentWorkload, make_workload, one_run

if TYPE_CHECKING:
    from ...eviction import Session
    from ...serving import TensorPayload
    from ...serving.prompt_cache import Compression

BASELINE = "lru_reactive"
SYSTEMS = ("lru", "lru_reactive", "lru_prefetch", "ste", "ste_prefetch", "expected_time", "belady")
MIB = 2**20


@dataclass
class AgentsBenchConfig:
    """Run agent workflows under several policies for two memory tiers; print wall-clock times and ratios.

    Ten agents have a fixed prompt each; a call adds a short suffix and gets a short answer, and the next call starts
    when the previous one is answered. Each turn draws new calls, the same for all systems. All prompts are in the tiers
    at the start. The device pool holds a share of the uncompressed prompts, plus one request; host memory holds all of
    them. Copies are real, throttled to the given bandwidth.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo`."""
    gates: str | None = None
    """Trained gates, a folder or hub:OWNER/NAME; the shipped ones for the demo model."""
    workflows: tuple[str, ...] = ("ring", "branching")
    """ring: each agent calls the next; branching: planner, workers, writer, critic."""
    systems: tuple[str, ...] = SYSTEMS
    """Systems to compare; ratios are relative to lru_reactive."""
    keep: tuple[float, ...] = (1.0, 0.25)
    """Shares of the fixed prompts' KV to store; below 1 the gates choose the entries."""
    pools: tuple[float, ...] = (0.5,)
    """Device pools, as shares of all fixed prompts uncompressed."""
    wrong: tuple[float, ...] = (0.0,)
    """Shares of mispredicted calls: to a random other agent instead of along an edge."""
    habit: bool = False
    """All mispredicted calls of an agent address the same other agent, to which it has no edge."""
    bandwidth: float = 60.0
    """Bandwidth of the device-host link in MB/s, per direction."""
    fixed: int = 512
    """Tokens per fixed prompt."""
    suffix: int = 16
    """Tokens per suffix."""
    answer: int = 8
    """Maximum tokens per answer."""
    rounds: int = 4
    """Calls per run, in tens."""
    runs: int = 5
    """Measured runs per system; medians are reported."""
    threads: int = 1
    """CPU threads of the model; copies run in separate threads."""
    seed: int = 0
    """Seed of the first turn, incremented per turn: determines branches and mispredicted calls."""
    json: OutputFile | None = None
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


def main(config: AgentsBenchConfig) -> int:
    import torch

    from ...eviction import evict
    from ...retention import RetentionGates
    from ..loading import find_gates, load_model

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
    from ...training.assets import essays

    return [token for document in essays("eval") for token in tokenizer(document.text).input_ids]


def compare(
    session: Session, turns: Sequence[AgentWorkload], pool: float, config: AgentsBenchConfig
) -> list[dict[str, Any]]:
    """Rows of all systems on the draws of one workload, each with and without compression; they run in turn."""
    from ...serving import LinearCosts
    from ...serving.prompt_cache import Compression, PromptKV

    workload = turns[0]
    byte_rate = PromptKV(session).bytes_per_token()
    per_prompt = config.fixed * byte_rate
    room = (config.fixed + config.suffix + config.answer) * byte_rate
    speed = prefill_speed(session, workload, config.fixed)
    bandwidth = config.bandwidth * 1e6
    cells: dict[tuple[str, float], AgentRunSetting] = {}
    warm: dict[float, dict[str, TensorPayload]] = {}
    for keep in config.keep:
        how = None if keep == 1 else Compression("retention", keep)
        warm[keep] = prepared(session, workload, how)
        for system in config.systems:
            cells[system, keep] = AgentRunSetting(
                system, how, int(pool * AGENTS * per_prompt) + room, 4 * AGENTS * per_prompt, bandwidth, bandwidth,
                LinearCosts(speed, (bandwidth, bandwidth), 0.0),
            )  # fmt: skip
    runs: dict[tuple[str, float], list[AgentRun]] = {cell: [] for cell in cells}
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


def prefill_speed(session: Session, workload: AgentWorkload, count: int) -> float:
    """Prefill speed in tokens/s, the median of three runs; the systems' estimate of compute cost."""
    import torch

    took = []
    ids = torch.tensor([next(iter(workload.fixed.values()))[:count]])
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            session.extend(session.new_cache(), ids, logits_to_keep=1)
            took.append(time.perf_counter() - start)
    return count / statistics.median(took[1:])


def prepared(session: Session, workload: AgentWorkload, how: Compression | None) -> dict[str, TensorPayload]:
    """Every agent's fixed prompt, computed once for all runs."""
    from ...serving.prompt_cache import PromptKV

    kv = PromptKV(session)
    return {agent: kv.compute(prompt, how) for agent, prompt in workload.fixed.items()}


def row(
    workload: AgentWorkload,
    pool: float,
    cell: tuple[str, float],
    runs: dict[tuple[str, float], list[AgentRun]],
    setting: AgentRunSetting,
    warm: dict[str, TensorPayload],
) -> dict[str, Any]:
    """Medians over the runs; ratios are relative to the baseline without compression, turn by turn.

    `idle_s` is the time in which the model did not compute, the only part a policy controls. `even` is the ratio with
    compute time equalised among runs of a turn that computed the same tokens. `agents_fit` is the number of fixed
    prompts, as stored, that fit into the device pool.
    """
    from ...serving import MemoryPool
    from ...serving.simulation.results import quantile

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


def _even_s(runs: dict[tuple[str, float], list[AgentRun]], cell: tuple[str, float], turn: int) -> float:
    """Seconds of a run if it had computed for as long as the others of its turn that computed the same."""
    run = runs[cell][turn]
    alike = [each[turn] for other, each in runs.items() if other[1] == cell[1] and each[turn].computed == run.computed]
    return run.makespan_s - run.busy_s + statistics.median(each.busy_s for each in alike)


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    from rich.table import Table

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


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The fields of a `SimulationRow` of `tenure simulate`, no more."""
    from ...serving.simulation.results import SimulationRow

    write_json([{field.name: each[field.name] for field in fields(SimulationRow)} for each in rows], path)
