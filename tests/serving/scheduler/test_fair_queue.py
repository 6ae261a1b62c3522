"""Shares among clients and workflows, priorities and age within one."""

from __future__ import annotations

from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenure.serving import Request, SchedulerConfig
from tenure.serving.scheduler.fair_queue import FairQueue
from tenure.serving.scheduler.request_state import RequestState


def state(client: str = "", workflow: str | None = None, now: float = 0.0, priority: float = 0.5):
    request = Request("r", [1], 1, client=client, workflow=workflow, priority=priority)
    return RequestState.create(request, 1, 2, 1, now)


def popped(queue: FairQueue) -> list:
    found = []
    while (each := queue.pop()) is not None:
        found.append(each)
    queue.check()
    return found


def test_who_was_served_least_goes_first():
    queue = FairQueue()
    served = {"greedy": 0, "modest": 0}
    for number in range(300):
        queue.push(state("greedy", now=number))
    for number in range(30):
        queue.push(state("modest", now=1000 + number))
    order = []
    for _ in range(90):
        each = queue.pop()
        assert each is not None
        client = each.account[0]
        order.append(client)
        served[client] += 10 if client == "greedy" else 20
        queue.charge(each, 10 if client == "greedy" else 20)
    assert order[:3] == ["greedy", "modest", "greedy"] and order.count("modest") == 30
    assert abs(served["greedy"] - served["modest"]) <= 20, "though the greedy one came first, with ten times as many"


def test_workflows_share_what_their_client_gets():
    """One client with nine workflows gets half, and its workflows a ninth of that each."""
    queue, counts = FairQueue(), {}
    for number in range(100):
        queue.push(state("one", "only", now=number))
        for workflow in range(9):
            queue.push(state("many", f"w{workflow}", now=number))
    for _ in range(180):
        each = queue.pop()
        assert each is not None
        counts[each.account] = counts.get(each.account, 0) + 1
        queue.charge(each, 7.0)
    assert counts["one", "only"] == 90
    assert {n for (client, _), n in counts.items() if client == "many"} == {10}


def test_idleness_saves_no_claim_and_no_debt_is_forgotten():
    queue = FairQueue()
    for _ in range(50):
        queue.push(each := state("busy"))
        queue.pop()
        queue.charge(each, 100)
    for client in ("busy", "idle"):
        for _ in range(4):
            queue.push(state(client))
    order = []
    while (each := queue.pop()) is not None:
        order.append(each.account[0])
        queue.charge(each, 100)
    assert order[0] == "idle" and order[1:5].count("idle") <= 3, "it is not served alone for what it did not use"


def test_priority_moves_a_request_by_a_bounded_time():
    queue = FairQueue(window_s=10)
    early, late, much_later = state(now=0.0, priority=0), state(now=9.0, priority=1), state(now=11.0, priority=1)
    for each in (much_later, early, late):
        queue.push(each)
    assert popped(queue) == [late, early, much_later]


def test_who_comes_back_takes_its_old_place():
    queue = FairQueue()
    first, second = state(now=1.0), state(now=1.0)
    queue.push(first)
    queue.push(second)
    assert queue.pop() is first
    queue.push(first)
    assert popped(queue) == [first, second]


def test_a_deferred_request_keeps_its_place():
    """Until all may go the others go, in their order; then all do, in the order they would have gone in anyway."""
    random = Random(0)
    plain, queue = FairQueue(), FairQueue()
    for _ in range(200):
        path, now = (random.choice("xyz"), random.choice("pq")), random.random()
        one, other = state(*path, now), state(*path, now)
        other.deferred = random.random() < 0.5
        plain.push(one)
        queue.push(other)
    for _ in range(200):
        tokens = random.uniform(1, 50)
        one, other = plain.pop(), queue.pop()
        assert one is not None and other is not None and one.times == other.times
        plain.charge(one, tokens)
        queue.charge(other, tokens)
        queue.check()
    queue = FairQueue()
    pushed = [state(now=number) for number in range(6)]
    for each in pushed:
        each.deferred = each.times.arrived % 2 == 0
        queue.push(each)
    assert [queue.pop(deferred=False) for _ in range(4)] == [*pushed[1::2], None]
    assert popped(queue) == pushed[::2]


def test_too_much_charged_is_given_back():
    queue = FairQueue()
    for client in "ab":
        queue.push(state(client))
        queue.push(state(client, now=1))
    first = queue.pop()
    assert first is not None
    queue.charge(first, 1000)
    queue.charge(first, -1000)
    assert first.charged_tokens == 0
    other = queue.pop()
    assert other is not None and other.account != first.account
    queue.charge(other, 10)
    third = queue.pop()
    assert third is not None and third.account == first.account


def test_idle_clients_are_forgotten():
    queue = FairQueue(max_idle=50)
    for number in range(1000):
        queue.push(each := state(f"c{number}", f"w{number}"))
        queue.pop()
        queue.charge(each, 1)
    assert len(queue.root.children) <= 100


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_nothing_is_lost_or_given_twice(seed, steps):
    random, queue, inside = Random(seed), FairQueue(), []
    for _ in range(steps):
        action = random.random()
        if action < 0.5 or not inside:
            inside.append(state(random.choice("xy"), random.choice("pq"), random.random(), random.random()))
            inside[-1].deferred = random.random() < 0.3
            queue.push(inside[-1])
        elif action < 0.7:
            each = inside.pop(random.randrange(len(inside)))
            assert queue.remove(each) and not queue.remove(each) and each not in queue
        else:
            each = queue.pop(deferred=action < 0.85)
            if each is None:
                assert action >= 0.85 and all(other.deferred for other in inside)
                continue
            assert action < 0.85 or not each.deferred
            inside.remove(each)
            queue.charge(each, random.uniform(-5, 50))
        assert len(queue) == len(inside) and set(queue) == set(inside)
        queue.check()
    assert set(popped(queue)) == set(inside)


def test_a_client_that_marks_everything_urgent_gets_its_share_and_no_more(make_driver):
    config = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4, timeout_s=1e5)
    driver = make_driver("lru", device=60, scheduler_config=config)
    for number in range(40):
        driver.submit(f"urgent{number}", [1000 + number] * 10, 10, client="urgent", priority=1.0)
    for number in range(8):
        driver.submit(f"calm{number}", [2000 + number] * 10, 10, client="calm", priority=0.0)
    driver.run()
    order = [ended.request.client for ended in driver.ended]
    assert 7 <= order[:16].count("calm") <= 8
