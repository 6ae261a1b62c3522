"""Many simulations at once: each is one process's own, and gives what it gives alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

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
