"""`tenure simulate`: replay published set-ups, studies and traces on a virtual clock, with the real scheduler."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .loading import find_example
from .output import PICTURES, OutputFile, WrittenFile, make_console, write_rows

if TYPE_CHECKING:
    from rich.table import Table

    from ..serving.simulation.results import SimulationResult, SimulationRow
    from ..serving.simulation.setup import SimulationCell, SimulationSetup
    from ..serving.simulation.study import StudyPoint

Picture = Annotated[Path, WrittenFile(PICTURES, "simulate")]
SUMMED = ("bytes_moved", "stall_s")
BYTES = ("bytes_moved", "bytes_wasted")


@dataclass
class SimulateConfig:
    """Simulate serving policies and print their speed-ups over each baseline next to the published numbers."""

    setups: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="PATH ...")] = field(default_factory=list)
    """YAML set-ups (examples/kvflow_*.yaml; docs/reference/config.md has the format)."""
    policies: list[str] = field(default_factory=list)
    """Policies to run in addition to the baselines; by default those of the set-up."""
    set: tuple[str, ...] = ()
    """Overrides for all cells of the set-ups, e.g. machine.link_gb_s=4 workload.rounds=1."""
    cells: str | None = None
    """Run only cells whose name contains this text."""
    repeats: int | None = None
    """Seeds per run; by default as in the set-up."""
    jobs: int | None = None
    """Number of processes; by default one per core."""
    study: bool = False
    """Vary the first cell's workload instead: mispredictions, noise, changes, tails, scale, adversarial clients."""
    workflows: list[int] = field(default_factory=lambda: [64, 250, 1000])
    """Numbers of workflows in the study."""
    trace: Path | None = None
    """Replay this trace (JSONL) on the first cell's machine, or without a set-up on the machine it was recorded on."""
    record: OutputFile | None = None
    """Write a trace of the last policy's run of the first cell to this file."""
    timeline: Picture | None = None
    """Plot the tier of each agent's prompt over time, for the first cell, to this file (.png, .svg or .pdf)."""
    timeline_s: float | None = None
    """Limit that plot to this many seconds."""
    plot: Picture | None = None
    """Plot the speed-ups with their spread, or the study, to this file."""
    json: OutputFile | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        if self.timeline_s is not None and not self.timeline_s > 0:
            raise ValueError(f"--timeline-s accepts seconds above 0, not {self.timeline_s}")
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"--repeats accepts 1 or more, not {self.repeats}")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"--jobs accepts 1 or more, not {self.jobs}")
        if not self.setups and not self.trace:
            raise ValueError("no set-up is named, as examples/kvflow_single.yaml, and no --trace")
        if (self.study or self.trace) and len(self.setups) > 1:
            raise ValueError(f"--study and --trace accept one set-up, not {len(self.setups)}")
        if self.trace and (self.study or self.plot or self.timeline or self.record):
            raise ValueError("--trace goes with --json; --study, --plot, --timeline and --record are for set-ups")
        if any(number < 1 for number in self.workflows):
            raise ValueError(f"--workflows accepts numbers from 1 up, not {min(self.workflows)}")

    @property
    def processes(self) -> int:
        from ..serving.simulation.study import available_cores

        return self.jobs or available_cores()


@dataclass(frozen=True)
class PolicyComparison:
    """One cell under all policies.

    Attributes:
        outcomes: by policy, one for each seed, the same seeds for all.
        recorded_s: recorded makespan of a replayed trace.
    """

    setup: SimulationSetup
    cell: SimulationCell
    outcomes: Mapping[str, Sequence[SimulationResult]]
    recorded_s: float | None = None

    def all_ratios(self, baseline: str) -> dict[str, list[float]]:
        """Speed-ups over the baseline by policy, one per seed."""
        base = self.outcomes[baseline]
        return {
            policy: [one.makespan_s / other.makespan_s for one, other in zip(base, outcomes, strict=True)]
            for policy, outcomes in self.outcomes.items()
            if policy != baseline
        }

    def paper(self, policy: str, baseline: str) -> float | None:
        return self.cell.paper.get(baseline) if policy == self.cell.paper_policy else None

    def rows(self) -> list[SimulationRow]:
        """One row for each policy and baseline."""
        from ..serving.simulation.results import row_of

        rows = []
        for baseline in self.setup.baselines:
            ratios = {baseline: [1.0], **self.all_ratios(baseline)}
            for policy, values in ratios.items():
                name = f"{self.setup.name}/{self.cell.name}/vs_{baseline}"
                paper = self.paper(policy, baseline)
                rows.append(row_of(name, policy, self.outcomes[policy], statistics.fmean(values), paper))
        return rows


def main(config: SimulateConfig) -> int:
    from ..serving.simulation.setup import load_setup

    if config.trace:
        return _trace(config)
    setups = [_chosen(load_setup(find_example(path), config.set), config) for path in config.setups]
    if config.study:
        return _study(setups[0], config)
    comparisons: list[PolicyComparison] = []
    for setup in setups:
        begun = time.perf_counter()
        compared = compare(setup, config.processes)
        show_comparison(compared, time.perf_counter() - begun, config.processes)
        comparisons += compared
    _extras(setups[0], comparisons, config)
    if config.json:
        write_rows([row for each in comparisons for row in each.rows()], config.json)
    return 0


def _chosen(setup: SimulationSetup, config: SimulateConfig) -> SimulationSetup:
    """The set-up with the cells, policies and repeats selected on the command line."""
    from dataclasses import replace

    if config.policies:
        setup = setup.with_policies(tuple(config.policies))
    cells = tuple(cell for cell in setup.cells if config.cells is None or config.cells in cell.name)
    if not cells:
        raise ValueError(f"no cell of {setup.name} has {config.cells!r} in its name: "
                         + ", ".join(cell.name for cell in setup.cells))  # fmt: skip
    return replace(setup, cells=cells, repeats=config.repeats or setup.repeats)


def compare(setup: SimulationSetup, jobs: int) -> list[PolicyComparison]:
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
        PolicyComparison(setup, cell, {policy: [next(outcomes) for _ in seeds] for policy in setup.policies})
        for cell in setup.cells
    ]


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar, and a callback that advances it by one."""
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        bar = progress.add_task(name, total=total)
        yield lambda: progress.advance(bar)


def _study(setup: SimulationSetup, config: SimulateConfig) -> int:
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
        config.plot.parent.mkdir(parents=True, exist_ok=True)
        draw_study(points, config.plot, baseline, f"{setup.title}, {cell.name}")
    if config.json:
        write_rows(study_rows(setup.name, points, baseline), config.json)
    return 0


def _trace(config: SimulateConfig) -> int:
    """Replays a trace under every policy and prints the recorded makespan for comparison."""
    from ..serving.simulation.setup import SimulationCell, SimulationSetup, load_setup
    from ..serving.simulation.simulator import machine_of, replay
    from ..serving.simulation.study import run_parallel
    from ..serving.simulation.trace import read_trace
    from ..serving.simulation.workload import WorkloadConfig

    path = config.trace
    assert path is not None, "main has asked"
    trace = read_trace(path)
    machine = (
        load_setup(find_example(config.setups[0]), config.set).cells[0].machine if config.setups else machine_of(trace)
    )
    cell = SimulationCell(path.name, machine, WorkloadConfig())
    title = f"trace {path}: {len(trace.calls)} calls"
    setup = _chosen(SimulationSetup(path.stem, title, "replayed", (cell,), repeats=1), config)
    begun = time.perf_counter()
    outcomes = run_parallel([partial(replay, machine, trace, policy) for policy in setup.policies], config.processes)
    by_policy = {policy: [outcome] for policy, outcome in zip(setup.policies, outcomes, strict=True)}
    comparison = PolicyComparison(setup, cell, by_policy, recorded_s=trace.makespan_s)
    show_comparison([comparison], time.perf_counter() - begun, config.processes)
    if config.json:
        write_rows(comparison.rows(), config.json)
    return 0


def _extras(setup: SimulationSetup, comparisons: Sequence[PolicyComparison], config: SimulateConfig) -> None:
    """Plots and a recorded trace of the first cell."""
    from ..serving.simulation.plots import draw_speedups, draw_timelines
    from ..serving.simulation.simulator import machine_about, simulate
    from ..serving.simulation.timeline import Timeline
    from ..serving.simulation.trace import TraceRecorder

    cell = setup.cells[0]
    for path in filter(None, (config.timeline, config.record, config.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if config.timeline:
        timelines = {policy: Timeline() for policy in setup.policies}
        for policy, timeline in timelines.items():
            simulate(cell.machine, cell.workload, policy, setup.seed, timeline=timeline)
        draw_timelines(timelines, config.timeline, f"{setup.title}, {cell.name}", config.timeline_s)
    if config.record:
        machine = cell.machine
        about = {"setup": setup.name, "cell": cell.name, "policy": setup.policies[-1], "seed": setup.seed}
        about |= machine_about(machine)
        with TraceRecorder(config.record, machine.bytes_per_token, machine.page_size, about) as recorder:
            simulate(cell.machine, cell.workload, setup.policies[-1], setup.seed, recorder=recorder)
    if config.plot:
        baseline = setup.baselines[-1]
        ratios = {each.cell.name: each.all_ratios(baseline) for each in comparisons}
        cells = [each.cell for each in comparisons if baseline in each.cell.paper]
        paper = {(each.name, each.paper_policy): each.paper[baseline] for each in cells}
        draw_speedups(ratios, config.plot, baseline, setup.title, paper)


def show_comparison(comparisons: Sequence[PolicyComparison], seconds: float, jobs: int) -> None:
    """Prints a table for each cell of a set-up, with notes on differences from the paper.

    Args:
        seconds: total wall-clock time. jobs: number of processes.
    """
    setup, console = comparisons[0].setup, make_console()
    console.print(f"{setup.title}\n{setup.source}; mean ± standard deviation of {setup.repeats} seeds", highlight=False)
    for each in comparisons:
        console.print(_table(each))
        if each.recorded_s is not None:
            console.print(f"recorded makespan: {each.recorded_s:.2f} s")
        if each.cell.why:
            console.print(f"{each.cell.why}\n", highlight=False)
    for group in _groups(comparisons):
        console.print(group)
    runs = [outcome for each in comparisons for outcomes in each.outcomes.values() for outcome in outcomes]
    cpu, events = sum(run.cpu_s for run in runs), sum(run.events for run in runs)
    decisions = sum(run.decisions for run in runs)
    console.print(
        f"{events / 1e6:.2f} M events in {cpu:.1f} s of one core: {events / cpu / 1e3:.0f} k/s; "
        f"{decisions / cpu / 1e3:.1f} k/s if the tokens of a batch count as one"
        + (f". In {seconds:.1f} s by {jobs} processes: {events / seconds / 1e3:.0f} k/s" if jobs > 1 else ""),
        highlight=False,
    )


def _table(comparison: PolicyComparison) -> Table:
    from rich.table import Column, Table

    table = Table(
        Column("policy", no_wrap=True),
        *(Column(f"vs {baseline} (paper)", no_wrap=True) for baseline in comparison.setup.baselines),
        Column("makespan s", justify="right", no_wrap=True), Column("hits", justify="right", no_wrap=True),
        Column("stall s", justify="right", no_wrap=True), Column("GB, wasted", justify="right", no_wrap=True),
        Column("TTFT p50, p99", justify="right", no_wrap=True), title=comparison.cell.name, title_justify="left",
    )  # fmt: skip
    for policy, outcomes in comparison.outcomes.items():
        table.add_row(
            policy, *(_ratio(comparison, policy, baseline) for baseline in comparison.setup.baselines),
            _mean(outcomes, "makespan_s", ".1f"), _mean(outcomes, "hit_rate", ".2f"), _mean(outcomes, "stall_s", ".1f"),
            ", ".join(f"{statistics.fmean(getattr(o, f) for o in outcomes) / 1e9:.0f}" for f in BYTES),
            ", ".join(_mean(outcomes, field, ".3f") for field in ("ttft_p50_s", "ttft_p99_s")),
        )  # fmt: skip
    return table


def _groups(comparisons: Sequence[PolicyComparison]) -> Iterator[Table]:
    """Summary tables of cells whose names differ only by a number."""
    from rich.table import Column, Table

    by_name: dict[str, list[PolicyComparison]] = {}
    for each in comparisons:
        by_name.setdefault(each.cell.name.rstrip("0123456789 "), []).append(each)
    for name, members in by_name.items():
        if len(members) == 1:
            continue
        baseline = members[0].setup.baselines[-1]
        columns = ("policy", "cells", f"× {baseline}, geometric mean", "GB moved", "stall s", "TTFT p99, mean")
        table = Table(*(Column(column, no_wrap=True) for column in columns), title=f"{name}, all", title_justify="left")
        chosen = {
            "all": members,
            "mispredicted": [each for each in members if each.cell.workload.mispredicted],
            "branches": [each for each in members if each.cell.workload.branches > 1],
        }
        for policy in members[0].outcomes:
            for kind, cells in chosen.items():
                if cells:
                    table.add_row(policy, f"{len(cells)} {kind}", *_summary(cells, policy, baseline))
        yield table


def _summary(cells: Sequence[PolicyComparison], policy: str, baseline: str) -> list[str]:
    ratios = [1.0 if policy == baseline else statistics.fmean(each.all_ratios(baseline)[policy]) for each in cells]
    sums = {f: sum(statistics.fmean(getattr(o, f) for o in each.outcomes[policy]) for each in cells) for f in SUMMED}
    p99 = statistics.geometric_mean(
        max(1e-6, statistics.fmean(outcome.ttft_p99_s for outcome in each.outcomes[policy])) for each in cells
    )
    moved, stalled = (sums[field] for field in SUMMED)
    return [f"{statistics.geometric_mean(ratios):.4f}", f"{moved / 1e9:.0f}", f"{stalled:.0f}", f"{p99:.3f}"]


def _mean(outcomes: Sequence[SimulationResult], field: str, form: str) -> str:
    return format(statistics.fmean(getattr(outcome, field) for outcome in outcomes), form)


def _ratio(comparison: PolicyComparison, policy: str, baseline: str) -> str:
    if policy == baseline:
        return "1"
    values = comparison.all_ratios(baseline)[policy]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    paper = comparison.paper(policy, baseline)
    shown = f"{statistics.fmean(values):.2f}" + (f" ± {spread:.2f}" if spread >= 0.005 else "")
    return shown + ("" if paper is None else f" ({paper:.2f})")


def show_study(setup: SimulationSetup, points: Sequence[StudyPoint], baseline: str) -> None:
    """Prints a table per question, and the points that are slower than the baseline beyond the accepted limit."""
    from rich.table import Table

    console = make_console()
    policies = list(dict.fromkeys(point.policy for point in points))
    console.print(f"{setup.title}: {setup.cells[0].name}; {setup.repeats} seeds", highlight=False)
    for question in dict.fromkeys(point.question for point in points):
        mine = [point for point in points if point.question == question]
        table = Table(question, *policies, caption=f"× as fast as {baseline} by the mean call / P99 of TTFT in s")
        for value in dict.fromkeys(point.value for point in mine):
            by_policy = {point.policy: point for point in mine if point.value == value}
            table.add_row(value, *(f"{by_policy[p].ratio:.2f} / {by_policy[p].ttft_p99_s:.2f}" for p in policies))
        console.print(table)
    harmed = [point for point in points if point.harmed]
    for point in harmed:
        console.print(f"slower than {baseline}: {point.policy} at {point.question} {point.value}: {point.ratio:.3f}")
    if not harmed:
        console.print(f"no policy is slower than {baseline} by more than 3 % anywhere")


def study_rows(name: str, points: Sequence[StudyPoint], baseline: str) -> list[SimulationRow]:
    from ..serving.simulation.results import row_of

    return [
        row_of(f"{name}/{point.question}/{point.value}/vs_{baseline}", point.policy, point.results, point.ratio)
        for point in points
    ]
