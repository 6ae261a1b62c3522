"""Fixed prompts are loaded before their agents are called: in time, within budgets, and not at others' cost."""

from __future__ import annotations

import math

import pytest

from tenure.serving import (
    FinishReason,
    Hint,
    LinearCosts,
    PrefetchConfig,
    Tier,
    VirtualTransfer,
)
from tenure.serving.hints import ActionKind, HintAction

AGENTS = list("abcdef")


def warm(driver, prompt_of, agents=AGENTS, length=20):
    """Every agent's fixed prompt is in the host's memory, and none on the device."""
    for agent in agents:
        driver.serve(f"warm {agent}", prompt_of(agent, length), agent=agent, fixed_tokens=length)
    driver.send_down()


def call(driver, prompt_of, agent, number, new=4, length=20):
    prompt = [*prompt_of(agent, length), 9000 + number, 1]
    return driver.serve(f"{agent}{number}", prompt, new, workflow="ring", agent=agent, fixed_tokens=length)


@pytest.mark.parametrize("name", ["lru_prefetch", "ste_prefetch", "expected_time"])
def test_the_next_agents_prompt_is_on_the_device_when_it_is_called(make_driver, ring, prompt_of, name):
    driver = make_driver(name, device=90)
    warm(driver, prompt_of)
    ring(driver, AGENTS)
    calls = [call(driver, prompt_of, AGENTS[n % 6], n) for n in range(18)]
    assert calls[0].loaded_tokens in (0, 20)
    assert all(each.loaded_tokens == 0 and each.cached_tokens == 20 for each in calls[2:]), "all prefetched"
    statistics = driver.system.prefetcher.statistics
    assert statistics.used >= 8 and statistics.bytes == 20 * statistics.started
    assert driver.system.scheduler.metrics.stalled_s <= 0.05


def test_without_prefetch_every_call_loads(make_driver, ring, prompt_of):
    driver = make_driver("lru_reactive", device=90)
    warm(driver, prompt_of)
    ring(driver, AGENTS)
    assert all(call(driver, prompt_of, AGENTS[n % 6], n).loaded_tokens == 20 for n in range(12))


def test_a_branch_has_all_its_candidates_prefetched(make_driver, prompt_of):
    from tenure.serving import AgentSpec, EdgeSpec, WorkflowSpec

    driver = make_driver("ste_prefetch", device=90)
    warm(driver, prompt_of, AGENTS[:4])
    edges = [EdgeSpec("a", "b", 0.5), EdgeSpec("a", "c", 0.5), EdgeSpec("b", "d"), EdgeSpec("c", "d")]
    driver.system.graph.add_workflow(WorkflowSpec("ring", [AgentSpec(a) for a in "abcd"], edges, ["a"]))
    driver.submit("r", [*prompt_of("a"), 5], 5, workflow="ring", agent="a", fixed_tokens=20)
    driver.run()
    assert [driver.cached(prompt_of(agent)) for agent in "abc"] == [20, 20, 20]


def test_it_spares_what_ranks_higher(make_driver, ring, prompt_of):
    """Room for two: of the agents at 0, 1 and 2 steps, the farthest does not take the room of the nearer."""
    driver = make_driver("ste_prefetch", device=46, prefetch_config=PrefetchConfig(max_device_fraction=0.9))
    warm(driver, prompt_of)
    ring(driver, AGENTS)
    driver.step()
    for _ in range(20):
        driver.clock.advance_to(driver.clock() + 1)
        driver.begin()
    assert [driver.cached(prompt_of(agent)) for agent in "abc"] == [20, 20, 0]
    assert driver.system.prefetcher.statistics.no_room >= 1


class Plan:
    """A driver whose plan says that an agent is `steps` away, by KVFlow's hint."""

    def __init__(self, driver) -> None:
        self.driver, self.counter = driver, 0

    def __call__(self, **steps: float) -> None:
        self.counter += 1
        self.driver.scheduler.hint(Hint("kvflow", steps=steps, sequence=self.counter))
        assert self.driver.begin() is None


def test_a_changed_plan_cancels_loads_in_flight(make_driver, prompt_of):
    driver = make_driver("ste_prefetch", device=90, link=10.0, costs=LinearCosts(5.0, (10.0, 0.0)))
    warm(driver, prompt_of)
    plan = Plan(driver)
    plan(a=1)
    assert driver.system.prefetcher.statistics.started == 1 and driver.system.tiers.transfers.jobs
    plan(a=20)
    assert driver.system.prefetcher.statistics.cancelled == 1
    driver.clock.advance_to(driver.clock() + 100)
    driver.begin()
    assert driver.cached(prompt_of("a")) == 0 and driver.system.tiers.statistics.copies_cancelled == 1


def test_a_prompt_that_cannot_arrive_in_time_is_computed(make_driver, prompt_of):
    """Loading takes 20 s; the call is a second away and computing would take 4 s."""
    driver = make_driver("ste_prefetch", device=90, link=1.0, costs=LinearCosts(5.0, (1.0, 0.0)))
    warm(driver, prompt_of)
    Plan(driver)(a=1)
    statistics = driver.system.prefetcher.statistics
    assert (statistics.started, statistics.too_late) == (0, 1)
    ended = driver.serve("r", [*prompt_of("a"), 5], agent="a", fixed_tokens=20)
    assert ended.recomputed_tokens == 20 and driver.scheduler.metrics.recomputed_late == 1


def test_a_late_load_is_started_if_computing_is_slower(make_driver, prompt_of):
    driver = make_driver("ste_prefetch", device=90, link=1.0, costs=LinearCosts(0.1, (1.0, 0.0)))
    warm(driver, prompt_of)
    Plan(driver)(a=1)
    assert driver.system.prefetcher.statistics.started == 1


def test_a_request_joins_the_load_in_flight(make_driver, prompt_of):
    driver = make_driver("ste_prefetch", device=90, link=20.0, costs=LinearCosts(5.0, (20.0, 0.0)))
    warm(driver, prompt_of)
    Plan(driver)(a=1)
    driver.clock.advance_to(driver.clock() + 0.6)
    ended = driver.serve("r", [*prompt_of("a"), 5], agent="a", fixed_tokens=20)
    assert ended.loaded_tokens == 20 and ended.stalled_s == pytest.approx(0.4)
    moved = driver.system.tiers.statistics.bytes_moved[Tier.HOST, Tier.DEVICE]
    assert moved == 20, "it is not copied twice"


def test_a_demand_displaces_a_prefetch_which_is_restarted(make_driver, prompt_of):
    driver = make_driver("ste_prefetch", device=50, link=10.0, costs=LinearCosts(2.0, (10.0, 0.0)))
    warm(driver, prompt_of)
    Plan(driver)(a=1)
    ended = driver.serve("r", [*prompt_of("b"), 5], 20, agent="b", fixed_tokens=20)
    assert ended.finish_reason is FinishReason.ANSWERED and ended.stalled_s < 4
    statistics = driver.system.prefetcher.statistics
    assert statistics.displaced == 1
    for _ in range(30):
        driver.clock.advance_to(driver.clock() + 1)
        driver.begin()
    assert statistics.arrived == 1 and driver.cached(prompt_of("a")) == 20


@pytest.mark.parametrize(
    ("limits", "begun"),
    [
        ({"max_in_flight": 2}, 2),
        ({"max_device_fraction": 0.5}, 2),
        ({"max_device_fraction": 0.25, "max_in_flight": 9}, 1),
        ({"max_link_s": 3.0, "max_in_flight": 9, "max_device_fraction": 0.9}, 1),
        ({"max_link_s": 4.0, "max_in_flight": 9, "max_device_fraction": 0.9}, 2),
        ({"max_in_flight": 9, "max_device_fraction": 0.9}, 4),
        ({"max_in_flight": 9, "max_device_fraction": 0.1}, 0),
    ],
)
def test_budgets(make_driver, prompt_of, limits, begun):
    driver = make_driver("ste_prefetch", device=90, link=10.0, costs=LinearCosts(0.1, (10.0, 0.0)),
                         prefetch_config=PrefetchConfig(**{"max_link_s": 100.0, **limits}))  # fmt: skip
    warm(driver, prompt_of)
    Plan(driver)(a=1, b=1, c=2, d=2, e=7)
    assert driver.system.prefetcher.statistics.started == begun
    assert driver.system.prefetcher.statistics.over_budget == (4 if begun == 0 else 0)


def test_the_nearest_is_first_and_waiting_requests_age(make_driver, prompt_of):
    driver = make_driver("ste_prefetch", device=500, link=10.0, costs=LinearCosts(0.1, (10.0, 0.0)),
                         prefetch_config=PrefetchConfig(max_in_flight=1))  # fmt: skip
    warm(driver, prompt_of)
    plan = Plan(driver)
    plan(a=1)
    plan(b=2)  # has to wait for a
    arrived = []
    for number in range(12):
        driver.clock.advance_to(driver.clock() + 1)
        plan(**{"cd"[number % 2]: 1.0})  # always somebody nearer
        arrived = [agent for agent in AGENTS if driver.cached(prompt_of(agent)) and agent not in arrived] + arrived
    assert (arrived[-1] == "a" and arrived[-2] == "b") or arrived.index("b") > 0, arrived
    assert driver.cached(prompt_of("b")) == 20, "nothing starves"


def test_a_client_has_its_quota_of_the_budget(make_driver, prompt_of):
    budgets = PrefetchConfig(max_in_flight=9, max_device_fraction=0.4, max_link_s=100.0)
    costs = LinearCosts(0.1, (10.0, 0.0))
    driver = make_driver("ste_prefetch", device=200, link=10.0, costs=costs, prefetch_config=budgets)
    warm(driver, prompt_of)
    for client, agents in (("greedy", "abcde"), ("modest", "f")):
        steps = dict.fromkeys(agents, 1.0 if client == "greedy" else 2.0)
        driver.scheduler.hint(Hint("kvflow", client=client, steps=steps))
    driver.begin()
    prefetches = driver.system.prefetcher._in_flight
    assert sorted(each.client for each in prefetches) == ["greedy", "greedy", "modest"], "half of 80 bytes each"
    while (due := driver.scheduler.next_time()) is not None:
        driver.clock.advance_to(due)
        driver.begin()
        assert sum(each.client == "greedy" for each in prefetches) <= 2
    assert sum(driver.cached(prompt_of(agent)) for agent in "abcdef") == 120, "deferred requests follow"


def test_a_prompt_that_was_evicted_before_its_call_was_not_used(make_driver, prompt_of):
    driver = make_driver("lru_prefetch", device=90)
    warm(driver, prompt_of)
    plan = Plan(driver)
    for evicted in (False, True):
        plan(a=1)
        driver.clock.advance_to(driver.clock() + 1)
        driver.begin()
        assert driver.cached(prompt_of("a")) == 20
        if evicted:
            driver.send_down()
        driver.serve(f"call{evicted}", [*prompt_of("a"), 5], agent="a", fixed_tokens=20)
        assert driver.system.prefetcher.statistics.used == 1
        driver.send_down()


def test_a_registered_prompt_needs_no_request(make_driver, prompt_of):
    driver = make_driver("lru_prefetch", device=90)
    driver.serve("r", prompt_of("a"))  # nobody's
    driver.send_down()
    driver.system.prefetcher.register("a", prompt_of("a"))
    Plan(driver)(a=1)
    driver.clock.advance_to(driver.clock() + 1)
    driver.begin()
    assert driver.cached(prompt_of("a")) == 20
    with pytest.raises(ValueError, match="accepted: 0 to"):
        driver.system.prefetcher.register("b", [-1, 5])


def test_a_hint_to_fetch_lasts_for_its_time(make_driver, prompt_of):
    driver = make_driver("expected_time", device=90)
    warm(driver, prompt_of)
    driver.scheduler.hint(Hint("vllm", actions=(HintAction(ActionKind.FETCH, "a", ttl_s=5.0),)))
    driver.begin()
    driver.clock.advance_to(driver.clock() + 1)
    driver.begin()
    assert driver.cached(prompt_of("a")) == 20
    assert driver.system.predictor.reuse("a") == 0.5
    driver.clock.advance_to(driver.clock() + 5)
    assert driver.system.predictor.reuse("a") == 0.0


def test_an_agent_comes_into_sight_with_time_alone(make_driver, ring, prompt_of):
    driver = make_driver("expected_time", device=90, prefetch_config=PrefetchConfig(look_ahead_s=5.0))
    warm(driver, prompt_of, AGENTS[:2])
    ring(driver, ["a", "b"], call_s=60.0)
    call(driver, prompt_of, "a", 0)
    driver.send_down()
    graph = driver.system.graph["ring"]
    graph.finish("a") if graph.running else None
    graph.start("b", "slow")  # will take a minute
    driver.begin()
    assert driver.cached(prompt_of("a")) == 0, "not yet in sight"
    begun = driver.clock()
    while driver.cached(prompt_of("a")) == 0:
        due = driver.scheduler.next_time()
        assert due is not None and driver.clock() < due < begun + 70
        driver.clock.advance_to(due)
        driver.begin()
    assert begun + 50 < driver.clock() < begun + 60


def test_an_agent_out_of_sight_by_a_rounding_error_does_not_stop_the_clock(make_driver, prompt_of):
    """Expected seconds stand still between two readings of the graph, so a look at the same time would be the same."""
    from tenure.serving import AgentSpec, EdgeSpec, WorkflowSpec

    driver = make_driver("expected_time", device=90, prefetch_config=PrefetchConfig(look_ahead_s=3.0))
    warm(driver, prompt_of, ["a", "b"])
    agents = [AgentSpec("a", call_s=3.0 + 1e-7, call_spread_s=0.0), AgentSpec("b")]
    driver.system.graph.add_workflow(WorkflowSpec("ring", agents, [EdgeSpec("a", "b")]))
    driver.system.graph["ring"].start("a")
    assert 3.0 < driver.system.graph.seconds("b") < 3.000001
    prefetcher = driver.system.prefetcher
    prefetcher.values_changed(["b"])
    due = prefetcher.next_time()
    assert due is None or due > driver.clock() + 0.01
    driver.begin()
    driver.clock.advance_to(driver.clock() + 1)
    driver.begin()
    assert driver.cached(prompt_of("b")) == 20


class Failing(VirtualTransfer):
    def copy_layer(self, job):
        if job.target is Tier.DEVICE:
            raise RuntimeError("bus error")
        super().copy_layer(job)


def test_failed_prefetches_wait_for_a_new_prediction(make_driver, prompt_of):
    driver = make_driver("ste_prefetch", device=90, copies=Failing)
    warm(driver, prompt_of)
    plan = Plan(driver)
    plan(a=1)
    for _ in range(10):
        driver.clock.advance_to(driver.clock() + 1)
        driver.begin()
    assert driver.system.prefetcher.statistics.failed == driver.system.prefetcher.statistics.started == 2
    plan(a=1)
    assert driver.system.prefetcher.statistics.started == 3


def test_an_unlikely_call_is_prefetched_only_when_it_is_near(make_driver, prompt_of):
    from tenure.serving import AgentSpec, EdgeSpec, WorkflowSpec

    driver = make_driver("expected_time", device=90, prefetch_config=PrefetchConfig(min_reuse=0.5))
    warm(driver, prompt_of, ["a", "b", "c"])
    agents = [AgentSpec("a", call_s=10.0, call_spread_s=0.0), AgentSpec("b"), AgentSpec("c")]
    edges = [EdgeSpec("a", "b", 0.8), EdgeSpec("a", "c", 0.2)]
    graph = driver.system.graph
    graph.add_workflow(WorkflowSpec("w", agents, edges))
    graph["w"].start("a")
    driver.begin()
    begun = driver.clock()
    due = driver.system.prefetcher.next_time()
    assert due == pytest.approx(begun + 10.0 - math.log(0.8 / 0.5) / graph.rate)
    driver.clock.advance_to(due)
    driver.begin()
    driver.clock.advance_to(due + 1)
    driver.begin()
    assert driver.cached(prompt_of("b")) == 20 and driver.cached(prompt_of("c")) == 0
    driver.clock.advance_to(begun + 20)
    driver.begin()
    assert driver.system.prefetcher.next_time() is None and driver.cached(prompt_of("c")) == 0


def test_limits_are_checked():
    with pytest.raises(ValueError, match="got 0 as max_device_fraction; accepted: a number above 0"):
        PrefetchConfig(max_device_fraction=0)
    with pytest.raises(ValueError, match="got 2 as min_reuse; accepted: a number above 0 and up to 1"):
        PrefetchConfig(min_reuse=2)
