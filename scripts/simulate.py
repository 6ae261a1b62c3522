"""`tenure simulate`: replays set-ups of papers, studies and traces on a virtual clock, with the real scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .simulate_output import Comparison, show_comparison, show_study, study_rows, write_rows

if TYPE_CHECKING:
    from ..serving.simulation.config import SimulationSetup


@dataclass
class Config:
    """Simulate serving policies: how many times as fast as each baseline they are, beside what a paper reports."""

    setups: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="PATH ...")] = field(default_factory=list)
    """YAML set-ups (examples/kvflow_*.yaml; docs/simulator.md has the format)."""
    policies: list[str] = field(default_factory=list)
    """Only these, beside the baselines; by default what the set-up names."""
    set: tuple[str, ...] = ()
    """Changes to the set-ups and all their cells, as machine.link_gb_s=4 workload.rounds=1."""
    cells: str | None = None
    """Only cells whose name contains this."""
    repeats: int | None = None
    """Seeds of each run; by default what the set-up says."""
    jobs: int | None = None
    """Processes; by default one for each core."""
    study: bool = False
    """Vary the first cell's workload instead: mispredictions, noise, changes, tails, numbers, hostile clients."""
    workflows: list[int] = field(default_factory=lambda: [64, 250, 1000])
    """Numbers of workflows that the study tries."""
    trace: str | None = None
    """Replay this trace (JSONL) on the first cell's machine; without a set-up, on the one it was recorded on."""
    record: str | None = None
    """Write a trace of the last policy's run of the first cell to this file."""
    timeline: str | None = None
    """Draw where the agents' prompts were, for the first cell, to this file (.png or .svg)."""
    timeline_s: float | None = None
    """Only the first so many seconds of it."""
    plot: str | None = None
    """Draw the speed-ups with their spread, or the study, to this file."""
    json: str | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"--repeats accepts 1 or more, not {self.repeats}")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"--jobs accepts 1 or more, not {self.jobs}")
        if not self.setups and not self.trace:
            raise ValueError("no set-up is named, as examples/kvflow_single.yaml, and no --trace")
        if (self.study or self.trace) and len(self.setups) > 1:
            raise ValueError(f"--study and --trace accept one set-up, not {len(self.setups)}")
        if any(number < 1 for number in self.workflows):
            raise ValueError(f"--workflows accepts numbers from 1 up, not {min(self.workflows)}")

    @property
    def processes(self) -> int:
        from ..serving.simulation.study import available_cores

        return self.jobs or available_cores()


def main(config: Config) -> int:
    from ..serving.simulation.config import load_setup

    if config.trace:
        return _trace(config)
    setups = [_chosen(load_setup(path, config.set), config) for path in config.setups]
    if config.study:
        return _study(setups[0], config)
    comparisons: list[Comparison] = []
    for setup in setups:
        begun = time.perf_counter()
        compared = compare(setup, config.processes)
        show_comparison(compared, time.perf_counter() - begun, config.processes)
        comparisons += compared
    _extras(setups[0], comparisons, config)
    if config.json:
        write_rows([row for each in comparisons for row in each.rows()], config.json)
    return 0


def _chosen(setup: SimulationSetup, config: Config) -> SimulationSetup:
    """Only the cells, policies and repeats that the command line asks for."""
    from dataclasses import replace

    if config.policies:
        setup = setup.with_policies(tuple(config.policies))
    cells = tuple(cell for cell in setup.cells if config.cells is None or config.cells in cell.name)
    if not cells:
        raise ValueError(f"no cell of {setup.name} has {config.cells!r} in its name: "
                         + ", ".join(cell.name for cell in setup.cells))  # fmt: skip
    return replace(setup, cells=cells, repeats=config.repeats or setup.repeats)


def compare(setup: SimulationSetup, jobs: int) -> list[Comparison]:
    """Runs every policy of every cell with every seed."""
    from ..serving.simulation.simulator import simulate
    from ..serving.simulation.study import run_parallel

    seeds = range(setup.seed, setup.seed + setup.repeats)
    tasks = [
        partial(simulate, cell.machine, cell.workload, policy, seed)
        for cell in setup.cells
        for policy in setup.policies
        for seed in seeds
    ]
    with _progress(setup.name, len(tasks)) as ended:
        outcomes = iter(run_parallel(tasks, jobs, ended))
    return [
        Comparison(setup, cell, {policy: [next(outcomes) for _ in seeds] for policy in setup.policies})
        for cell in setup.cells
    ]


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar, and what moves it on by one."""
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        bar = progress.add_task(name, total=total)
        yield lambda: progress.advance(bar)


def _study(setup: SimulationSetup, config: Config) -> int:
    from ..serving.simulation.plots import draw_study
    from ..serving.simulation.study import questions_for, run_study

    cell, baseline = setup.cells[0], setup.baselines[-1]
    questions = questions_for(cell.workload, config.workflows)
    seeds = range(setup.seed, setup.seed + setup.repeats)
    total = len(seeds) * len(setup.policies) * sum(len(question.values) for question in questions)
    with _progress(setup.name, total) as ended:
        points = run_study(
            cell.machine, cell.workload, questions, setup.policies, baseline, seeds, config.processes, ended
        )
    show_study(setup, points, baseline)
    if config.plot:
        draw_study(points, config.plot, baseline)
    if config.json:
        write_rows(study_rows(setup.name, points, baseline), config.json)
    return 0


def _trace(config: Config) -> int:
    """Replays a trace under every policy, beside the makespan that was recorded."""
    from ..serving.simulation.config import SimulationCell, SimulationSetup, load_setup
    from ..serving.simulation.simulator import machine_of, replay
    from ..serving.simulation.study import run_parallel
    from ..serving.simulation.trace import read_trace
    from ..serving.simulation.workload import WorkloadConfig

    path = config.trace or ""
    trace = read_trace(path)
    machine = load_setup(config.setups[0], config.set).cells[0].machine if config.setups else machine_of(trace)
    cell = SimulationCell(Path(path).name, machine, WorkloadConfig())
    title = f"trace {path}: {len(trace.calls)} calls"
    setup = _chosen(SimulationSetup(Path(path).stem, title, "replayed", (cell,), repeats=1), config)
    begun = time.perf_counter()
    outcomes = run_parallel([partial(replay, machine, trace, policy) for policy in setup.policies], config.processes)
    by_policy = {policy: [outcome] for policy, outcome in zip(setup.policies, outcomes, strict=True)}
    comparison = Comparison(setup, cell, by_policy, recorded_s=trace.makespan_s)
    show_comparison([comparison], time.perf_counter() - begun, config.processes)
    if config.json:
        write_rows(comparison.rows(), config.json)
    return 0


def _extras(setup: SimulationSetup, comparisons: Sequence[Comparison], config: Config) -> None:
    """Pictures and a recorded trace of the first cell."""
    from ..serving.simulation.plots import draw_speedups, draw_timelines
    from ..serving.simulation.simulator import simulate
    from ..serving.simulation.timeline import Timeline
    from ..serving.simulation.trace import TraceRecorder

    cell = setup.cells[0]
    if config.timeline:
        timelines = {policy: Timeline() for policy in setup.policies}
        for policy, timeline in timelines.items():
            simulate(cell.machine, cell.workload, policy, setup.seed, timeline=timeline)
        draw_timelines(timelines, config.timeline, config.timeline_s)
    if config.record:
        about = {"setup": setup.name, "cell": cell.name, "policy": setup.policies[-1], "seed": setup.seed}
        machine = cell.machine
        with TraceRecorder(Path(config.record), machine.bytes_per_token, machine.page_size, about) as recorder:
            simulate(cell.machine, cell.workload, setup.policies[-1], setup.seed, recorder=recorder)
    if config.plot:
        baseline = setup.baselines[-1]
        ratios = {each.cell.name: each.all_ratios(baseline) for each in comparisons}
        paper = {each.cell.name: each.cell.paper[baseline] for each in comparisons if baseline in each.cell.paper}
        draw_speedups(ratios, config.plot, baseline, paper)
