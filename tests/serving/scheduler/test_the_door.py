"""Clients' requests: labels that are used again, prompts that change, fields of any kind, and errors of one request."""

from __future__ import annotations

import enum

import numpy as np
import pytest
import torch

from tenure.serving import FinishReason, PhantomPayload, Request

A, B, C = ([n * 100 + k for k in range(40)] for n in (1, 2, 3))


def test_a_label_may_be_used_by_several_at_a_time(make_driver):
    driver = make_driver(device=1000)
    first, second = driver.submit("r", A, 3), driver.submit("r", B, 2)
    assert first != second
    driver.run()
    assert {(ended.number, ended.request.id, ended.num_output_tokens) for ended in driver.ended} == {
        (first, "r", 3),
        (second, "r", 2),
    }
    assert driver.cached(A) == driver.cached(B) == 40


def test_a_cancelled_label_is_used_again_at_once(make_driver):
    """Whether the cancelled one waits, or is in the batch in flight and ends with it."""
    driver = make_driver(device=1000)
    old = driver.submit("r", A, 9)
    batch = driver.begin()
    driver.scheduler.cancel(old)
    new = driver.submit("r", B, 2)
    driver.finish(batch)
    driver.scheduler.cancel(old)
    driver.run()
    reasons = {ended.number: (ended.finish_reason, ended.request.prompt.tolist()) for ended in driver.ended}
    assert reasons == {old: (FinishReason.CANCELLED, A), new: (FinishReason.ANSWERED, B)}
    assert driver.cached(A) == 0 and driver.cached(B) == 40


def test_calls_of_one_label_are_two_calls_of_the_workflow(make_driver, ring):
    driver = make_driver("ste", device=1000)
    ring(driver, ["a", "b"])
    workflow = driver.system.graph["ring"]
    for prompt in (A, B):
        driver.submit("r", prompt, 2, workflow="ring", agent="a")
    assert sum(len(calls) for calls in workflow.running.values()) == 2
    driver.run()
    assert not workflow.running


def test_only_numbers_are_cancelled(make_driver):
    driver = make_driver()
    for given in ("r", True, None, 1.0):
        with pytest.raises(ValueError, match="to cancel; accepted: the number that submit returned"):
            driver.scheduler.cancel(given)
    driver.scheduler.cancel(99)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_the_callers_buffer_may_change(make_driver, kind):
    driver = make_driver(device=1000)
    buffer = kind(A[:20])
    driver.submit("a", buffer)
    buffer[:] = kind(B[:20])
    driver.submit("b", buffer)
    batch = driver.begin()
    assert [item.token_ids.tolist() for item in batch.prefills] == [A[:20], B[:20]]
    driver.finish(batch)
    assert driver.cached(A) == driver.cached(B) == 20
    with pytest.raises(ValueError, match="read-only"):
        driver.answer("a").request.prompt[0] = 5


class Text(enum.Enum):
    SALT = "salt"


@pytest.mark.parametrize(
    "namespace",
    [["tenant"], {"a": 1}, {1}, True, 1.0, b"x", "x" * 257, 2**64, ("a", ["b"]), ("a",) * 65, Text.SALT, object],
    ids=repr,
)
def test_other_namespaces_are_refused(namespace):
    with pytest.raises(ValueError, match="as a namespace; accepted: a string of up to 256 characters, a whole number"):
        Request("r", A, 1, namespace=namespace)


@pytest.mark.parametrize("namespace", [None, "", "tenant", 7, ("a", 1, None, ("b",))])
def test_namespaces(make_driver, namespace):
    driver = make_driver(device=1000)
    driver.serve("r", A, namespace=namespace)
    assert driver.serve("s", [*A, 1], namespace=namespace).cached_tokens == 40
    assert driver.serve("t", [*A, 2], namespace="another").cached_tokens == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"client": []}, r"got \[\] as the name of a client"),
        ({"client": None}, "got None as the name of a client"),
        ({"client": 0}, "got 0 as the name of a client"),
        ({"store_policy": "neutral"}, "got store_policy='neutral' for a request; accepted: a StorePolicy"),
        ({"expected_tokens": 10**400}, "accepted: a whole number from 1 up to 2147483647"),
        ({"max_new_tokens": 2**31}, "accepted: a whole number from 1 up to 2147483647"),
        ({"max_new_tokens": np.int64(3)}, "accepted: a whole number from 1"),
        ({"prompt": [1, True]}, "got a row with a bool as token ids; accepted: one row of integers"),
        ({"prompt": [1.0]}, "got a row with a float as token ids"),
        ({"prompt": "hello"}, "accepted: one row of integers"),
        ({"prompt": None}, "accepted: one row of integers"),
        ({"prompt": [[1, 2]]}, "got a row with a list as token ids"),
        ({"prompt": [1, -1]}, "got token ids from -1 to 1; accepted: 0 to 2147483647"),
        ({"prompt": torch.tensor([[1, 2]])}, r"got token ids of shape \(1, 2\)"),
        ({"prompt": []}, "'r' has an empty prompt; accepted: one token or more"),
    ],
)
def test_other_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"id": "r", "prompt": A, "max_new_tokens": 1, **fields})


def test_token_ids_beyond_the_vocabulary_are_refused(make_driver):
    driver = make_driver()
    driver.scheduler.vocab_size = 128
    driver.submit("r", [127, 0])
    with pytest.raises(ValueError, match="got the token id 128 in a prompt; accepted: 0 to 127"):
        driver.submit("s", [1, 128])
    assert driver.scheduler.metrics.submitted == 1


def test_a_request_that_is_refused_has_never_been(make_driver, ring, monkeypatch):
    """For a reason that is known at the door, or for an error behind it."""
    driver = make_driver("expected_time", device=100)
    ring(driver, ["a", "b"])
    workflow, predictor = driver.system.graph["ring"], driver.system.predictor
    with pytest.raises(ValueError, match="in whole pages; the device's pool has 100"):
        driver.submit("r", list(range(101)), 1, workflow="ring", agent="a")
    monkeypatch.setattr(predictor, "fixed_tokens", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        driver.submit("r", A, 1, workflow="ring", agent="a")
    assert not workflow.running and not predictor._waiting and len(driver.scheduler) == 0
    assert driver.scheduler.metrics.submitted == driver.scheduler.metrics.events == 0
    driver.scheduler.check()
    monkeypatch.undo()
    assert driver.serve("r", A, 1, workflow="ring", agent="a").finish_reason is FinishReason.ANSWERED
    assert not workflow.running


def failing(method, label: str):
    """`method`, which fails for the request of that label."""

    def call(state, *args):
        if state.request.id == label:
            raise RuntimeError("a bug")
        return method(state, *args)

    return call


def test_who_cannot_be_admitted_or_started_fails_alone(make_driver, monkeypatch):
    driver = make_driver(device=1000)
    admission, running = driver.scheduler._admission, driver.scheduler._running
    monkeypatch.setattr(admission, "_choose", failing(admission._choose, "a"))
    monkeypatch.setattr(running, "add", failing(running.add, "b"))
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        driver.submit(name, prompt, 2)
    driver.run()
    assert driver.answer("a").error == "admitting it failed: RuntimeError: a bug"
    assert driver.answer("b").error == "starting it failed: RuntimeError: a bug"
    assert driver.answer("c").finish_reason is FinishReason.ANSWERED
    assert not driver.system.tiers.handles and driver.system.tiers.reserved_bytes == 0


def test_what_cannot_be_counted_in_its_workflow_is_answered_all_the_same(make_driver, ring, monkeypatch, caplog):
    driver = make_driver("ste", device=1000)
    ring(driver, ["a", "b"])
    monkeypatch.setattr(driver.system.predictor, "on_finish", lambda *_: 1 / 0)
    for name, prompt in (("r", A), ("s", B)):
        driver.submit(name, prompt, 2, workflow="ring", agent="a")
    driver.run()
    assert {ended.finish_reason for ended in driver.ended} == {FinishReason.ANSWERED}
    assert "the end of the request 'r' is not counted in its workflow" in caplog.text


def test_errors_in_predictions_and_prefetches_end_nothing(make_driver, monkeypatch, caplog):
    driver = make_driver("expected_time", device=1000)
    for part, name in ((driver.system.predictor, "push_values"), (driver.system.prefetcher, "start_prefetches")):
        monkeypatch.setattr(part, name, lambda *_, **__: 1 / 0)
    assert driver.serve("r", A, 2).finish_reason is FinishReason.ANSWERED
    assert driver.scheduler.metrics.predictions_failed > 0
    assert "predictions or prefetches were not updated" in caplog.text


def test_results_of_a_driver_that_make_no_sense_end_their_request_alone(make_driver):
    driver = make_driver(device=1000)
    for name, prompt in (("a", A), ("b", B), ("c", C)):
        driver.submit(name, prompt[:20], 2)
    batch = driver.begin()
    for item, tokens in zip(batch.prefills, ([-1], ["x"], [5]), strict=True):
        item.tokens = tokens
    driver.finish(batch)
    driver.run()
    assert "got token ids from -1 to -1" in driver.answer("a").error
    assert driver.answer("b").error.startswith("computing it failed: ValueError")
    assert driver.answer("c").finish_reason is FinishReason.ANSWERED


def test_pages_are_stored_as_chunks_end_and_as_answers_fill_them(make_driver):
    """An impatient client's retry goes on where the first attempt was; a conversation's answer is there, too."""
    driver = make_driver(device=1000)
    number = driver.submit("r", [*A, *B, 1], 9)
    batch = driver.begin()
    assert [(item.start, item.end, item.store) for item in batch.prefills] == [(0, 64, (0, 64))]
    driver.finish(batch)
    driver.scheduler.cancel(number)
    assert driver.cached([*A, *B]) == 64
    spans = []
    driver.submit("s", [*A, *B, 1], 6)
    while len(driver.scheduler):
        batch = driver.begin()
        for item in batch.prefills:
            assert (item.start, item.end, item.store) == (64, 81, (64, 80))
            item.tokens = [7]
        for item in batch.decodes:
            item.tokens = [7]
            span = item.store_span()
            spans.append(span)
            item.payload = None if span is None else PhantomPayload(span[1] - span[0], span[1] - span[0])
        driver.finish(batch)
        driver.scheduler.check()
    assert spans == [(80, 82), None, (82, 84), None, (84, 86)], "the last token has no KV"
    nodes = driver.system.tiers.lookup([*A, *B, 1, *[7] * 5]).nodes
    assert [node.length for node in nodes] == [86], "one node, however many chunks and pages it was stored in"
