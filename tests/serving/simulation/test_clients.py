"""Generated workflows: what is drawn, what is declared, and what really happens."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tenure.serving.simulation.workload import Distribution, WorkflowClient, WorkloadConfig


def run(client: WorkflowClient) -> list[str]:
    """The agents in the order of their calls, each answered before the next one that was asked later."""
    waiting, called = [client.first_call()], []
    while waiting:
        call = waiting.pop(0)
        called.append(call.agent)
        following = client.following(call.agent)
        client.change(call.agent, following)
        waiting += following
    assert client.open == 0
    return called


@pytest.mark.parametrize(
    ("kind", "shape"), [("constant", 0), ("uniform", 0.5), ("exponential", 0), ("lognormal", 0.5), ("pareto", 3.0)]
)
def test_spreads_have_their_means(kind: Any, shape: float) -> None:
    draws = random.Random(0)
    values = [Distribution(7.0, kind, shape).sample(draws) for _ in range(40_000)]
    assert statistics.fmean(values) == pytest.approx(7.0, rel=0.03)
    assert min(values) >= 0


def test_a_ring_goes_round() -> None:
    client = WorkflowClient(WorkloadConfig(agents=4, rounds=3), 0, 0)
    names = [f"workflow0/agent{n}" for n in range(4)]
    assert run(client) == names * 3
    spec = client.spec(1.5)
    assert [(edge.source, edge.target) for edge in spec.edges] == list(zip(names, [*names[1:], names[0]], strict=True))
    assert spec.start == names[:1] and spec.agents[0].call_s == 1.5


def test_branches_exclude_each_other() -> None:
    called = run(WorkflowClient(WorkloadConfig(agents=6, branches=2, rounds=200), 0, 0))
    assert len(called) == 600
    assert all({"01": 0, "23": 1, "45": 2}["".join(p for p in ("01", "23", "45") if name[-1] in p)] == at % 3
               for at, name in enumerate(called))  # fmt: skip
    assert 60 < sum(name.endswith("agent2") for name in called) < 140


def test_peer_reviews_and_sends_back() -> None:
    called = run(WorkflowClient(WorkloadConfig("peer", agents=4, rounds=200), 0, 0))
    names = [name.rpartition("/")[2] for name in called]
    assert names[:4] == ["plan", "execute", "express", "review"] and len(called) >= 800
    after = [other for name, other in pairwise(names) if name == "review"]
    assert set(after) == {"plan", "execute"} and 0.2 < after.count("execute") / len(after) < 0.4
    with pytest.raises(ValueError, match="got 5 agents and 1 branches; accepted: peer has 4 and 1"):
        WorkloadConfig("peer", agents=5)


@pytest.mark.parametrize(
    ("shape", "alike"),
    [("ring", [(0, 1), (2, 3)]), ("branching", [(1, 2), (3, 4)]), ("fan", [(1, 2), (2, 3)])],
)
def test_agents_of_a_stage_share_the_beginning_of_their_prompts(shape: Any, alike: list[tuple[int, int]]) -> None:
    workload = WorkloadConfig(
        shape, agents=6, branches=1 if shape == "fan" else 2, shared_prefix=0.25, fixed_tokens=Distribution(40)
    )
    client, other = WorkflowClient(workload, 0, 0), WorkflowClient(workload, 0, 1)
    prompts = [client.fixed_prompt(f"workflow0/agent{number}") for number in range(6)]
    for one, two in alike:
        assert (prompts[one][:10] == prompts[two][:10]).all() and prompts[one][10] != prompts[two][10]
    assert prompts[0][0] != prompts[5][0], "other stages do not"
    place = alike[0][1]
    assert (prompts[place][:10] != other.fixed_prompt(f"workflow1/agent{place}")[:10]).any(), "nor other workflows"
    plain = WorkflowClient(replace(workload, shared_prefix=0.0), 0, 0).fixed_prompt(f"workflow0/agent{place}")
    assert (plain[10:] == prompts[place][10:]).all(), "the rest is as without"


def test_a_fan_waits_for_all_workers() -> None:
    client = WorkflowClient(WorkloadConfig("fan", agents=5, rounds=2), 0, 0)
    called = [name.rpartition("agent")[2] for name in run(client)]
    assert called == ["0", "1", "2", "3", "4"] * 2
    spec = WorkflowClient(WorkloadConfig("fan", agents=5), 0, 0).spec(1.0)
    assert [agent.name for agent in spec.agents if agent.join == "and"] == ["workflow0/agent4"]


def test_branching_takes_likely_ways_more_often() -> None:
    called = run(WorkflowClient(WorkloadConfig("branching", agents=8, branches=3, rounds=100), 0, 0))
    first, last = (sum(name.endswith(f"agent{n}") for name in called) for n in (1, 3))
    assert first > 2 * last > 0


def test_prompts_are_an_agents_own_and_suffixes_fresh() -> None:
    own, other = (WorkflowClient(WorkloadConfig(agents=2, workflows=2), 0, number) for number in (0, 1))
    call, again = own.first_call(), own.following("workflow0/agent0")[0]
    assert call.prompt.dtype == np.int32 and len(call.prompt) == 4096 + 32
    assert not np.array_equal(call.prompt[:4096], again.prompt[:4096])
    assert not np.array_equal(call.prompt[:4096], other.first_call().prompt[:4096])
    third = own.following("workflow0/agent1")[0]
    assert np.array_equal(call.prompt[:4096], third.prompt[:4096])
    assert not np.array_equal(call.prompt[4096:], third.prompt[4096:])
    shared = [WorkflowClient(WorkloadConfig(agents=2, shared=True), 0, number).first_call() for number in (0, 1)]
    assert shared[0].agent == shared[1].agent == "agent0"
    assert np.array_equal(shared[0].prompt[:4096], shared[1].prompt[:4096])


def test_mispredictions_and_changes_come_as_often_as_asked() -> None:
    client = WorkflowClient(WorkloadConfig(agents=5, rounds=400, mispredicted=0.3, changes=0.1), 0, 0)
    wrong, names, call = 0, set(), client.first_call()
    changes = 0
    while True:
        names.add(call.agent)
        foretold = {edge.target for edge in client.edges(client._origins[call.agent])}
        following = client.following(call.agent)
        changes += client.change(call.agent, following) is not None
        if not following:
            break
        wrong += following[0].agent not in foretold
        call = following[0]
    assert wrong / 2000 == pytest.approx(0.3, abs=0.04)
    assert changes / 2000 == pytest.approx(0.1, abs=0.03)
    assert len(names) > 100


def test_hostile_clients_say_that_everybody_comes_next() -> None:
    client = WorkflowClient(WorkloadConfig(agents=3, shared=True), 0, 7, hostile=True)
    assert client.client == client.name == "hostile7"
    assert list(client.spec(1.0).start) == [f"hostile7/agent{n}" for n in range(3)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": "star"}, "got 'star' as shape; accepted: ring, branching, peer, fan"),
        ({"agents": 1}, "got 1 as agents; accepted: a whole number of 2 or more"),
        ({"mispredicted": 1.5}, "got 1.5 as mispredicted; accepted: a number from 0 to 1"),
        ({"branches": 3}, "10 agents and 3 branches"),
        ({"shape": "fan", "changes": 0.1}, "a fan accepts"),
        ({"shape": "branching", "agents": 3, "branches": 3}, "accepted: more than its branches"),
        ({"colour": 1}, "got unknown fields colour; accepted: shape, agents"),
        ({"tool_s": "long"}, "got 'long' for a distribution"),
        ({"tool_s": {"mean": 1, "kind": "pareto", "shape": 1}}, "above 1 .pareto."),
        ({"tool_s": {"mean": 1, "kind": "zipf"}}, "accepted: constant, uniform"),
    ],
)
def test_what_cannot_be_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorkloadConfig.read(values)
