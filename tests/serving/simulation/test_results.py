"""Numbers of a run, ratios of a study, and what the driver refuses to hide."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tenure.serving import System
from tenure.serving.simulation.request_source import ClientRequests, SimulatedRequest, WarmUpRequests
from tenure.serving.simulation.results import TransferSnapshot, quantile, result_of, row_of
from tenure.serving.simulation.simulator import Simulator, declared_answer_s, simulate
from tenure.serving.simulation.study import StudyQuestion, run_study
from tenure.serving.simulation.workload import Distribution, clients_of


def test_quantiles_are_values_that_occurred() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [quantile(values, share) for share in (0.0, 0.2, 0.5, 0.99, 1.0)] == [1.0, 1.0, 3.0, 5.0, 5.0]
    assert quantile(list(map(float, range(1, 201))), 0.99) == 198.0
    assert quantile([], 0.5) == 0.0


def test_hostile_calls_are_in_the_run_and_not_in_its_numbers(small) -> None:
    machine = small.machine(6, running=8)
    workload = small.workload(workflows=1, agents=3, rounds=3, adversaries=1)
    system, clock = machine.build("lru_reactive")
    clients = clients_of(workload, 0)
    before = TransferSnapshot.take(Simulator(machine, system, clock).run(WarmUpRequests(clients)).system)
    run = Simulator(machine, system, clock).run(ClientRequests(clients, declared_answer_s(machine)))
    honest, everybody = result_of(run, before), result_of(run, before, honest=False)
    assert (honest.calls, everybody.calls) == (9, 18) and len(run.outputs) == 18
    own = [ended.times for ended in run.outputs if ended.request.client == "honest"]
    ends = [times.finished or 0.0 for times in own]
    assert honest.makespan_s == max(ends) - run.begin_s
    assert honest.call_s == pytest.approx((sum(ends) - sum(times.arrived for times in own)) / 9)
    assert honest.events == everybody.events == run.events


def test_what_is_wasted_is_what_nobody_used(small) -> None:
    """With a graph that is always wrong, most of what a prefetch brings is for nothing; with a true one, nothing."""
    machine = small.machine(4)
    true = simulate(machine, small.workload(), "ste_prefetch")
    wrong = simulate(machine, small.workload(mispredicted=1.0), "ste_prefetch")
    assert wrong.bytes_wasted > 0.3 * wrong.bytes_moved > 0
    assert true.bytes_wasted < 0.05 * true.bytes_moved
    reactive = simulate(machine, small.workload(mispredicted=1.0), "lru_reactive")
    assert reactive.bytes_wasted == 0.0


def test_a_row_has_means_over_the_seeds(small) -> None:
    workload = small.workload(rounds=2, tool_s=Distribution(0.2, "exponential"))
    outcomes = [simulate(small.machine(3), workload, "ste", seed) for seed in (0, 1)]
    row = row_of("here", "ste", outcomes, 1.25, 2.0)
    assert row.makespan_s == pytest.approx((outcomes[0].makespan_s + outcomes[1].makespan_s) / 2)
    assert (row.name, row.policy, row.ratio, row.paper_ratio) == ("here", "ste", 1.25, 2.0)
    assert row.bytes_moved == sum(outcome.bytes_moved for outcome in outcomes) / 2


def test_a_study_compares_seed_by_seed_and_names_who_is_harmed(small) -> None:
    workload = small.workload(agents=5, rounds=3)
    question = StudyQuestion("room", {"as it is": {}, "half as long": {"rounds": 2}})
    machine = small.machine(3, bytes_per_s=4e6)
    points = run_study(machine, workload, [question], ("ste_prefetch", "lru"), "lru_reactive", (0, 1))
    assert [(point.value, point.policy) for point in points[:3]] == [
        ("as it is", "lru_reactive"), ("as it is", "ste_prefetch"), ("as it is", "lru"),
    ]  # fmt: skip
    base, ours, alone = points[:3]
    ratios = [one.call_s / other.call_s for one, other in zip(base.results, ours.results, strict=True)]
    assert ours.ratio == pytest.approx(sum(ratios) / 2) and ours.worst == min(ratios)
    assert not base.harmed and not ours.harmed and alone.harmed, "computing every prompt anew is slower than loading"
    assert replace(ours, ratio=0.97).harmed is False and replace(ours, ratio=0.969).harmed is True
    assert points[3].results[0].calls == 10 and points[0].results[0].calls == 15


class Withdrawn(WarmUpRequests):
    """Who asks and cancels at once."""

    def begin(self, system: System) -> list[tuple[float, SimulatedRequest]]:
        ((_, ask),) = super().begin(system)
        system.scheduler.cancel(system.scheduler.submit(ask.request))
        return []


def test_a_request_that_is_not_answered_is_an_error_and_no_number(small) -> None:
    machine = small.machine(4)
    system, clock = machine.build("lru")
    with pytest.raises(RuntimeError, match="'warm/workflow0/agent0' ended as cancelled: the request was cancelled"):
        Simulator(machine, system, clock).run(Withdrawn(clients_of(small.workload(agents=2), 0)))
