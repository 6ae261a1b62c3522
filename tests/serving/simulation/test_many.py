"""Many simulations at once give what each of them gives alone."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import pytest

from tenure.serving.simulation.simulator import simulate
from tenure.serving.simulation.study import available_cores, run_parallel


def test_results_come_in_the_order_of_the_tasks_from_other_processes(small) -> None:
    workload = small.workload(agents=4, rounds=2)
    tasks = [
        partial(simulate, small.machine(2), workload, policy, seed)
        for policy in ("lru_reactive", "expected_time")
        for seed in (0, 1)
    ]
    ended: list[None] = []
    alone = [replace(each, cpu_s=0.0) for each in run_parallel(tasks)]
    together = [replace(each, cpu_s=0.0) for each in run_parallel(tasks, 2, lambda: ended.append(None))]
    assert together == alone and len(ended) == 4
    assert len({outcome.makespan_s for outcome in alone}) > 1
    assert os.getpid() not in run_parallel([os.getpid, os.getpid], 2)
    assert run_parallel([os.getpid], 2) == run_parallel([os.getpid]) == [os.getpid()], "one task needs no other process"
    assert run_parallel([], 2) == [] and available_cores() >= 1


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_first_that_raises_ends_them_all(jobs: int, small) -> None:
    tasks = [partial(simulate, small.machine(2), small.workload(), "best"), *[partial(int, "1")] * 50]
    with pytest.raises(ValueError, match="unknown system 'best'"):
        run_parallel(tasks, jobs)
