"""Predictions from graphs, hints and queues together, and quotas of clients."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tenure.serving import (
    AgentSpec,
    EdgeSpec,
    FinishReason,
    Hint,
    HintConfig,
    PredictionConfig,
    Tier,
    WorkflowSpec,
    build_system,
    system_names,
)
from tenure.serving.hints import ActionKind, HintAction, SessionAction


def hint(driver, client="", **steps):
    driver.scheduler.hint(Hint("kvflow", client=client, steps=steps))


def retain(driver, agent, client, priority=1.0, ttl_s=1000.0):
    action = HintAction(ActionKind.RETAIN, agent, priority, ttl_s)
    driver.scheduler.hint(Hint("kv_hints", client=client, actions=(action,)))


def store(driver, prompt_of, agents, client="", length=20):
    for agent in agents:
        driver.serve(f"store {agent}", prompt_of(agent, length), agent=agent, fixed_tokens=length, client=client)


def first_victims(driver):
    """The agents in the order in which their prompts would leave the device."""
    tiers, found = driver.system.tiers, []
    candidates = tiers.storage.queues[Tier.DEVICE]
    while (node := candidates.first()) is not None:
        found += list(node.group.agents)
        tiers.evictor.evict(node, Tier.DEVICE)
    return found


@pytest.mark.parametrize("name", ["ste", "expected_time"])
def test_a_client_protects_its_quota_and_no_more(make_driver, prompt_of, name):
    """Room for ten prompts, two clients: of the eight that one calls urgent, three count less than the other's."""
    driver = make_driver(name, device=200)
    store(driver, prompt_of, "abcdefgh", "greedy")
    store(driver, prompt_of, "z", "modest")
    for agent in "abcdefgh":
        retain(driver, agent, "greedy", priority=1.0)
    retain(driver, "z", "modest", priority=0.6)
    driver.begin()
    assert len(driver.system.predictor.quotas.capped) == 3
    victims = first_victims(driver)
    assert victims.index("z") == 3


def test_a_client_that_is_alone_may_protect_everything(make_driver, prompt_of):
    driver = make_driver("ste", device=60)
    store(driver, prompt_of, "abc", "one")
    hint(driver, "one", a=0, b=0, c=0)
    driver.begin()
    assert not driver.system.predictor.quotas.capped


def test_quotas_are_recomputed_when_clients_and_prompts_come(make_driver, prompt_of):
    """A client alone holds 140 of 200 bytes; with a second one its quota is 100, however much it stores."""
    driver = make_driver("ste", device=200)
    store(driver, prompt_of, "abcdefg", "greedy")
    for agent in "abcdefgh":
        retain(driver, agent, "greedy", priority=1.0)
    driver.begin()
    capped = driver.system.predictor.quotas.capped
    assert not capped
    store(driver, prompt_of, "z", "modest")
    driver.begin()
    capped = driver.system.predictor.quotas.capped
    assert len(capped) == 2, "five prompts are its quota; of the eighth nothing is stored"
    store(driver, prompt_of, "h", "greedy")
    driver.begin()
    assert len(driver.system.predictor.quotas.capped) == 3


def test_a_client_that_only_hints_loses_the_agent_to_one_that_calls_it(make_driver, prompt_of):
    driver = make_driver("ste")
    driver.scheduler.hint(
        Hint("kv_hints", client="mallory", actions=(HintAction(ActionKind.EVICT, "a", ttl_s=3600.0),))
    )
    hint(driver, "honest", a=1)
    driver.begin()
    assert driver.system.predictor.steps("a") == math.inf, "nobody has called it"
    driver.serve("r", [*prompt_of("a"), 1], agent="a", fixed_tokens=20, client="honest")
    hint(driver, "honest", a=1)
    driver.scheduler.hint(
        Hint("kv_hints", client="mallory", actions=(HintAction(ActionKind.EVICT, "a", ttl_s=3600.0),))
    )
    driver.begin()
    assert driver.system.predictor.steps("a") == 1
    driver.serve("s", [*prompt_of("a"), 2], agent="a", fixed_tokens=20, client="mallory")
    hint(driver, "mallory", a=9)
    assert driver.system.predictor.quotas.owner("a") == "honest", "who has called it keeps it"


def test_a_request_in_another_clients_workflow_changes_no_prediction(make_driver, prompt_of):
    """It is a call of the caller's own agent; the other one's prompt, calls and workflow stay as they are."""
    driver = make_driver("ste", device=200)
    store(driver, prompt_of, "a", "honest")
    spec = WorkflowSpec("ring", [AgentSpec(agent) for agent in "abc"], [EdgeSpec("a", "b"), EdgeSpec("b", "c")])
    workflow = driver.system.graph.add_workflow(spec, client="honest")
    tiers = driver.system.tiers
    end, version = tiers.tree.prompt_ends["a"], workflow.version
    other = [9] * 20
    answer = driver.serve("r", [*other, 1], agent="a", workflow="ring", fixed_tokens=20, client="mallory")
    assert answer.finish_reason is FinishReason.ANSWERED and workflow.version == version and not workflow.running
    assert tiers.tree.prompt_ends["a"] is end and tiers.lookup(other).length == 20
    assert tiers.tree.prompt_ends["a@mallory"] is tiers.lookup(other).nodes[-1]
    driver.serve("s", [*prompt_of("a"), 3], agent="a", workflow="ring", fixed_tokens=20, client="honest")
    assert workflow.version > version and driver.system.predictor.steps("b") == 0


NAMES = ("planner", "writer", "critic")


def ring_of(name):
    edges = [EdgeSpec(NAMES[n], NAMES[(n + 1) % 3]) for n in range(3)]
    return WorkflowSpec(name, [AgentSpec(agent) for agent in NAMES], edges)


@pytest.mark.parametrize("declared", [True, False], ids=["declared for clients", "declared for nobody"])
@pytest.mark.parametrize("name", ["ste_prefetch", "expected_time"])
def test_agents_of_two_clients_with_the_same_names_are_two(make_driver, prompt_of, name, declared):
    """Each has its prompt, its place in its own workflow, and hits."""
    driver = make_driver(name, device=200)
    graph, tree = driver.system.graph, driver.system.tiers.tree
    for client in "AB":
        graph.add_workflow(ring_of(f"run {client}"), client=client if declared else "")
    prompts = {(c, agent): [ord(c), *prompt_of(agent)[1:]] for c in "AB" for agent in NAMES}
    found = []
    for turn in range(3):
        for agent in NAMES:
            for client in "AB":
                prompt = [*prompts[client, agent], 7000 + turn]
                call = {"workflow": f"run {client}", "agent": agent, "client": client, "fixed_tokens": 20}
                answer = driver.serve(f"{client} {agent} {turn}", prompt, **call)
                found += [answer.cached_tokens] * (turn > 0)
    assert found == [20] * 12
    assert set(tree.prompt_ends) == {*NAMES, *(f"{agent}@B" for agent in NAMES)}
    for client, mine in (("A", "writer"), ("B", "writer@B")):
        assert tree.prompt_ends[mine] is driver.system.tiers.lookup(prompts[client, "writer"]).nodes[-1]
        workflow = graph[f"run {client}"]
        assert workflow.client == client and mine in workflow.ids and workflow.steps("writer") == workflow.steps(mine)
        with pytest.raises(ValueError, match=f"belongs to the client '{client}', not to 'C'"):
            workflow.bind("C")
    workflow.add_agent("editor")
    workflow.add_edge("writer", "editor")
    assert workflow.join("editor") == "or" and {e.source for e in workflow.edges() if e.target == "editor"} == {
        "writer@B"
    }
    driver.submit("b", [*prompts["B", "planner"], 1], 2, workflow="run B", agent="planner", client="B")
    assert workflow.running and not graph["run A"].running
    driver.cancel("b")
    assert not workflow.running
    graph.remove_workflow("run B")
    assert graph.steps("writer@B") == math.inf and graph.agents == 3


def test_a_client_that_calls_all_names_first_takes_nothing_from_others(make_driver, prompt_of):
    driver = make_driver("ste", device=200)
    for agent in NAMES:
        driver.serve(f"squat {agent}", [1, 2, 3, 4], agent=agent, fixed_tokens=4, client="mallory")
    driver.system.graph.add_workflow(ring_of("run"))
    found = []
    for turn in range(2):
        for agent in NAMES:
            call = {"workflow": "run", "agent": agent, "client": "honest", "fixed_tokens": 20}
            found.append(
                driver.serve(f"{agent} {turn}", [ord(agent[0]), *prompt_of(agent), turn], **call).cached_tokens
            )
    assert found == [0, 0, 0, 20, 20, 20] and driver.system.predictor.steps("planner@honest") == 0
    driver.scheduler.hint(Hint("kvflow", client="mallory", steps=dict.fromkeys(NAMES, 9.0)))
    assert driver.system.predictor.steps("planner@honest") == 0 and driver.system.predictor.steps("planner") == 9


def test_an_agent_whose_name_gets_too_long_is_answered_without_its_workflow(make_driver, prompt_of):
    driver = make_driver("ste", device=200)
    long = "a" * 250
    driver.serve("r", prompt_of("a"), agent=long, fixed_tokens=20, client="one")
    driver.system.graph.add_workflow(WorkflowSpec("run", [AgentSpec(long)]))
    call = {"workflow": "run", "agent": long, "client": "another", "fixed_tokens": 20}
    assert driver.serve("s", prompt_of("b"), **call).finish_reason is FinishReason.ANSWERED
    assert not driver.system.graph["run"].client and not driver.system.graph["run"].running
    with pytest.raises(ValueError, match="name; accepted: text of 1 to 256 characters"):
        driver.system.graph.add_workflow(WorkflowSpec("more", [AgentSpec("b"), AgentSpec(long)]), client="another")
    assert "more" not in driver.system.graph and driver.system.graph.agents == 1


@pytest.mark.parametrize("name", ["ste", "expected_time"])
def test_a_prompt_over_the_quota_of_the_device_is_held_by_a_larger_host(make_driver, prompt_of, name):
    """A quarter of the device is 25 bytes: the kept prompt of 60 is over it, and the host has room for it."""
    driver = make_driver(name, device=100, host=600)
    store(driver, prompt_of, "a", "one", length=60)
    for client in ("two", "three", "four"):
        store(driver, prompt_of, client[:2], client)
    retain(driver, "a", "one")
    driver.begin()
    quotas = driver.system.predictor.quotas
    assert "a" in quotas.capped and "a" not in quotas.capped_everywhere
    for number in range(40):
        driver.serve(f"r{number}", [5000 + number] * 20)
    assert driver.system.tiers.lookup(prompt_of("a", 60)).length == 60


def test_hints_about_another_clients_agents_are_ignored(make_driver, prompt_of):
    driver = make_driver("ste", device=60)
    store(driver, prompt_of, "a", "owner")
    hint(driver, "owner", a=1)
    hint(driver, "stranger", a=9, b=2)
    driver.scheduler.hint(Hint("vllm", client="stranger", actions=(HintAction(ActionKind.EVICT, "a"),)))
    assert driver.system.predictor.steps("a") == 1
    assert driver.system.predictor.steps("b") == 2


def test_the_prompt_of_a_waiting_request_is_not_the_first_victim(make_driver, ring, prompt_of):
    """A running agent is called again in N steps; one whose request is still in the queue is needed now."""
    driver = make_driver("ste", device=90)
    store(driver, prompt_of, "abc")
    ring(driver, list("abc"))
    driver.submit("blocker", [7] * 20, 8)
    driver.submit("r", [*prompt_of("a"), *range(40)], 10, workflow="ring", agent="a", fixed_tokens=20)
    driver.begin()
    predictor = driver.system.predictor
    assert predictor.steps("a") == predictor.next_steps("a") == predictor.seconds_to_call("a") == 0.0
    assert predictor.reuse("a") == 1.0
    driver.finish(driver.batches[-1][1])
    driver.run(lambda: any(e.request.id == "blocker" for e in driver.ended))
    driver.begin()
    assert predictor.steps("a") == 3.0, "admitted: its handle protects the prompt, what counts is its next turn"
    driver.finish(driver.batches[-1][1])


def test_the_workflow_follows_calls_and_their_ends(make_driver, ring, prompt_of):
    driver = make_driver("ste", device=90)
    ring(driver, list("abc"))
    graph = driver.system.graph
    driver.submit("r", [*prompt_of("a"), 1], 2, workflow="ring", agent="a", fixed_tokens=20)
    assert (graph.steps("a"), graph.steps("b")) == (0, 1)
    driver.run()
    assert (graph.steps("b"), graph.steps("c")) == (0, 1), "its successor is ready"
    driver.submit("s", [*prompt_of("b"), 1], 2, workflow="ring", agent="b", fixed_tokens=20)
    driver.cancel("s")
    assert graph.steps("c") == math.inf, "a call that was cancelled leads nowhere"
    driver.submit("t", [*prompt_of("c"), 1], 2, workflow="ring", agent="c", fixed_tokens=20)
    graph.remove_workflow("ring")
    driver.run()


def test_transitions_are_learned_where_no_workflow_is_declared(make_driver, prompt_of):
    driver = make_driver("ste", device=200, learn=True)
    for turn in range(6):
        for agent in "ab":
            driver.serve(f"{agent}{turn}", [*prompt_of(agent), turn], agent=agent, session="s", fixed_tokens=20)
    assert driver.system.predictor.steps("a") == 1.0
    driver.scheduler.hint(Hint("dynamo", session="s", session_action=SessionAction.CLOSE))
    assert driver.system.predictor.steps("a") == math.inf


def test_a_hinted_pause_moves_the_expected_time(make_driver, ring, prompt_of):
    driver = make_driver("expected_time", device=90)
    ring(driver, list("ab"))
    driver.submit("r", [*prompt_of("a"), 1], 2, workflow="ring", agent="a", fixed_tokens=20)
    before = driver.system.graph.seconds("b")
    driver.scheduler.hint(Hint("sglang", agent="a", pause_s=30.0))
    assert driver.system.graph.seconds("b") > before + 5
    driver.run()


def test_no_step_reads_all_predictions_when_the_discount_changes(make_driver, prompt_of, monkeypatch):
    """40 workflows of 5 agents: as γ changes and clients come, a step reads a bounded number of values again."""
    driver = make_driver("expected_time", device=400)
    system, scheduler = driver.system, driver.system.scheduler
    for n in range(40):
        spec = WorkflowSpec(f"w{n}", [AgentSpec(f"w{n}.{i}") for i in range(5)], [EdgeSpec(f"w{n}.0", f"w{n}.1")])
        system.graph.add_workflow(spec)
    scheduler.next_batch()
    counts, real = [], system.tiers.values_changed
    monkeypatch.setattr(system.tiers, "values_changed", lambda agents: (counts.append(len(agents)), real(agents)))
    rate = system.graph.rate
    driver.serve("first", prompt_of("x", 20), new=90, workflow="w0", agent="w0.0", fixed_tokens=20, client="one")
    scheduler.next_batch()
    assert system.graph.rate != rate
    assert 0 < max(counts) <= 32 + 2 * 5, "those of workflows with events, and max_agents_per_update and a workflow"
    for _ in range(20):
        if not system.predictor.has_due:
            break
        assert scheduler.next_time() == driver.clock()
        assert scheduler.next_batch() is None
    assert not system.predictor.has_due and sum(counts) >= 200
    assert scheduler.next_time() is None or scheduler.next_time() > driver.clock()


def test_duplicates_and_late_hints_change_nothing(make_driver):
    driver = make_driver("ste")
    fetch = Hint("kv_hints", message="m", actions=(HintAction(ActionKind.FETCH, "a"),))
    driver.scheduler.hint(fetch)
    hint(driver, "", a=4)
    driver.scheduler.hint(fetch)
    assert driver.system.predictor.steps("a") == 4
    driver.scheduler.hint(Hint("kvflow", steps={"b": 3.0}, sequence=5))
    driver.scheduler.hint(Hint("kvflow", steps={"b": 9.0}, sequence=4))
    driver.scheduler.hint(Hint("kvflow", steps={"b": 9.0}, sequence=5))
    assert driver.system.predictor.steps("b") == 3
    driver.scheduler.hint(Hint("kvflow", steps={"b": 2.0}, sequence=6))
    assert driver.system.predictor.steps("b") == 2


def test_systems_by_name():
    assert system_names() == (
        "lru", "vllm", "lfu", "lru_reactive", "hicache", "lru_prefetch", "ste", "ste_prefetch", "ste_holding",
        "expected_time", "belady",
    )  # fmt: skip
    with pytest.raises(ValueError, match="unknown system 'fifo'; known: lru, vllm, lfu, lru_reactive"):
        build_system("fifo", {}, None, clock=None, costs=None, bytes_per_token=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got no prompts for the system 'belady'"):
        build_system("belady", {}, None, clock=None, costs=None, bytes_per_token=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got prompts for the system 'lru'"):
        build_system("lru", {}, None, clock=None, costs=None, bytes_per_token=1, prompts=[[1]])  # type: ignore[arg-type]


def test_lru_on_the_device_alone_and_the_oracle(make_driver, prompt_of):
    """A ring of five with room for two: LRU hits nothing, the oracle a quarter of the calls and more."""
    agents = list("abcde")
    prompts = [[*prompt_of(agents[n % 5]), n] for n in range(40)]
    hits = {}
    for name in ("lru", "lru_reactive", "belady"):
        driver = make_driver(name, device=48, prompts=prompts if name == "belady" else None)
        for number, prompt in enumerate(prompts):
            agent = agents[number % 5]
            driver.serve(f"r{number}", prompt, agent=agent, fixed_tokens=20)
        hits[name] = sum(e.cached_tokens - e.loaded_tokens for e in driver.ended) / sum(20 for _ in prompts)
        used = driver.system.tiers.pools.keys()
        assert (Tier.HOST in used) == (name != "lru")
    assert hits["lru"] == hits["lru_reactive"] == 0 and hits["belady"] >= 0.2


def test_predictions_of_a_workflow_without_events_are_cleared_after_an_hour(make_driver, ring, prompt_of):
    driver = make_driver("ste", device=200, learn=True)
    graph = driver.system.graph
    ring(driver, ["a", "b"], "gone")
    ring(driver, ["c", "d"], "slow")
    driver.serve("r", prompt_of("a"), workflow="gone", agent="a", fixed_tokens=20)
    graph["slow"].start("c")
    driver.clock.advance_to(driver.clock() + 3500)
    driver.begin()
    steps = driver.system.predictor.steps
    assert (steps("b"), steps("d")) == (0.0, 1.0)
    driver.clock.advance_to(driver.clock() + 800)
    driver.begin()
    assert (steps("b"), steps("d")) == (math.inf, 1.0)
    driver.submit("again", [*prompt_of("a"), 1], 2, workflow="gone", agent="a", fixed_tokens=20)
    assert steps("b") == 1.0
    driver.run()


@pytest.mark.parametrize("kind", [HintConfig, PredictionConfig])
def test_tuned_numbers_are_checked(kind):
    for each in dataclasses.fields(kind):
        if isinstance(each.default, (int, float)):
            for value in (0, math.inf):
                with pytest.raises(ValueError, match=f"got {value} as {each.name}; accepted: a (whole )?number"):
                    kind(**{each.name: value})
