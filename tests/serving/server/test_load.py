"""A server under load for a few seconds, killed and restarted; and that a load notices what is wrong."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tenure.scripts import cli
from tenure.scripts.soak import run_serve_soak
from tenure.scripts.soak.expected_answers import Catalog, ExpectedCall, make_catalog
from tenure.scripts.soak.http_clients import HttpLoad
from tenure.scripts.soak.run_serve_soak import KEEP, ServeSoakConfig, log_faults, memory_growth, soak, summary
from tenure.scripts.soak.tiny_served import character_tokenizer, make_tiny_served


def test_a_short_load_with_a_kill(tmp_path: Path):
    torch.manual_seed(0)
    config = ServeSoakConfig(minutes=0.08, clients=12, calls=10, max_tokens=8)
    served = make_tiny_served(tmp_path)
    catalog = make_catalog(served, KEEP, config.calls, config.max_tokens, config.seed, "tiny")
    counts, watch = asyncio.run(soak(config, served, catalog, tmp_path))
    assert not counts.violations and not watch.violations
    assert counts.done["whole answer"] and counts.done["stream"] and counts.cached_tokens
    assert watch.restarts and watch.reread, "prompts were found on disk after a kill"
    assert summary(counts, watch, catalog)["violations"] == 0


CALL = ExpectedCall("/chat/completions", {"model": "tiny"}, None, ("abc",), ("stop",), (3,), 7)
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}}


def whole(text: str = "abc", reason: str = "stop", usage: Any = USAGE) -> httpx.Response:
    choice = {"index": 0, "message": {"content": text}, "finish_reason": reason}
    return httpx.Response(200, json={"choices": [choice], "usage": usage})


def stream(*texts: str, done: bool = True, error: bool = False) -> httpx.Response:
    events: list[Any] = [{"choices": [{"index": 0, "delta": {"content": t}, "finish_reason": None}]} for t in texts]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    events.append({"error": {"message": "x"}} if error else {"choices": [], "usage": USAGE})
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"] * done
    return httpx.Response(200, text="".join(lines), headers={"content-type": "text/event-stream"})


def answered_with(response: httpx.Response, action: str, interrupted: bool = False) -> HttpLoad:
    """A load of one action, whose requests are all answered so."""

    async def run() -> HttpLoad:
        load = HttpLoad("http://127.0.0.1:1", Catalog([CALL], [[CALL]], 0), ["key"], "admin", 0)
        await load.close()

        def answer(request: httpx.Request) -> httpx.Response:
            load._stop_s = 0.0  # one action is enough
            if interrupted:
                load.interrupt()
            return response

        load._http = httpx.AsyncClient(base_url=load.root, transport=httpx.MockTransport(answer))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tenure.scripts.soak.http_clients.ACTIONS", {action: (getattr(HttpLoad, action), 1)})
            await load.run(1, 60.0)
        await load.close()
        return load

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("response", "action", "message"),
    [
        (whole("abd"), "whole_answer", "got ['abd'] instead of ['abc']"),
        (whole(reason="length"), "whole_answer", "ended by ['length'] instead of ('stop',)"),
        (whole(usage=USAGE | {"completion_tokens": 4}), "whole_answer", "'completion_tokens': 4"),
        (httpx.Response(503, json={"error": {}}), "whole_answer", "got 503"),
        (httpx.Response(429, json={"error": {}}), "stream", "got 429"),
        (stream("ab", "d"), "stream", "got ['abd'] instead of ['abc']"),
        (stream("abc", done=False), "slow_reader", "ended without [DONE]"),
        (stream("abc", error=True), "stream", "a stream failed"),
        (stream("x"), "cancelled_stream", "began with 'x' instead of 'abc'"),
        (httpx.Response(200), "bad_body", "got 200"),
    ],
)
def test_a_wrong_answer_is_a_violation_unless_the_server_was_killed(response, action, message):
    found = answered_with(response, action).counts
    assert len(found.violations) == 1 and message in found.violations[0] and not found.done
    excused = answered_with(response, action, interrupted=True).counts
    assert excused.excused == 1 and not excused.violations


@pytest.mark.parametrize(
    ("response", "action"),
    [(whole(), "whole_answer"), (stream("a", "bc"), "stream"), (stream("a"), "cancelled_stream")],
)
def test_the_right_answer_is_none(response, action):
    found = answered_with(response, action).counts
    assert found.done == {action: 1} and not found.violations


def test_growing_memory_and_faults_in_the_log_are_violations():
    flat = [(float(i), 100 << 20) for i in range(100)]
    grown = [(float(i), (100 + i) << 20) for i in range(100)]
    assert memory_growth(flat) == [] and memory_growth(flat[:5]) == []
    assert memory_growth(grown) == ["the server's memory has grown from 140 to 190 MiB"]
    assert log_faults("serving tiny\nWARNING x: unknown fields\n") == []
    assert log_faults("ERROR tenure: the engine\nTraceback (most recent call last):\n") == [
        "the server's log has 2 faults, the first: ERROR tenure: the engine"
    ]


def test_a_run_with_violations_fails(monkeypatch, capsys):
    async def failing(*_: object) -> Any:
        load = answered["wrong"]
        return load.counts, run_serve_soak.ServerWatch()

    answered = {"wrong": answered_with(whole("x"), "whole_answer")}
    monkeypatch.setattr(run_serve_soak, "soak", failing)
    monkeypatch.setattr(run_serve_soak, "make_catalog", lambda *_: Catalog([], [], 0))
    assert cli.main(["soak", "serve"]) == 1
    assert "violation: whole_answer by client 0" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main(["soak", "serve", "--minutes", "0"])
    assert end.value.code == 2


def test_texts_of_the_tiny_model_are_its_tokens():
    tokenizer, text = character_tokenizer(), 'x {"a": 1}\n\tq?  z'
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
