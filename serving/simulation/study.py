"""The robustness study: every policy on workloads whose declarations are wrong, outdated or hostile.

Its many simulations run in parallel processes; each gives what it gives alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children, get_context
from signal import SIG_IGN, SIGINT, signal
from typing import Any, TypeVar

from .results import SimulationResult
from .simulator import SimulatedMachine, simulate
from .workload import Distribution, WorkloadConfig

Result = TypeVar("Result")


def available_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_parallel(
    tasks: Sequence[Callable[[], Result]], jobs: int = 1, ended: Callable[[], None] = lambda: None
) -> list[Result]:
    """The tasks' results in their order. The first exception, or an interrupt, ends the other tasks and is raised.

    Args:
        tasks: picklable if there are several jobs, e.g. `functools.partial(simulate, machine, workload, policy)`.
        jobs: processes; 1: this one.
        ended: called in this process whenever a task has ended.
    """
    if min(jobs, len(tasks)) <= 1:
        results = []
        for task in tasks:
            results.append(task())
            ended()
        return results
    others = set(active_children())
    # The terminal interrupts the whole group: only this process says so, and ends the others in the middle of a task.
    ignore = partial(signal, SIGINT, SIG_IGN)
    with ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn"), ignore) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                ended()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - others:
                process.terminate()
            raise
    return [future.result() for future in futures]


@dataclass(frozen=True)
class StudyQuestion:
    """A property of the workload that is varied; `values`: by label, the replaced fields of `WorkloadConfig`."""

    name: str
    values: Mapping[str, Mapping[str, Any]]


def questions_for(workload: WorkloadConfig, many: Sequence[int] = (64, 250, 1000)) -> list[StudyQuestion]:
    """The study's questions about a workload; `many`: numbers of workflows to try."""
    tool = workload.tool_s.mean or 2.0
    tails = {
        "constant": Distribution(tool),
        "exponential": Distribution(tool, "exponential"),
        "Pareto 1.5": Distribution(tool, "pareto", 1.5),
        "Pareto 1.1": Distribution(tool, "pareto", 1.1),
    }
    return [
        StudyQuestion(
            "mispredicted next agents", {f"{p:.0%}": {"mispredicted": p} for p in (0.0, 0.25, 0.5, 0.75, 1.0)}
        ),
        StudyQuestion("noise of durations (σ of the log)", {f"{s:g}": {"noise": s} for s in (0.0, 0.5, 1.0, 2.0)}),
        StudyQuestion("agents replaced per call", {f"{p:.0%}": {"changes": p} for p in (0.0, 0.05, 0.2)}),
        StudyQuestion("tail of tool times", {name: {"tool_s": spread} for name, spread in tails.items()}),
        StudyQuestion("workflows", {str(n): {"workflows": n, "rounds": min(2, workload.rounds)} for n in many}),
        StudyQuestion("clients that mark all urgent", {str(n): {"adversaries": n} for n in (0, 1, 4)}),
    ]


@dataclass(frozen=True)
class StudyPoint:
    """One policy at one value of a question; means over the seeds, of honest clients' calls.

    Attributes:
        ratio: mean seconds of a call under the baseline, divided by those under the policy.
        worst: the smallest of these ratios over the seeds.
        makespan_ratio: the same of makespans.
        results: by seed.
        tolerance: share by which no policy should be slower than the baseline.
    """

    question: str
    value: str
    policy: str
    ratio: float
    worst: float
    makespan_ratio: float
    ttft_p99_s: float
    results: tuple[SimulationResult, ...]
    tolerance: float = 0.03

    @property
    def harmed(self) -> bool:
        """Whether it is slower than the baseline by more than `tolerance`."""
        return self.ratio < 1 - self.tolerance


def run_study(
    machine: SimulatedMachine, workload: WorkloadConfig, questions: Sequence[StudyQuestion], policies: Sequence[str],
    baseline: str, seeds: Sequence[int], jobs: int = 1, ended: Callable[[], None] = lambda: None,
) -> list[StudyPoint]:  # fmt: skip
    """Runs all policies at all values of all questions; at each value the baseline comes first. See `run_parallel`."""
    order = tuple(dict.fromkeys((baseline, *policies)))
    varied = [(each.name, value, changes) for each in questions for value, changes in each.values.items()]
    settings = [(name, value, replace(workload, **changes)) for name, value, changes in varied]
    runs = [(setting, policy, seed) for _, _, setting in settings for policy in order for seed in seeds]
    tasks = [partial(simulate, machine, *run) for run in runs]
    results = iter(run_parallel(tasks, jobs, ended))
    points = []
    for question, value, _ in settings:
        by_policy = {policy: tuple(next(results) for _ in seeds) for policy in order}
        points += [_point(question, value, policy, by_policy[baseline], by_policy[policy]) for policy in order]
    return points


def _point(
    question: str, value: str, policy: str, base: Sequence[SimulationResult], results: tuple[SimulationResult, ...]
) -> StudyPoint:
    ratios = [one.call_s / other.call_s for one, other in zip(base, results, strict=True)]
    makespans = [one.makespan_s / other.makespan_s for one, other in zip(base, results, strict=True)]
    return StudyPoint(
        question, value, policy, ratio=sum(ratios) / len(ratios), worst=min(ratios),
        makespan_ratio=sum(makespans) / len(makespans),
        ttft_p99_s=sum(each.ttft_p99_s for each in results) / len(results), results=results,
    )  # fmt: skip
