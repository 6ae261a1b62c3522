"""The report that a request asks for: what was reused and from where, what it waited for, and why the rest was not."""

from __future__ import annotations

import pytest

from tenure.serving import Request, SchedulerConfig, StorePolicy, Tier
from tenure.serving.kvcache.eviction_history import ComputedSpan, MissReason

from .conftest import Driver


def serve(driver: Driver, id: str, prompt: list[int], **options):
    report = driver.serve(id, prompt, explain_cache=True, **options).cache
    assert report is not None
    assert report.reused_tokens + sum(each.end - each.start for each in report.computed) == len(prompt)
    assert report.reused_tokens == driver.answer(id).cached_tokens
    ends = [report.reused_tokens, *(each.end for each in report.computed)]
    assert [each.start for each in report.computed] == ends[:-1] and ends[-1] == len(prompt)
    return report


def spans(report) -> list[tuple[int, int, MissReason]]:
    return [(each.start, each.end, each.reason) for each in report.computed]


def test_nothing_is_told_that_was_not_asked_for(make_driver):
    assert make_driver().serve("a", [1, 2, 3]).cache is None
    with pytest.raises(ValueError, match="explain_cache='yes'"):
        Request("a", [1], 1, explain_cache="yes")  # pyright: ignore[reportArgumentType]


def test_first_and_second_call(make_driver, prompt_of):
    driver, prompt = make_driver(), prompt_of("a", 21)
    first = serve(driver, "first", prompt)
    assert spans(first) == [(0, 20, MissReason.NEVER_SEEN), (20, 21, MissReason.PART_OF_PAGE)]
    second = serve(driver, "second", prompt)
    assert second.reused == {Tier.DEVICE: 20, Tier.HOST: 0, Tier.DISK: 0}
    assert spans(second) == [(20, 21, MissReason.PART_OF_PAGE)]
    assert (second.queued_s, second.loading_s, second.shared_s) == (0, 0, 0)
    whole = serve(driver, "whole", prompt[:20])
    assert spans(whole) == [(18, 20, MissReason.PART_OF_PAGE)], "the last token is always computed"


def test_tiers_and_seconds_of_loading(make_driver, prompt_of):
    driver, prompt = make_driver(link=100.0), prompt_of("a", 41)
    driver.serve("first", prompt)
    driver.send_down()
    report = serve(driver, "second", prompt)
    assert report.reused == {Tier.DEVICE: 0, Tier.HOST: 40, Tier.DISK: 0}
    assert report.loading_s == pytest.approx(driver.answer("second").stalled_s) and report.loading_s > 0
    assert report.queued_s == pytest.approx(0.0)


def test_computing_that_is_faster_than_loading(make_driver, prompt_of):
    from tenure.serving import LinearCosts

    driver, prompt = make_driver(costs=LinearCosts(100.0, (1.0, 0.0))), prompt_of("a", 21)
    driver.serve("first", prompt)
    driver.send_down()
    assert spans(serve(driver, "second", prompt))[0] == (0, 20, MissReason.FASTER)


def test_evicted_for_an_agent_of_the_same_client(make_driver, prompt_of):
    driver = make_driver("lru", device=30)
    driver.serve("a", prompt_of("a", 21), client="team")
    driver.serve("b", prompt_of("b", 21), client="team", agent="writer")
    report = serve(driver, "again", prompt_of("a", 21), client="team")
    (evicted, _) = report.computed
    assert evicted.reason is MissReason.EVICTED and evicted.evicted_for == "writer"
    assert evicted.seconds_ago is not None and evicted.seconds_ago > 0


def test_nothing_about_other_clients(make_driver, prompt_of):
    driver = make_driver("lru", device=30)
    mine, theirs = {"client": "team", "namespace": "team"}, {"client": "other", "namespace": "other"}
    driver.serve("a", prompt_of("a", 21), **mine)
    driver.serve("b", prompt_of("b", 21), agent="secret", **theirs)
    report = serve(driver, "again", prompt_of("a", 21), **mine)
    assert report.computed[0] == ComputedSpan(0, 20, MissReason.EVICTED)
    unseen = serve(driver, "theirs", prompt_of("b", 21), **mine)
    assert unseen.computed[0] == ComputedSpan(0, 20, MissReason.NEVER_SEEN)


def test_other_namespaces_of_the_client(make_driver, prompt_of):
    driver, prompt = make_driver(), prompt_of("a", 21)
    driver.serve("a", prompt, client="team", namespace=("team", "salt"))
    report = serve(driver, "b", prompt, client="team", namespace=("other",))
    assert spans(report)[0] == (0, 20, MissReason.OTHER_NAMESPACE)
    driver.scheduler.namespaces.own = lambda namespace: namespace[:1]
    report = serve(driver, "c", [*prompt[:10], 5, 5, 5], client="team", namespace=("team", "other"))
    assert spans(report)[0] == (0, 10, MissReason.OTHER_COMPRESSION)


def test_the_namespaces_remembered_of_a_client_are_bounded(make_driver):
    config = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=8, max_client_namespaces=2, max_idle_branches=3)
    namespaces = make_driver(scheduler_config=config).scheduler.namespaces
    for number in range(5):
        namespaces.observe("team", number)
    assert [name for name, _ in namespaces.others("team", 4)] == [3]
    for number in range(3):
        namespaces.observe(f"client-{number}", 0)
    assert namespaces.others("team", 0) == []


def test_what_was_not_stored(make_driver, prompt_of):
    driver, prompt = make_driver(), prompt_of("a", 21)
    driver.serve("a", prompt, agent="a", fixed_tokens=8, store_policy=StorePolicy.DISCARD)
    report = serve(driver, "b", prompt, agent="a", fixed_tokens=8)
    assert report.reused[Tier.DEVICE] == 8
    assert spans(report)[0] == (8, 20, MissReason.NOT_STORED) and report.computed[0].seconds_ago is not None


def test_waiting_for_pages_of_another_request(make_driver, prompt_of):
    config = SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=8)
    driver, prompt = make_driver(scheduler_config=config), prompt_of("a", 40)
    for id in ("a", "b"):
        driver.submit(id, [*prompt, 5 + ord(id)], 2, explain_cache=True)
    driver.run()
    leader, follower = driver.answer("a").cache, driver.answer("b").cache
    assert leader.shared_s == 0 and follower.shared_s > 0 and follower.reused[Tier.DEVICE] == 40
    times = driver.answer("b").times
    waited = follower.queued_s + follower.loading_s + follower.shared_s
    assert waited == pytest.approx(times.admitted - times.arrived)


def test_a_request_that_was_never_admitted_has_no_report(make_driver, prompt_of):
    driver = make_driver("lru", device=30)
    driver.submit("long", prompt_of("a", 20), 10, explain_cache=True)
    driver.begin()
    driver.submit("waits", prompt_of("b", 28), 2, explain_cache=True)
    driver.cancel("waits")
    driver.take()
    assert driver.answer("waits").cache is None
