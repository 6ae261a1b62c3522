"""The tables and rows of `tenure simulate`."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .benching import make_console

if TYPE_CHECKING:
    from rich.table import Table

    from ..serving.simulation.config import SimulationCell, SimulationSetup
    from ..serving.simulation.results import SimulationResult, SimulationRow
    from ..serving.simulation.study import StudyPoint

SUMMED = ("bytes_moved", "stall_s")
BYTES = ("bytes_moved", "bytes_wasted")


@dataclass(frozen=True)
class Comparison:
    """One cell under all policies.

    Attributes:
        outcomes: by policy, one for each seed, the same seeds for all.
        recorded_s: of a trace that was replayed, its own makespan.
    """

    setup: SimulationSetup
    cell: SimulationCell
    outcomes: Mapping[str, Sequence[SimulationResult]]
    recorded_s: float | None = None

    def all_ratios(self, baseline: str) -> dict[str, list[float]]:
        """By policy, how many times as fast as the baseline, seed by seed."""
        base = self.outcomes[baseline]
        return {
            policy: [one.makespan_s / other.makespan_s for one, other in zip(base, outcomes, strict=True)]
            for policy, outcomes in self.outcomes.items()
            if policy != baseline
        }

    def paper(self, policy: str, baseline: str) -> float | None:
        return self.cell.paper.get(baseline) if policy == self.cell.paper_policy else None

    def rows(self) -> list[SimulationRow]:
        """One for each policy and baseline."""
        from ..serving.simulation.results import row_of

        rows = []
        for baseline in self.setup.baselines:
            ratios = {baseline: [1.0], **self.all_ratios(baseline)}
            for policy, values in ratios.items():
                name = f"{self.setup.name}/{self.cell.name}/vs_{baseline}"
                paper = self.paper(policy, baseline)
                rows.append(row_of(name, policy, self.outcomes[policy], statistics.fmean(values), paper))
        return rows


def show_comparison(comparisons: Sequence[Comparison], seconds: float, jobs: int) -> None:
    """A table for each cell of a set-up on stdout, and what explains its differences from the paper.

    Args:
        seconds: that all of it took. jobs: processes it was run by.
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


def _table(comparison: Comparison) -> Table:
    from rich.table import Column, Table

    table = Table(
        Column("policy", no_wrap=True),
        *(Column(f"vs {baseline} (paper)", no_wrap=True) for baseline in comparison.setup.baselines),
        Column("makespan s", justify="right", no_wrap=True),
        Column("hits", justify="right", no_wrap=True),
        Column("stall s", justify="right", no_wrap=True),
        Column("GB, wasted", justify="right", no_wrap=True),
        Column("TTFT p50, p99", justify="right", no_wrap=True),
        title=comparison.cell.name,
        title_justify="left",
    )
    for policy, outcomes in comparison.outcomes.items():
        table.add_row(
            policy,
            *(_ratio(comparison, policy, baseline) for baseline in comparison.setup.baselines),
            _mean(outcomes, "makespan_s", ".1f"),
            _mean(outcomes, "hit_rate", ".2f"),
            _mean(outcomes, "stall_s", ".1f"),
            ", ".join(f"{statistics.fmean(getattr(o, f) for o in outcomes) / 1e9:.0f}" for f in BYTES),
            ", ".join(_mean(outcomes, field, ".3f") for field in ("ttft_p50_s", "ttft_p99_s")),
        )
    return table


def _groups(comparisons: Sequence[Comparison]) -> Iterator[Table]:
    """Tables of what cells have in common whose names differ by a number only."""
    from rich.table import Column, Table

    by_name: dict[str, list[Comparison]] = {}
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


def _summary(cells: Sequence[Comparison], policy: str, baseline: str) -> list[str]:
    ratios = [1.0 if policy == baseline else statistics.fmean(each.all_ratios(baseline)[policy]) for each in cells]
    sums = {f: sum(statistics.fmean(getattr(o, f) for o in each.outcomes[policy]) for each in cells) for f in SUMMED}
    p99 = statistics.geometric_mean(
        max(1e-6, statistics.fmean(outcome.ttft_p99_s for outcome in each.outcomes[policy])) for each in cells
    )
    moved, stalled = (sums[field] for field in SUMMED)
    return [f"{statistics.geometric_mean(ratios):.4f}", f"{moved / 1e9:.0f}", f"{stalled:.0f}", f"{p99:.3f}"]


def _mean(outcomes: Sequence[SimulationResult], field: str, form: str) -> str:
    return format(statistics.fmean(getattr(outcome, field) for outcome in outcomes), form)


def _ratio(comparison: Comparison, policy: str, baseline: str) -> str:
    if policy == baseline:
        return "1"
    values = comparison.all_ratios(baseline)[policy]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    paper = comparison.paper(policy, baseline)
    shown = f"{statistics.fmean(values):.2f}" + (f" ± {spread:.2f}" if spread >= 0.005 else "")
    return shown + ("" if paper is None else f" ({paper:.2f})")


def show_study(setup: SimulationSetup, points: Sequence[StudyPoint], baseline: str) -> None:
    """A table a question, and the points that are slower than the baseline by more than is promised."""
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


def write_rows(rows: Sequence[Any], path: str) -> None:
    """The rows, dataclasses, as a JSON list, written under a temporary name first."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(json.dumps([asdict(row) for row in rows], indent=2, allow_nan=False) + "\n")
    os.replace(temporary, target)
