"""Snapshots of a system: what they add up to, their bounds, and the counts of the last minute."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from tenure.serving import SchedulerMetrics, Tier, WorkflowSpec
from tenure.serving.metrics import MAX_SAMPLES, RecentCounts
from tenure.serving.snapshot import SnapshotConfig, take_snapshot

SMALL = SnapshotConfig(
    max_nodes=3, max_agents=2, max_transfers=1, max_requests=2, max_workflows=1, max_workflow_agents=2,
    max_workflow_edges=1,
)  # fmt: skip


def test_the_parts_of_a_tier(make_driver, prompt_of):
    driver = make_driver(device=200)
    shared = prompt_of("s", 20)
    for agent in ("a", "b"):
        driver.serve(agent, [*shared, *prompt_of(agent, 10), 1], agent=agent, fixed_tokens=30)
    driver.submit("runs", [*shared, *prompt_of("a", 10), 2, 3, 4], 20, agent="a", fixed_tokens=30)
    driver.run(lambda: driver.system.scheduler.metrics.decode_tokens > 1)
    device, host = take_snapshot(driver.system, SnapshotConfig()).tiers
    assert (device.tier, host.tier, host.used) == ("device", "host", 0)
    assert device.used == device.reserved + device.arriving + device.pinned + device.evictable
    bytes_of = {each.agent: (each.nbytes, each.pinned) for each in device.agents}
    assert bytes_of == {"a": (20, 20), "b": (20, 10)}, "20 shared tokens are half of each one's"
    assert device.conversations == device.used - device.reserved - 40 and not device.not_inspected


def test_stages_and_copies(make_driver, prompt_of):
    driver = make_driver(device=60, link=10.0)
    driver.serve("a", prompt_of("a", 41), agent="a", fixed_tokens=40)
    driver.send_down()
    driver.submit("loads", prompt_of("a", 41), 5, agent="a")
    driver.submit("computes", prompt_of("b", 8), 5)
    driver.submit("waits", prompt_of("c", 50), 5)
    driver.begin()
    found = take_snapshot(driver.system, SnapshotConfig())
    assert {each.id: each.stage for each in found.requests} == {
        "loads": "loading",
        "computes": "prefill",
        "waits": "queued",
    }
    assert found.stages == {"queued": 1, "sharing": 0, "loading": 1, "loaded": 0, "prefill": 1, "decode": 0}
    (copy,) = found.transfers
    assert (copy.source, copy.target, copy.urgency, copy.nbytes, copy.tokens) == ("host", "device", "demand", 40, 40)
    assert copy.agents == ["a"] and copy.waiting == 1 and found.tiers[0].arriving == 40
    json.dumps(asdict(found), allow_nan=False)


def test_a_request_that_waits_for_pages_of_another(make_driver, prompt_of):
    driver = make_driver(device=400)
    for id in ("leads", "follows"):
        driver.submit(id, [*prompt_of("a", 100), ord(id[0])], 2)
    driver.begin()
    assert [each.stage for each in take_snapshot(driver.system, SnapshotConfig()).requests] == ["prefill", "sharing"]


def test_everything_is_bounded_and_says_how_much_more_there_is(make_driver, prompt_of, ring):
    driver = make_driver(device=400, link=10.0)
    names = [chr(ord("a") + number) for number in range(5)]
    ring(driver, names)
    driver.system.graph.add_workflow(WorkflowSpec("older", ()))
    driver.clock.advance_to(1.0)
    for name in names:
        driver.serve(name, prompt_of(name, 21), agent=name, fixed_tokens=20, workflow="ring")
    driver.send_down()
    for name in names:
        driver.submit(name, prompt_of(name, 21), 5)
    driver.begin()
    found = take_snapshot(driver.system, SMALL)
    assert (len(found.requests), found.more_requests) == (2, 3)
    assert (len(found.workflows), found.more_workflows) == (1, 1) and found.workflows[0].workflow == "ring"
    flow = found.workflows[0]
    assert (len(flow.agents), flow.more_agents, len(flow.edges), flow.more_edges) == (2, 3, 1, 4)
    assert (found.nodes, found.more_nodes) == (5, 2)
    host = found.tiers[1]
    assert (len(host.agents), host.more_agents, host.more_agent_bytes, host.not_inspected) == (2, 1, 20, 40)
    assert len(found.transfers) == 1 and found.more_transfers == len(driver.system.tiers.transfers.jobs) - 1
    everything = take_snapshot(driver.system, SnapshotConfig())
    assert (everything.more_requests, everything.more_workflows, everything.more_nodes) == (0, 0, 0)
    assert everything.workflows[0].more_agents == everything.workflows[0].more_edges == 0
    assert {source: target for source, target, _ in everything.workflows[0].edges} == {n: (n + 1) % 5 for n in range(5)}
    with pytest.raises(ValueError, match="max_nodes"):
        replace(SMALL, max_nodes=0)


def test_taking_one_changes_nothing(make_driver, prompt_of, ring):
    driver = make_driver("expected_time")
    ring(driver, ["a", "b"])
    driver.serve("x", prompt_of("a", 21), agent="a", fixed_tokens=20, workflow="ring")
    driver.submit("y", prompt_of("b", 21), 5, agent="b", workflow="ring")
    before = take_snapshot(driver.system, SnapshotConfig())
    after = before
    for _ in range(3):
        after = take_snapshot(driver.system, SnapshotConfig())
    same = {"taken": 0.0, "cost_s": 0.0}
    assert replace(before, **same) == replace(after, **same)
    assert [agent.steps for agent in after.workflows[0].agents] == [1.0, 0.0]
    driver.run()
    assert driver.cached(prompt_of("a", 21), Tier.DEVICE) == 20


def test_the_last_minute():
    recent, metrics = RecentCounts(), SchedulerMetrics()
    assert recent.summary(5.0).intervals == [] and recent.summary(5.0).total.seconds == 0
    for number in range(200):
        recent.sample(number * 0.5, metrics, 10 * number, 5 * number)
        metrics.decode_tokens += 3
        metrics.stalled_s += 0.25
    found = recent.summary(99.5)
    assert len(found.intervals) == MAX_SAMPLES and {each.seconds for each in found.intervals} == {1.0}
    assert found.total.seconds == 60 and found.total.decode_tokens == 360 and found.total.stalled_s == 30
    assert (found.total.asked_tokens, found.total.found_tokens) == (1200, 600)
    assert [each.ended_s for each in found.intervals[-2:]] == [1.5, 0.5]
    recent.sample(130.0, metrics, 0, 0)
    late = recent.summary(130.0)
    assert late.total.seconds <= 62 and late.intervals[-1].seconds == 31.0, "a long step"
    recent.sample(2.0, metrics, 0, 0)  # the clock was set back
    assert recent.summary(2.0).intervals == []
