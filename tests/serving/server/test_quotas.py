"""Quotas of clients: buckets, what is taken and given back, refusals with the time to wait, and the file of keys."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tenure.serving import Request
from tenure.serving.server import ApiKeys, Caller, ClientLimits, ServerConfig
from tenure.serving.server.api_errors import ApiError
from tenure.serving.server.quotas import Admission, Quotas, TokenBucket, duration_text

A, B, ADMIN = "key-of-team-a-0123456789", "key-of-team-b-0123456789", "key-of-the-admin-0123456"
CALLERS = {A: Caller("team-a", False), B: Caller("team-b", False), ADMIN: Caller("operator", True)}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Plan."}], "max_tokens": 4}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def request(prompt: int, answer: int, id: str = "r") -> Request:
    return Request(id, [1] * prompt, answer, client="team-a")


def test_a_bucket_is_refilled_continuously_up_to_a_minutes_worth(clock):
    bucket = TokenBucket(600, clock)
    bucket.add(-500)
    assert bucket.level() == 100 and bucket.wait_s(100) == 0 and bucket.wait_s(150) == 5
    clock.now = 5.0
    assert bucket.level() == 150 and bucket.wait_s(600) == 45
    clock.now = 1000.0
    assert bucket.level() == 600
    bucket.add(-400)
    bucket.resize(1200)
    assert bucket.level() == 800, "what has been used counts on"
    bucket.resize(300)
    assert bucket.level() == -100


def test_what_is_not_used_is_given_back(clock):
    quotas = Quotas(lambda _: ClientLimits(tokens_per_min=600), 512, clock)
    with quotas.admitted([request(100, 50), request(100, 50)]) as admission:  # two answers to one prompt
        assert admission.headers == {
            "x-ratelimit-limit-tokens": "600",
            "x-ratelimit-remaining-tokens": "400",
            "x-ratelimit-reset-tokens": "20s",
        }
        admission.computed(0, 10, None)
        admission.computed(1, 3, None)
        admission.computed(0, 2, None)
    with quotas.admitted([request(1, 1)]) as admission:
        assert admission.headers["x-ratelimit-remaining-tokens"] == str(600 - 115 - 2)


def test_what_the_engine_refuses_is_free_and_what_a_client_gives_up_is_not(clock):
    for refused, left in ((True, 600), (False, 500)):
        quotas = Quotas(lambda _: ClientLimits(tokens_per_min=600), 512, clock)
        with quotas.admitted([request(100, 50)]) as admission:
            if refused:
                admission.refused()
        with quotas.admitted([request(1, 1)]) as admission:
            assert admission.headers["x-ratelimit-remaining-tokens"] == str(left - 2)
    late = Admission({}, 100)
    late.computed(0, 1, None)
    late.refused()  # after its first token
    assert late.tokens == 101


def test_a_quota_that_is_used_up_says_when_to_come_again(clock):
    quotas = Quotas(lambda _: ClientLimits(tokens_per_min=600, requests_per_min=60), 512, clock)
    with quotas.admitted([request(400, 100)]) as admission:
        admission.computed(0, 100, None)
    with pytest.raises(ApiError, match="while 100 are left; accepted: 600 a minute, so again in 10 s") as refused:
        quotas.admitted([request(100, 100)]).__enter__()
    headers = refused.value.headers(1)
    assert refused.value.status == 429 and headers["Retry-After"] == "10"
    assert headers["x-ratelimit-remaining-tokens"] == "100" and headers["x-ratelimit-remaining-requests"] == "59"
    clock.now = 10.0
    with quotas.admitted([request(100, 100)]):
        pass


def test_a_request_beyond_the_whole_quota_is_no_matter_of_time(clock):
    quotas = Quotas(lambda _: ClientLimits(tokens_per_min=100), 512, clock)
    with pytest.raises(
        ApiError, match="may take 101 tokens, with its prompt and answers; accepted: up to 100"
    ) as refused:
        quotas.admitted([request(100, 1)]).__enter__()
    assert refused.value.status == 400 and refused.value.code == "quota_exceeded"
    with quotas.admitted([request(99, 1)]):
        pass


def test_a_refusal_takes_nothing(clock):
    limits = ClientLimits(tokens_per_min=100, requests_per_min=2, concurrency=1)
    quotas = Quotas(lambda _: limits, 512, clock)
    with quotas.admitted([request(10, 10)]):
        for _ in range(5):
            with pytest.raises(ApiError, match="got 1 answers while 1 are in progress; accepted: up to 1 at once"):
                quotas.admitted([request(1, 1)]).__enter__()
    with quotas.admitted([request(1, 1)]) as admission:
        assert admission.headers["x-ratelimit-remaining-requests"] == "0"


def test_limits_may_change_and_end(clock):
    limits = [ClientLimits(tokens_per_min=100)]
    quotas = Quotas(lambda _: limits[0], 512, clock)
    with quotas.admitted([request(50, 50)]) as admission:
        admission.computed(0, 50, None)
    limits[0] = ClientLimits(tokens_per_min=200)
    with quotas.admitted([request(50, 50)]) as admission:
        assert admission.headers["x-ratelimit-remaining-tokens"] == "0"
    limits[0] = ClientLimits()
    with quotas.admitted([request(500, 500)]) as admission:
        assert not admission.headers


def test_durations_are_written_as_openai_does():
    found = [duration_text(seconds) for seconds in (0, 0.0004, 0.25, 1, 59.2, 60, 361)]
    assert found == ["0ms", "1ms", "250ms", "1s", "1m0s", "1m0s", "6m1s"]


def test_a_client_with_a_quota_is_served_within_it(serve):
    keys = ApiKeys(CALLERS, {"team-a": ClientLimits(tokens_per_min=300, requests_per_min=60)})
    served = serve(keys)
    first = served.post("/chat/completions", CHAT | {"ignore_eos": True}, headers=bearer(A))
    assert first.status_code == 200, first.text
    used = first.json()["usage"]["total_tokens"]
    assert first.headers["x-ratelimit-limit-tokens"] == "300" and first.headers["x-ratelimit-limit-requests"] == "60"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) >= 300 - used
    with httpx.stream(
        "POST", f"{served.url}/chat/completions", json=CHAT | {"stream": True}, headers=bearer(A), timeout=60
    ) as stream:
        assert "x-ratelimit-remaining-tokens" in stream.headers
        stream.read()
    long = CHAT | {"max_tokens": 240}
    responses = [served.post("/chat/completions", long | {"ignore_eos": True}, headers=bearer(A)) for _ in range(2)]
    refused = responses[-1]
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    beyond = served.post("/chat/completions", CHAT | {"max_tokens": 400}, headers=bearer(A))
    assert beyond.status_code == 400 and beyond.json()["error"]["code"] == "quota_exceeded"
    others = served.post("/chat/completions", CHAT | {"max_tokens": 400}, headers=bearer(B))
    assert others.status_code == 200 and "x-ratelimit-limit-tokens" not in others.headers


def test_a_chat_without_a_number_of_tokens_gets_what_the_quota_has(serve):
    served = serve(ApiKeys(CALLERS, {"team-a": ClientLimits(tokens_per_min=120)}))
    body = {name: value for name, value in CHAT.items() if name != "max_tokens"} | {"ignore_eos": True, "n": 2}
    usage = served.post("/chat/completions", body, headers=bearer(A)).json()["usage"]
    assert 100 < usage["total_tokens"] <= 120


def test_answers_at_once(serve):
    served = serve(ApiKeys(CALLERS, {"team-a": ClientLimits(concurrency=2)}))
    go = threading.Event()
    served.engine.between = lambda: go.wait(20)
    try:
        found: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: found.append(served.post("/chat/completions", CHAT, headers=bearer(A))))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        served.until(lambda: served.unfinished() == 2)
        refused = served.post("/chat/completions", CHAT, headers=bearer(A))
        assert refused.status_code == 429 and "up to 2 at once" in refused.json()["error"]["message"]
        assert refused.headers["Retry-After"] == "1"
        several = served.post("/chat/completions", CHAT | {"n": 3}, headers=bearer(A))
        assert several.status_code == 400 and "got 3 answers" in several.json()["error"]["message"]
    finally:
        go.set()
    for thread in threads:
        thread.join()
    assert [one.status_code for one in found] == [200, 200]


def test_a_file_with_quotas_and_groups(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(
        f"team-a {A} tokens_per_min=10000 share=lab\nteam-a {B} concurrency=4 tokens_per_min=10000\n"
        f"operator {ADMIN} admin requests_per_min=7\n"
    )
    keys = ApiKeys.from_file(path)
    assert keys.limits("team-a") == ClientLimits(tokens_per_min=10000, concurrency=4)
    assert keys.limits("operator") == ClientLimits(requests_per_min=7) and keys.limits("nobody") == ClientLimits()
    assert keys.caller(f"Bearer {B}") == Caller("team-a", False, "lab"), "options belong to the client"
    assert keys.caller(f"Bearer {ADMIN}") == Caller("operator", True)
    path.write_text(f"team-b {B} tokens_per_min=5\n")
    keys.reload()
    assert keys.caller(f"Bearer {B}").client == "team-b" and keys.limits("team-a") == ClientLimits()
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="in line 1 of"):
        keys.reload()
    assert keys.caller(f"Bearer {B}").client == "team-b", "a file that cannot be read changes nothing"
    with pytest.raises(ValueError, match="got keys without a file"):
        ApiKeys(CALLERS).reload()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("tokens_per_min=0", "line 1"),
        ("tokens_per_min=-5", "line 1"),
        ("tokens_per_min=1e3", "line 1"),
        ("tokens_per_min=", "line 1"),
        ("tokens_per_min=1 tokens_per_min=1", "line 1"),
        ("tokens_per_min=1234567890123", "line 1"),
        ("share=a/b", "line 1"),
        ("share=", "line 1"),
        ("color=red", "line 1"),
        ("admin admin", "line 1"),
        (f"concurrency=2\nteam-a {B} concurrency=3", "got concurrency=3 in line 2 of .* after concurrency=2"),
        (f"share=x\nteam-a {B} share=y", "got share=y in line 2"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, options, message):
    path = tmp_path / "keys"
    path.write_text(f"team-a {A} {options}\n")
    with pytest.raises(ValueError, match=message) as refused:
        ApiKeys.from_file(path)
    assert A not in str(refused.value) and B not in str(refused.value)


def test_metrics_of_clients(serve):
    served = serve(
        ApiKeys(CALLERS, {"team-a": ClientLimits(requests_per_min=1)}), ServerConfig(drain_s=5.0, max_metric_clients=1)
    )
    statuses = [served.post("/chat/completions", CHAT, headers=bearer(A)).status_code for _ in range(2)]
    assert statuses == [200, 429]
    assert served.post("/chat/completions", CHAT, headers=bearer(B)).status_code == 200
    assert served.post("/chat/completions", CHAT, headers=bearer("x" * 20)).status_code == 401
    text = httpx.get(f"{served.root}/metrics", headers=bearer(ADMIN)).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("tenure_client"))
    assert values['tenure_client_requests_total{client="team-a",status="200"}'] == "1.0"
    assert values['tenure_client_requests_total{client="team-a",status="429"}'] == "1.0"
    assert values['tenure_client_requests_total{client="(others)",status="200"}'] == "1.0"
    assert float(values['tenure_client_tokens_total{client="team-a",kind="prompt"}']) > 10
    assert 1 <= float(values['tenure_client_tokens_total{client="team-a",kind="answer"}']) <= 4
    assert not any("401" in name or "team-b" in name for name in values)
