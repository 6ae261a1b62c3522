"""Clients by their keys: what is shared inside a client, and that nothing is across clients."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import httpx
import pytest

from tenure.serving.server import ApiKeys, Caller
from tenure.serving.server import api_keys as api_keys_module

A, B, ADMIN = "key-of-team-a-0123456789", "key-of-team-b-0123456789", "key-of-the-admin-0123456"
SYSTEM = {"role": "system", "content": "You are the planner, and you plan all day long, step by step."}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [SYSTEM, {"role": "user", "content": "Plan."}], "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def cached(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_prompts_are_shared_inside_a_client_and_never_across(serve, keys):
    served = serve(keys)
    found = [cached(served.post("/chat/completions", CHAT, headers=bearer(key))) for key in (A, B, A, B)]
    assert found[:2] == [0, 0] and min(found[2:]) > 64


def test_a_group_of_clients_shares_its_prompts_and_nobody_else_finds_them(serve):
    shared = {A: Caller("team-a", False, "lab"), B: Caller("team-b", False, "lab"), ADMIN: Caller("lab", False)}
    served = serve(ApiKeys(shared))
    first, second, outside = (served.post("/chat/completions", CHAT, headers=bearer(key)) for key in (A, B, ADMIN))
    assert cached(first) == cached(outside) == 0 and cached(second) > 64, "a client may be named like the group"


def test_answers_are_the_same_whoever_has_computed_the_prompt(serve, keys):
    served = serve(keys)
    greedy = CHAT | {"temperature": 0, "max_tokens": 6}
    found = [served.post("/chat/completions", greedy, headers=bearer(key)).json() for key in (A, B)]
    for one in found:
        assert one.pop("id") and one.pop("created")
    assert found[0] == found[1], "nothing in it says that another client has sent the same"


@pytest.mark.parametrize("field", ["cache_salt", "nvext"])
def test_a_salt_divides_the_space_of_a_client(serve, keys, field):
    served = serve(keys)
    salted = [CHAT | {field: salt if field == "cache_salt" else {"cache_salt": salt}} for salt in ("x", "y")]
    bodies = [CHAT, *salted, CHAT, *salted]
    found = [cached(served.post("/chat/completions", body, headers=bearer(A))) for body in bodies]
    assert found[:3] == [0, 0, 0] and min(found[3:]) > 64
    assert cached(served.post("/chat/completions", salted[0], headers=bearer(B))) == 0
    refused = served.post("/chat/completions", CHAT | {"cache_salt": ""}, headers=bearer(A))
    assert refused.status_code == 400 and "cache_salt" in refused.json()["error"]["message"]


@pytest.mark.parametrize("hint", ["agent", "session", "workflow"])
def test_no_name_reaches_into_another_client(serve, keys, hint):
    served = serve(keys)
    headers = {f"X-Tenure-{hint.title()}": "shared"}
    assert cached(served.post("/chat/completions", CHAT, headers=bearer(A) | headers)) == 0
    assert cached(served.post("/chat/completions", CHAT, headers=bearer(B) | headers)) == 0
    assert cached(served.post("/chat/completions", CHAT, headers=bearer(A) | headers)) > 64


def test_requests_without_a_known_key_are_refused(serve, keys):
    served = serve(keys)
    calls = [
        ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"), ("POST", "/v1/workflows"), ("DELETE", "/v1/workflows/x"),
        ("PUT", "/v1/sessions/x"), ("DELETE", "/v1/sessions/x"),
        ("GET", "/metrics"), ("POST", "/admin/flush"),
    ]  # fmt: skip
    wrong = ({}, bearer("wrong"), {"Authorization": A}, {"Authorization": f"Basic {A}"}, bearer(A + "x"), bearer("ü"))
    for method, path in calls:
        for headers in wrong[: len(wrong) if path == "/v1/models" else 2]:
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            response = httpx.request(method, f"{served.root}{path}", headers=raw)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["WWW-Authenticate"] == "Bearer"
    assert httpx.get(f"{served.root}/health").json() == {"status": "ok"}


def test_metrics_and_flush_are_for_an_admin(serve, keys):
    served = serve(keys)
    for method, path in (("GET", "/metrics"), ("POST", "/admin/flush")):
        refused = httpx.request(method, f"{served.root}{path}", headers=bearer(A))
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "no_admin"
        assert httpx.request(method, f"{served.root}{path}", headers=bearer(ADMIN)).status_code == 200


def test_every_key_is_compared_in_constant_time(keys, monkeypatch):
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return compare(a, b)

    monkeypatch.setattr(api_keys_module.hmac, "compare_digest", counting)
    assert keys.caller(f"Bearer {A}").client == "team-a"
    assert len(compared) == 3 and len(set(map(len, compared))) == 1


def test_a_file_of_keys(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(f"# client key\n\nteam-a {A}\nteam-a {B}\noperator  {ADMIN} admin\n")
    keys = ApiKeys.from_file(path)
    assert keys.required and keys.caller(f"bearer {B}").client == "team-a"
    assert keys.require_admin(f"Bearer {ADMIN}").client == "operator"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got no key"),
        ("team-a short", "in line 1 of"),
        (f"team/a {A}", "in line 1 of"),
        (f"team-a {A} boss", "in line 1 of"),
        (f"team-a {A} admin more", "in line 1 of"),
        ("team-a", "in line 1 of"),
        (f"\nteam-a {A}\nteam-b {A}", "line 3"),
        (f"team-a {A}ü", "in line 1 of"),
    ],
)
def test_files_of_keys_that_are_refused(tmp_path: Path, text, message):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        ApiKeys.from_file(path)
    assert A not in str(refused.value)
