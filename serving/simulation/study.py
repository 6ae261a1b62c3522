"""Many simulations at once: each is one process's own, and gives what it gives alone.

The robustness study: what becomes of each policy when what the server is told is wrong, late, or meant to harm.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

from .driver import Machine
from .simulator import Outcome, simulate
from .workload import Spread, Workload

Result = TypeVar("Result")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    tasks: Sequence[Callable[[], Result]], jobs: int = 1, ended: Callable[[], None] = lambda: None
) -> list[Result]:
    """What the tasks return, in their order; the first one that raises ends them all.

    Args:
        tasks: can be pickled if there are several jobs, as `functools.partial(simulate, machine, workload, policy)`.
        jobs: processes; 1: this one.
        ended: called whenever a task has ended.
    """
    if min(jobs, len(tasks)) <= 1:
        results = []
        for task in tasks:
            results.append(task())
            ended()
        return results
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                ended()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


TOLERANCE = 0.03  # by which no policy should be slower than the baseline


@dataclass(frozen=True)
class Question:
    """What is varied, and the values, each by its label and the fields of the workload that it changes."""

    name: str
    values: Mapping[str, Mapping[str, Any]]


def questions_for(workload: Workload, many: Sequence[int] = (64, 250, 1000)) -> list[Question]:
    """The study's questions about a workload.

    Args:
        many: numbers of workflows.
    """
    tool = workload.tool_s.mean or 2.0
    tails = {
        "constant": Spread(tool),
        "exponential": Spread(tool, "exponential"),
        "Pareto 1.5": Spread(tool, "pareto", 1.5),
        "Pareto 1.1": Spread(tool, "pareto", 1.1),
    }
    return [
        Question("mispredicted next agents", {f"{p:.0%}": {"mispredicted": p} for p in (0.0, 0.25, 0.5, 0.75, 1.0)}),
        Question("noise of durations (σ of the log)", {f"{s:g}": {"noise": s} for s in (0.0, 0.5, 1.0, 2.0)}),
        Question("agents replaced per call", {f"{p:.0%}": {"changes": p} for p in (0.0, 0.05, 0.2)}),
        Question("tail of tool times", {name: {"tool_s": spread} for name, spread in tails.items()}),
        Question("workflows", {str(n): {"workflows": n, "rounds": min(2, workload.rounds)} for n in many}),
        Question("clients that mark all urgent", {str(n): {"adversaries": n} for n in (0, 1, 4)}),
    ]


@dataclass(frozen=True)
class Point:
    """One policy at one value of a question, means over the seeds.

    Attributes:
        ratio: mean time of a call under the baseline over that under the policy, both of honest clients.
        worst: the least of these ratios over the seeds.
    """

    question: str
    value: str
    policy: str
    ratio: float
    worst: float
    makespan_ratio: float
    ttft_p99_s: float
    outcomes: tuple[Outcome, ...]

    @property
    def harmed(self) -> bool:
        """It is slower than the baseline by more than `TOLERANCE`."""
        return self.ratio < 1 - TOLERANCE


def run_study(
    machine: Machine,
    workload: Workload,
    questions: Sequence[Question],
    policies: Sequence[str],
    baseline: str,
    seeds: Sequence[int],
    jobs: int = 1,
    ended: Callable[[], None] = lambda: None,
) -> list[Point]:
    """All policies at all values, the baseline first.

    Args:
        jobs, ended: see `run_all`.
    """
    order = tuple(dict.fromkeys((baseline, *policies)))
    settings = [
        (question.name, value, replace(workload, **changes))
        for question in questions
        for value, changes in question.values.items()
    ]
    tasks = [
        partial(simulate, machine, varied, policy, seed)
        for _, _, varied in settings
        for policy in order
        for seed in seeds
    ]
    outcomes = iter(run_all(tasks, jobs, ended))
    points = []
    for question, value, _ in settings:
        by_policy = {policy: tuple(next(outcomes) for _ in seeds) for policy in order}
        points += [_point(question, value, policy, by_policy[baseline], by_policy[policy]) for policy in order]
    return points


def _point(question: str, value: str, policy: str, base: Sequence[Outcome], outcomes: tuple[Outcome, ...]) -> Point:
    ratios = [one.call_s / other.call_s for one, other in zip(base, outcomes, strict=True)]
    makespans = [one.makespan_s / other.makespan_s for one, other in zip(base, outcomes, strict=True)]
    return Point(
        question,
        value,
        policy,
        ratio=sum(ratios) / len(ratios),
        worst=min(ratios),
        makespan_ratio=sum(makespans) / len(makespans),
        ttft_p99_s=sum(each.ttft_p99_s for each in outcomes) / len(outcomes),
        outcomes=outcomes,
    )
