"""The explanation of the cache, as clients get it: by field or header, whole and in streams, and of their own only."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tenure.serving import Compression
from tenure.serving.kvcache.eviction_history import MissReason
from tenure.serving.server.cache_explanation import TEXTS

from .conftest import Served
from .test_tenants import A, B, bearer

SYSTEM = {"role": "system", "content": "You are the planner, and you plan all day long, step by step."}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [SYSTEM, {"role": "user", "content": "Plan."}], "max_tokens": 2}
EXPLAIN = {"explain_cache": True}


def explained(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    document = response.json()
    found, usage = document["choices"][0]["cache"], document["usage"]
    assert found["prompt_tokens"] == usage["prompt_tokens"]
    assert found["reused_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == sum(found["reused"].values())
    computed = sum(span["end"] - span["start"] for span in found["computed"])
    assert found["reused_tokens"] + computed == found["prompt_tokens"]
    return found


def reasons(found: dict[str, Any]) -> list[str]:
    return [span["reason"] for span in found["computed"]]


def test_every_reason_has_a_text():
    assert TEXTS.keys() == set(MissReason) and all(TEXTS.values())


def test_field_and_header(served: Served):
    assert "cache" not in served.post("/chat/completions", CHAT).json()["choices"][0]
    found = explained(served.post("/chat/completions", CHAT | EXPLAIN))
    assert found["reused"]["device"] > 64 and reasons(found) == ["part_of_page"]
    assert min(found["queued_s"], found["loading_s"], found["shared_s"]) >= 0
    on, off = {"X-Tenure-Explain": "1"}, {"X-Tenure-Explain": "0"}
    assert explained(served.post("/chat/completions", CHAT, headers=on)) == found | {
        "queued_s": pytest.approx(0, abs=5)
    }
    plain = served.post("/chat/completions", CHAT | {"explain_cache": False}, headers=on)
    assert "cache" not in plain.json()["choices"][0], "the field precedes the header"
    assert "cache" not in served.post("/chat/completions", CHAT, headers=off).json()["choices"][0]
    for wrong in ({"headers": {"X-Tenure-Explain": "yes"}}, {"json": CHAT | {"explain_cache": "yes"}}):
        refused = served.post("/chat/completions", **({"json": CHAT} | wrong))
        assert refused.status_code == 400 and "accepted" in refused.json()["error"]["message"]


def test_completions_and_the_last_event_of_a_stream(served: Served):
    body = {"model": "tiny", "prompt": "Once upon a time, long before.", "max_tokens": 3, "n": 2, "stream": True}
    text = served.post("/completions", body | EXPLAIN).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    with_cache = [one for chunk in chunks for one in chunk["choices"] if "cache" in one]
    assert sorted(one["index"] for one in with_cache) == [0, 1]
    assert all(one["finish_reason"] for one in with_cache), "it comes with the reason of the end"


def test_the_openai_client_reads_it(served: Served):
    client = openai.OpenAI(base_url=served.url, api_key="none")
    answer = client.chat.completions.create(**CHAT, extra_body=EXPLAIN)
    assert answer.choices[0].model_extra["cache"]["prompt_tokens"] == answer.usage.prompt_tokens
    chunks = list(client.chat.completions.create(**CHAT, stream=True, extra_body=EXPLAIN))
    assert "cache" in (chunks[-1].choices[0].model_extra or {})


def test_evicted_for_another_agent_of_the_client(serve):
    served = serve(tokens=320)
    hints = {"X-Tenure-Agent": "first"}
    assert served.post("/chat/completions", CHAT, headers=hints).status_code == 200
    for number in range(8):  # more than device and host have room for
        body = {"model": "tiny", "prompt": f"{number}" * 200, "max_tokens": 1}
        assert served.post("/completions", body, headers={"X-Tenure-Agent": "second"}).status_code == 200
    found = explained(served.post("/chat/completions", CHAT | EXPLAIN, headers=hints))
    evicted = [span for span in found["computed"] if span["reason"] == "evicted"]
    assert evicted and all(span["evicted_for"] == "second" and span["seconds_ago"] >= 0 for span in evicted)


def test_flushed(served: Served):
    assert served.post("/chat/completions", CHAT).status_code == 200
    httpx.post(f"{served.root}/admin/flush")
    found = explained(served.post("/chat/completions", CHAT | EXPLAIN))
    assert reasons(found)[0] == "flushed" and 0 <= found["computed"][0]["seconds_ago"] < 60


def test_a_client_learns_nothing_about_another_one(serve, keys):
    served = serve(keys)
    assert served.post("/chat/completions", CHAT, headers=bearer(A)).status_code == 200
    theirs = explained(served.post("/chat/completions", CHAT | EXPLAIN, headers=bearer(B)))
    assert theirs["reused_tokens"] == 0 and reasons(theirs) == ["never_seen", "part_of_page"]
    httpx.post(f"{served.root}/admin/flush", headers=bearer("key-of-the-admin-0123456"))
    mine = explained(served.post("/chat/completions", CHAT | EXPLAIN, headers=bearer(A)))
    assert reasons(mine)[0] == "flushed"


def test_a_prompt_that_is_compressed_up_to_another_token(serve):
    served = serve(compression=Compression("retention", 0.5, sinks=2, recent=4))
    assert served.post("/chat/completions", CHAT).status_code == 200
    longer = [{"role": "system", "content": SYSTEM["content"] + " Then you rest for a while."}, CHAT["messages"][1]]
    found = explained(served.post("/chat/completions", CHAT | EXPLAIN | {"messages": longer}))
    assert found["reused_tokens"] == 0 and reasons(found)[0] == "other_compression"
    again = explained(served.post("/chat/completions", CHAT | EXPLAIN | {"messages": longer}))
    assert again["reused_tokens"] > 64 and reasons(again) == ["part_of_page"]
