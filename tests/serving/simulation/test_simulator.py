"""The simulator against what is known: ring hit rates, an oracle, conservation, determinism."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from tenure.serving import FinishReason, Tier, system_names
from tenure.serving.simulation.request_source import ClientRequests, WarmUpRequests
from tenure.serving.simulation.results import SimulationRun
from tenure.serving.simulation.simulator import Simulator, declared_answer_s, simulate
from tenure.serving.simulation.workload import Distribution, clients_of

POLICIES = system_names()


@pytest.mark.parametrize("room", [2, 5, 9])
def test_ring_of_equal_agents_hits_as_often_as_it_can(small, room: int) -> None:
    """KVFlow's order keeps (C - 1) of 9 prompts from one round to the next, LRU none; the oracle is no better."""
    machine, workload = small.machine(room), small.workload(rounds=20)
    assert simulate(machine, workload, "lru_reactive").hit_rate == 0.0
    by_steps = simulate(machine, workload, "ste").hit_rate
    assert by_steps == pytest.approx((room - 1) / 9, abs=0.025)
    oracle = simulate(machine, workload, "belady").hit_rate
    assert by_steps >= 0.95 * oracle


def test_a_cache_that_evicts_by_page_keeps_the_beginning_of_the_oldest_prompt(small) -> None:
    """A ring of three with room for two and a half: whole prompts never hit under LRU, half of the oldest one does."""
    machine, workload = small.machine(2.5), small.workload(agents=3, rounds=20)
    assert simulate(machine, workload, "lru").hit_rate == 0.0
    assert 0.2 < simulate(machine, workload, "vllm").hit_rate < 0.55
    assert simulate(machine, workload, "vllm").bytes_moved == 0


@pytest.mark.parametrize("agents", [4, 10])
def test_buckets_of_steps_equal_steps_within_their_range(small, agents: int) -> None:
    """In a ring of four all steps are within the buckets; in one of ten, prompts far away are evicted by age."""
    machine, workload = small.machine(2 if agents == 4 else 5), small.workload(agents=agents, rounds=20)
    exact, held = (simulate(machine, workload, name).hit_rate for name in ("ste_prefetch", "ste_holding"))
    assert held == exact if agents == 4 else held <= exact


def test_branches_that_share_a_prefix_hit_it(small) -> None:
    """The shared half is hit also where the other agent of the stage was called before."""
    plain = small.workload(agents=4, branches=2, rounds=40)
    apart, alike = (
        simulate(small.machine(2), replace(plain, shared_prefix=share), "lru").hit_rate for share in (0.0, 0.5)
    )
    assert alike > apart + 0.1


@pytest.mark.parametrize("policy", ["ste_prefetch", "expected_time", "lru_prefetch"])
def test_prefetch_hides_loads_that_are_shorter_than_calls(small, policy: str) -> None:
    """A load takes 64 ms and a call 97 ms: after the first call nothing waits."""
    machine, workload = small.machine(4), small.workload()
    reactive, ours = simulate(machine, workload, "lru_reactive"), simulate(machine, workload, policy)
    assert reactive.hit_rate == 0.0
    assert ours.hit_rate > 0.95
    assert ours.makespan_s < 0.7 * reactive.makespan_s


def test_all_policies_answer_the_same_calls(small) -> None:
    """Every request once, with all of its tokens, whatever the policy."""
    workload = small.workload(workflows=6, agents=4, rounds=3, tool_s=Distribution(0.05, "exponential"), noise=0.5)
    machine = small.machine(6, running=8)
    asked = {}
    for policy in POLICIES:
        if policy == "belady":
            continue
        run = finished(machine, workload, policy)
        assert all(ended.finish_reason is FinishReason.ANSWERED for ended in run.outputs)
        asked[policy] = {
            each.request.id: (each.request.agent, each.num_output_tokens, len(each.request.prompt))
            for each in run.outputs
        }
        per_workflow = [sum(name.startswith(f"workflow{n}/") for name in asked[policy]) for n in range(6)]
        assert per_workflow == [12] * 6
        assert all(
            produced == each.request.max_new_tokens
            for each, (_, produced, _) in zip(run.outputs, asked[policy].values(), strict=True)
        )
    agents = {policy: sorted(values.values()) for policy, values in asked.items()}
    assert all(values == agents["lru"] for values in agents.values())


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "belady"])
def test_nothing_is_lost_or_left(small, policy: str) -> None:
    """At the end no request, lease, reservation or copy is left, and every token was computed or cached."""
    run = finished(small.machine(3, running=4), small.workload(workflows=3, agents=4, rounds=3), policy)
    system = run.system
    system.scheduler.check()
    system.close()  # a prefetch may still be under way
    system.tiers.check()
    assert len(system.scheduler) == 0 and not system.tiers.handles
    pool = system.tiers.pools[Tier.DEVICE]
    assert pool.reserved == 0 and pool.used == pool.evictable
    metrics = system.scheduler.metrics
    assert metrics.submitted == sum(metrics.finished.values())
    new = sum(len(ended.request.prompt) - ended.cached_tokens for ended in run.outputs)
    assert metrics.prefill_tokens == new + small.fixed * 12  # the warm-up computed each of the 12 agents' prompts


def finished(machine, workload, policy: str) -> SimulationRun:
    system, clock = machine.build(policy)
    clients = clients_of(workload, 0)
    Simulator(machine, system, clock).run(WarmUpRequests(clients))
    return Simulator(machine, system, clock).run(ClientRequests(clients, declared_answer_s(machine)))


def test_times_add_up_for_one_workflow(small) -> None:
    """One request at a time: the makespan is the sum of what the cost model says, and of the tools' times."""
    machine, workload = small.machine(20), small.workload(rounds=2, tool_s=Distribution(0.25))
    outcome = simulate(machine, workload, "lru_reactive")
    call = (0.005 + 16e-3) + 15 * 0.005  # the suffix with the first token, then the others
    assert outcome.hit_rate == 1.0 and outcome.stall_s == 0.0
    assert outcome.call_s == pytest.approx(call)
    assert outcome.makespan_s == pytest.approx(20 * call + 19 * 0.25)


def test_hostile_clients_do_not_count_and_do_not_win(small) -> None:
    workload = small.workload(workflows=2, agents=5, rounds=6)
    machine = small.machine(6, running=8)
    alone = simulate(machine, workload, "ste_prefetch")
    beside = simulate(machine, replace(workload, adversaries=2), "ste_prefetch")
    assert alone.calls == beside.calls == 60
    assert beside.timed_out == 0 and beside.call_s > alone.call_s


def test_replaced_agents_are_computed_and_mispredictions_do_not_stop_a_workflow(small) -> None:
    machine = small.machine(20)
    steady = simulate(machine, small.workload(), "ste_prefetch")
    changing = simulate(machine, small.workload(changes=0.3), "ste_prefetch")
    assert steady.hit_rate == 1.0 and 0.5 < changing.hit_rate < 0.95
    wrong = simulate(machine, small.workload(mispredicted=1.0), "ste_prefetch")
    assert wrong.calls == steady.calls == 120


@pytest.mark.parametrize("policy", ["ste_prefetch", "expected_time", "lru_prefetch"])
def test_a_seed_gives_the_same_run_in_every_process(small, policy: str) -> None:
    """Names are hashed differently in every process, and nothing may depend on the order of a set."""
    code = (
        "from tenure.serving.simulation.cost_model import FittedCosts, Links\n"
        "from tenure.serving.simulation.simulator import SimulatedMachine, simulate\n"
        "from tenure.serving.simulation.workload import Distribution, WorkloadConfig\n"
        "links = Links(1e6)\n"
        "machine = SimulatedMachine(FittedCosts(.005, 1e-3, 0, 0, links), links, 400_000, 10**9, 0, 1000)\n"
        "workload = WorkloadConfig(branches=2, workflows=4, rounds=3, fixed_tokens=Distribution(64),\n"
        "    dynamic_tokens=Distribution(16), output_tokens=Distribution(16),\n"
        "    tool_s=Distribution(.2, 'pareto', 1.5), mispredicted=.3, changes=.1)\n"
        f"o = simulate(machine, workload, {policy!r}, 3)\n"
        "print(o.makespan_s, o.hit_rate, o.stall_s, o.bytes_moved, o.bytes_wasted, o.ttft_p99_s, o.events)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}, text=True,
            capture_output=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1


def test_another_seed_is_another_run(small) -> None:
    workload = small.workload(tool_s=Distribution(0.1, "exponential"), rounds=2)
    one, other = (simulate(small.machine(4), workload, "lru", seed) for seed in (0, 1))
    assert one.makespan_s != other.makespan_s
