"""`tenure bench trace`: record agent workflows on a real model and replay them in the simulator."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output import OutputFile, make_console, write_rows
from .agent_runs import AGENTS, WORKFLOWS, AgentRunSetting, AgentWorkload, make_workload, one_run

if TYPE_CHECKING:
    from ...eviction import Session
    from ...serving import System, TensorPayload
    from ...serving.simulation.results import SimulationResult
    from ...serving.simulation.trace import Trace

SYSTEMS = ("lru", "lru_reactive", "lru_prefetch", "ste", "ste_prefetch", "expected_time")
PROMISED = 0.15  # of the measured makespan, by which the predicted one may be off


@dataclass
class TraceBenchConfig:
    """Record the workflows of `bench agents` on a real model and compare the simulator's predictions with measurements.

    Each run is predicted twice: with compute times fitted to its own batches, and with those fitted to the first
    system's run. The latter is accurate only if the machine was equally fast in both runs; drift is the slowdown.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo`."""
    workflows: tuple[str, ...] = ("ring", "branching")
    """ring: each agent calls the next; branching: planner, workers, writer, critic."""
    systems: tuple[str, ...] = ("lru_reactive", "ste_prefetch")
    """Systems to run and replay."""
    pool: float = 0.5
    """Device pool, as a share of all fixed prompts."""
    bandwidth: float = 60.0
    """Bandwidth of the device-host link in MB/s, per direction."""
    fixed: int = 512
    """Tokens per fixed prompt."""
    suffix: int = 16
    """Tokens per suffix."""
    answer: int = 8
    """Maximum tokens per answer."""
    rounds: int = 2
    """Calls per run, in tens."""
    threads: int = 1
    """CPU threads of the model; copies run in separate threads."""
    seed: int = 0
    """Seed for branches."""
    keep: str | None = None
    """Keep the traces in this folder, for `tenure simulate --trace`."""
    json: OutputFile | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        if min(self.fixed, self.suffix, self.answer, self.rounds, self.threads) < 1:
            raise ValueError("--fixed, --suffix, --answer, --rounds and --threads accept 1 or more")
        strange = sorted({*self.workflows} - {*WORKFLOWS}) + sorted({*self.systems} - {*SYSTEMS})
        if strange or not (self.workflows and self.systems):
            raise ValueError(
                f"got {', '.join(strange) or 'an empty list'}; --workflows accepts {', '.join(WORKFLOWS)}, --systems "
                f"{', '.join(SYSTEMS)}"
            )
        if not (0 < self.pool <= 1 and self.bandwidth > 0):
            raise ValueError(
                f"got --pool {self.pool} and --bandwidth {self.bandwidth}; accepted: a share above 0 and up to 1, and "
                "MB/s above 0"
            )


@dataclass(frozen=True)
class TraceBenchRow:
    """One run, measured and predicted.

    Attributes:
        measured_s, predicted_s: makespans; the latter with rates fitted to the run's own batches.
        foretold_s: with rates fitted to the run of the first system.
        drift: how many times as long as under those rates the batches of this run took.
        hit_rate, predicted_hit_rate: of fixed prompts' tokens, the share that lay on the device.
        stall_s, predicted_stall_s: that requests waited for copies.
    """

    name: str
    policy: str
    measured_s: float
    predicted_s: float
    foretold_s: float
    drift: float
    hit_rate: float
    predicted_hit_rate: float
    stall_s: float
    predicted_stall_s: float

    @property
    def off(self) -> float:
        """By which part of the measured makespan `predicted_s` is off."""
        return abs(self.predicted_s / self.measured_s - 1)


def main(config: TraceBenchConfig) -> int:
    import tempfile

    import torch

    from ...eviction import evict
    from ..loading import load_model
    from .bench_agents import prefill_speed, prepared, tokens

    torch.set_num_threads(config.threads)
    model, tokenizer = load_model(config.model, "cpu", "float32")
    text = tokens(tokenizer)
    rows: list[TraceBenchRow] = []
    with contextlib.ExitStack() as stack:
        folder = Path(config.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        session = stack.enter_context(evict(model, "full"))
        for name in config.workflows:
            workload = make_workload(
                name, text, config.rounds, config.fixed, config.suffix, config.answer, 0.0, config.seed
            )
            speed = prefill_speed(session, workload, config.fixed)
            rows += validate(session, workload, prepared(session, workload, None), speed, config, folder)
    show(rows, config)
    if config.json:
        write_rows(rows, config.json)
    return 0


def validate(
    session: Session,
    workload: AgentWorkload,
    warm: dict[str, TensorPayload],
    tokens_per_s: float,
    config: TraceBenchConfig,
    folder: Path,
) -> list[TraceBenchRow]:
    """Runs a workload on every system, records it and replays it.

    Args:
        warm: the KV of each agent's fixed prompt.
        tokens_per_s: prefill speed, the systems' estimate of compute cost.
        folder: for the traces.
    """
    from ...serving.prompt_cache import PromptKV
    from ...serving.simulation.simulator import machine_of, replay
    from ...serving.simulation.trace import read_trace

    rate, bandwidth = PromptKV(session).bytes_per_token(), config.bandwidth * 1e6
    all_fixed, one = AGENTS * config.fixed * rate, (config.fixed + config.suffix + config.answer) * rate
    device, costs = int(config.pool * all_fixed) + one, costs_of(tokens_per_s, bandwidth)
    setting = AgentRunSetting("", None, device, 4 * all_fixed, bandwidth, bandwidth, costs)
    rows: list[TraceBenchRow] = []
    first: Trace | None = None
    for system in config.systems:
        path = folder / f"{workload.name}-{system}.jsonl"
        record(session, workload, replace(setting, system=system), warm, path)
        trace = read_trace(path)
        first = first or trace
        machine, costs = machine_of(trace), machine_of(first).costs
        own, foretold = (replay(each, trace, system) for each in (machine, replace(machine, costs=costs)))
        drift = sum(seconds for _, seconds in trace.batches) / sum(costs.batch_s(batch) for batch, _ in trace.batches)
        rows.append(_row(workload.name, trace, own, foretold, drift))
        print(f"{workload.name}: {system} {trace.makespan_s:.1f} s, predicted {own.makespan_s:.1f} s", flush=True)
    return rows


def costs_of(tokens_per_s: float, bandwidth: float) -> Any:
    from ...serving import LinearCosts

    return LinearCosts(tokens_per_s, (bandwidth, bandwidth), 0.0)


def record(
    session: Session, workload: AgentWorkload, setting: AgentRunSetting, warm: dict[str, TensorPayload], path: Path
) -> None:
    """One real run of `one_run`, whose trace is written to `path`."""
    from ...serving import LinearCosts
    from ...serving.prompt_cache import PromptKV
    from ...serving.simulation.trace import RecordingScheduler, TraceRecorder

    assert isinstance(setting.costs, LinearCosts), "made by costs_of"
    about = {
        "system": setting.system,
        "device_bytes": setting.device_bytes,
        "whole_pages": True,
        "host_bytes": setting.host_bytes,
        "link_bytes_per_s": setting.host_to_device,
        "copy_parts": len(next(iter(warm.values())).layers),
        "believed": [setting.costs.tokens_per_s, *setting.costs.bytes_per_s, setting.costs.latency_s],
    }

    with contextlib.ExitStack() as stack:

        def watch(system: System) -> System:
            recorder = stack.enter_context(
                TraceRecorder(path, PromptKV(session).bytes_per_token(), system.tiers.page_size, about)
            )
            recorder.record_workflow(time.monotonic(), workload.spec)
            for agent, payload in warm.items():
                recorder.record_stored(agent, workload.fixed[agent][: payload.tokens], payload.nbytes)
            return replace(system, scheduler=RecordingScheduler(system.scheduler, recorder))  # type: ignore[arg-type]

        one_run(session, workload, setting, warm, watch)


def _row(name: str, trace: Trace, own: SimulationResult, foretold: SimulationResult, drift: float) -> TraceBenchRow:
    fixed = [call.fixed_tokens - call.fixed_tokens % trace.page_size for call in trace.calls]
    hits = [min(size, call.on_device) for size, call in zip(fixed, trace.calls, strict=True)]
    return TraceBenchRow(
        name,
        trace.about["system"],
        measured_s=trace.makespan_s,
        predicted_s=own.makespan_s,
        foretold_s=foretold.makespan_s,
        drift=drift,
        hit_rate=sum(hits) / max(1, sum(fixed)),
        predicted_hit_rate=own.hit_rate,
        stall_s=sum(call.stalled_s for call in trace.calls),
        predicted_stall_s=own.stall_s,
    )


def show(rows: Sequence[TraceBenchRow], config: TraceBenchConfig) -> None:
    from rich.table import Table

    columns = ("workflow", "system", "measured s", "predicted", "off", "hits, predicted", "stall s, predicted",
               f"by the rates of {config.systems[0]}", "drift")  # fmt: skip
    table = Table(*columns, title=f"{config.rounds * AGENTS} calls, {config.bandwidth:g} MB/s, pool {config.pool:.0%}")
    for row in rows:
        table.add_row(
            row.name, row.policy, f"{row.measured_s:.1f}", f"{row.predicted_s:.1f}", f"{row.off:.0%}",
            f"{row.hit_rate:.2f}, {row.predicted_hit_rate:.2f}", f"{row.stall_s:.1f}, {row.predicted_stall_s:.1f}",
            f"{row.foretold_s:.1f}", f"{row.drift:.2f}",
        )  # fmt: skip
    console = make_console()
    console.print(table)
    within = all(row.off <= PROMISED for row in rows)
    console.print(f"{'every' if within else 'NOT every'} makespan is within {PROMISED:.0%} of the measured one")
