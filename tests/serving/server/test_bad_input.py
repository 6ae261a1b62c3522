"""Whatever a client sends, it gets OpenAI's error object, and the server continues."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from tenure.serving.server import ServerConfig
from tenure.serving.server.api_keys import ApiKeys, Caller

TOOL_CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def with_fields(**fields: Any) -> dict[str, Any]:
    return CHAT | fields


def message(**fields: Any) -> dict[str, Any]:
    return CHAT | {"messages": [{"role": "user", "content": "hi"} | fields]}


def check(response: httpx.Response, status: int, text: str) -> dict[str, Any]:
    """The error object of a response."""
    assert response.status_code == status, response.text
    document = response.json()
    assert set(document) == {"error"} and set(document["error"]) == {"message", "type", "param", "code"}
    assert text in document["error"]["message"], document
    return document["error"]


BAD_CHATS = [
    ({}, "model"),
    ([], "got [] as the body; accepted: a JSON object"),
    ({"model": "tiny"}, "messages"),
    (with_fields(messages=[]), "messages"),
    (with_fields(messages="hi"), "messages"),
    (with_fields(model=7), "got 7 as model"),
    (message(role="function"), "messages[0].role; accepted: system, developer, user, assistant, tool"),
    (message(role="tool"), "messages[0]: got role tool"),
    (message(role="tool", tool_call_id="c1"), "messages[0].tool_call_id; accepted: the id of a call"),
    (message(tool_calls=[TOOL_CALL]), "messages[0]: got tool_calls in a message of role user"),
    (message(role="assistant", tool_calls=[TOOL_CALL | {"id": ""}]), "messages[0].tool_calls[0].id"),
    (message(role="assistant", tool_calls=[TOOL_CALL | {"type": "custom"}]), "tool_calls[0].type; accepted: function"),
    (message(content=None), "messages[0]: got no content"),
    (message(content=[]), "messages[0].content"),
    (message(content=[{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}]), "image_url"),
    (message(content=[{"type": "input_audio"}]), "input_audio"),
    (with_fields(temperature="hot"), "temperature"),
    (with_fields(temperature=-1), "temperature"),
    (with_fields(top_p=0), "top_p"),
    (with_fields(top_k=-2), "top_k"),
    (with_fields(min_p=2), "min_p"),
    (with_fields(top_k=2**40), "top_k"),
    (with_fields(min_tokens=2**70), "min_tokens"),
    (with_fields(presence_penalty=3), "presence_penalty"),
    (with_fields(frequency_penalty=-3), "frequency_penalty"),
    (with_fields(repetition_penalty=0), "repetition_penalty"),
    (with_fields(seed=2**70), "seed"),
    (with_fields(n=0), "n; accepted"),
    (with_fields(n=100), "accepted: up to 32 answers"),
    (with_fields(max_tokens=0), "max_tokens"),
    (with_fields(max_tokens=2**40), "max_tokens"),
    (with_fields(max_completion_tokens=5), "accepted: one of them"),
    (with_fields(stop=[""]), "stop"),
    (with_fields(stop=["x"] * 17), "stop"),
    (with_fields(stop="x" * 300), "stop"),
    (with_fields(stop_token_ids=[10**6]), "stop_token_ids"),
    (with_fields(logit_bias={"x": 1}), "logit_bias"),
    (with_fields(logit_bias={"5": 1000}), "logit_bias"),
    (with_fields(logit_bias={"100000": 1}), "logit_bias"),
    (with_fields(logprobs=3), "logprobs"),
    (with_fields(logprobs=True, top_logprobs=21), "top_logprobs"),
    (with_fields(top_logprobs=2), "accepted: with logprobs=true"),
    (with_fields(stream="yes"), "stream"),
    (with_fields(stream_options=3), "stream_options"),
    (with_fields(agent_hints={"step_index": "x"}), "agent_hints.step_index"),
    (with_fields(nvext=[]), "nvext"),
    (with_fields(kv_hints={"actions": [{}] * 2000}), "kv_hints.actions"),
]


def test_bad_chats_are_refused_and_the_server_goes_on(served):
    for body, text in BAD_CHATS:
        error = check(served.post("/chat/completions", body), 400, text)
        assert error["type"] == "invalid_request_error"
    assert served.unfinished() == 0
    assert served.post("/chat/completions", CHAT).status_code == 200


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


BAD_FORMS = [
    ({"tools": [{"type": "web_search"}]}, "tools[0].type; accepted: function"),
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "'no spaces' as the name of a function"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "accepted: object"),
    ({"tools": [TOOL, TOOL]}, "'f' twice in tools"),
    ({"tools": [TOOL | {"function": {"name": f"f{i}"}} for i in range(129)]}, "got 129 tools; accepted: up to 128"),
    ({"tool_choice": "required"}, "'required' without tools"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "accepted: one of the tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "type allowed_tools with no tool; accepted"),
    ({"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "'custom' as tool_choice.type"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "got 'custom' as tools[0].type; accepted: function"),
    ({"response_format": {"type": "xml"}}, "response_format.type; accepted: text, json_object"),
    ({"response_format": {"type": "json_schema"}}, "type json_schema without json_schema; accepted"),
    ({"response_format": schema_format([])}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format and guided_regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "accepted: one of them"),
    ({"tools": [{"type": "function", "name": "f"}]}, "tools[0]: got a tool without function; accepted: {"),
    ({"max_output_tokens": 3}, "max_output_tokens is a field of other endpoints; accepted: max_completion_tokens"),
    ({"input": "hi"}, "input is a field of other endpoints; accepted: messages"),
    ({"guided_regex": r"[^\s\S]"}, "no text is allowed"),
    ({"structured_outputs": {"whitespace_pattern": "a"}}, "structured_outputs.whitespace_pattern' is not supported"),
    ({"guided_json": "no json"}, "a schema that is no JSON"),
    ({"guided_regex": "("}, "cannot be enforced"),
    ({"guided_regex": "(?=a)b"}, "cannot be enforced"),
    ({"guided_regex": "a" * 5000}, "a regular expression of 5000 characters; accepted: 1 to 4096"),
    ({"guided_choice": []}, "got 0 choices"),
    ({"guided_grammar": "root ::= missing"}, "cannot be enforced"),
    ({"guided_grammar": "a" * 70_000}, "accepted: up to 65536"),
    ({"response_format": schema_format({"not": {"type": "string"}})}, "the keyword 'not' in the schema"),
    ({"response_format": schema_format({"type": "array", "items": {"minLenght": 2}})}, "'minLenght' in the"),
    ({"response_format": schema_format({"x-guidance": {"lenient": True}})}, "the keyword 'x-guidance'"),
    ({"response_format": schema_format({"$ref": "http://127.0.0.1/x"})}, "accepted: a place in the schema"),
    ({"response_format": schema_format({"$ref": "#/$defs/none"})}, "cannot be enforced"),
    ({"response_format": schema_format({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})}, "Circular"),
    ({"response_format": schema_format({"enum": ["x" * 70_000]})}, "bytes as the schema; accepted: up to 65536"),
    ({"chat_template_kwargs": {"date_string": "x"}}, "chat_template_kwargs.date_string' is not supported"),
]  # fmt: skip


def test_bad_tools_and_forms_are_refused_and_the_server_goes_on(served):
    for fields, text in BAD_FORMS:
        error = check(served.post("/chat/completions", with_fields(**fields)), 400, text)
        assert error["type"] == "invalid_request_error"
    assert served.post("/chat/completions", CHAT).status_code == 200
    body = {"model": "tiny", "prompt": "x", "tools": [TOOL]}
    assert check(served.post("/completions", body), 400, "tools is not supported")["param"] == "tools"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("guided_decoding_backend", "outlines"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content"}),
        ("web_search_options", {}),
        ("chat_template", "{{ 1 }}"),
        ("structural_tag", {}),
        ("best_of", 2),
        ("echo", True),
        ("suffix", "x"),
    ],
)
def test_unsupported_fields_are_refused_by_name(served, field, value):
    error = check(served.post("/chat/completions", with_fields(**{field: value})), 400, f"{field} is not supported")
    assert error["param"] == field and error["code"] == "unsupported_parameter"


def test_fields_that_ask_for_nothing_are_accepted(served):
    nothing = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "someone", "store": False,
        "metadata": {"a": "b"}, "stop": None, "logit_bias": None, "n": None, "temperature": None, "suffix": None,
    }  # fmt: skip
    assert served.post("/chat/completions", with_fields(**nothing)).status_code == 200


def test_what_clients_of_agent_frameworks_send_is_accepted(served):
    parts = [{"type": "text", "text": "Plan."}, {"type": "text", "text": "Briefly."}]
    messages = [
        {"role": "developer", "content": parts, "name": "desk"}, {"role": "user", "content": parts},
        {"role": "assistant", "content": "", "refusal": None, "annotations": [], "audio": None, "function_call": None,
         "tool_calls": [TOOL_CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": parts}, {"role": "assistant", "content": parts},
        {"role": "user", "content": "Go on."},
    ]  # fmt: skip
    body = {
        "model": "tiny", "messages": messages, "max_completion_tokens": 2, "stream_options": {"include_usage": True},
        "stream": True, "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "u", "tools": [TOOL],
        "parallel_tool_calls": True, "tool_choice": "auto", "reasoning_effort": "low", "verbosity": "low",
        "functions": None, "audio": None, "prediction": None, "response_format": {"type": "text"}, "logit_bias": {},
        "prompt_cache_key": "k", "safety_identifier": "s",
    }  # fmt: skip
    found = served.post("/chat/completions", body)
    assert found.status_code == 200 and found.text.endswith("data: [DONE]\n\n"), found.text
    assert '"usage"' in found.text and '"error"' not in found.text


def test_unknown_fields_warn_once(served, caplog):
    for n in (1, 3):
        turns = [{"role": "user", "content": "hi", "surprise": 1}] * n
        assert served.post("/chat/completions", with_fields(surprise=1, messages=turns)).status_code == 200
    assert [record.getMessage() for record in caplog.records if "surprise" in record.getMessage()] == [
        "unknown fields of requests are ignored: 'messages[].surprise', 'surprise'"
    ]


def test_bad_completions(served):
    for prompt in (None, 3, [], {}, [["x"]], ["a", 3], [[]], [-1], [10**6]):
        check(served.post("/completions", {"model": "tiny", "prompt": prompt}), 400, "accepted")
    check(
        served.post("/completions", {"model": "tiny", "prompt": ["a"] * 33}), 400, "got 33 prompts; accepted: up to 32"
    )
    check(served.post("/completions", {"model": "tiny", "prompt": ""}), 400, "prompt")


def test_bodies_that_are_no_json_or_too_deep(served):
    url = f"{served.url}/chat/completions"
    utf16 = json.dumps(CHAT).encode("utf-16")
    for raw in (b"", b"{", b"\xff\xfe", utf16, b'{"model": NaN}', b"[" * 100_000, b"1" * 5000):
        check(httpx.post(url, content=raw), 400, "")
    deep: Any = "x"
    for _ in range(49):
        deep = [deep]
    check(served.post("/chat/completions", with_fields(metadata=deep)), 400, "nested deeper than 48 levels")


def test_halves_of_characters(served):
    for raw in (rb'"\ud800"', rb'"\udc00\ud800"', b'"\xed\xa0\x80"'):
        body = b'{"model": "tiny", "messages": [{"role": "user", "content": %s}], "max_tokens": 1}' % raw
        check(httpx.post(f"{served.url}/chat/completions", content=body), 400, "accepted")
        check(httpx.post(f"{served.url}/workflows", content=b'{"workflow": %s}' % raw), 400, "accepted")
    yaml = {"content": rb'workflow: "\ud800"', "headers": {"Content-Type": "text/yaml"}}
    check(httpx.post(f"{served.url}/workflows", **yaml), 400, "accepted: whole characters")
    whole = rb'{"model": "tiny", "messages": [{"role": "user", "content": "\ud83d\ude00"}], "max_tokens": 1}'
    assert httpx.post(f"{served.url}/chat/completions", content=whole).status_code == 200


def test_a_body_that_is_too_long(serve):
    served = serve(config=ServerConfig(max_body_bytes=1000, drain_s=5.0))
    check(served.post("/chat/completions", message(content="x" * 2000)), 413, "accepted: up to 1000")

    def chunks():
        for _ in range(20):
            yield b"x" * 100

    response = httpx.post(f"{served.url}/chat/completions", content=chunks())  # without a content-length
    check(response, 413, "accepted: up to 1000")
    assert served.post("/chat/completions", CHAT).status_code == 200


def test_a_body_that_does_not_arrive(serve):
    served = serve(config=ServerConfig(body_timeout_s=0.2, drain_s=5.0))
    port = int(served.root.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = slow.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400") and served.post("/chat/completions", CHAT).status_code == 200


def test_a_client_with_too_many_bodies_under_way_is_asked_to_wait(serve):
    served = serve(config=ServerConfig(max_client_bodies=1, drain_s=5.0))
    with socket.create_connection(("127.0.0.1", int(served.root.rpartition(":")[2])), timeout=10) as slow:
        slow.sendall(b"POST /v1/workflows HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        served.until(lambda: served.post("/chat/completions", CHAT).status_code == 429)
        check(served.post("/completions", CHAT), 429, "got 1 bodies while 1 are in progress; accepted: up to 1 at once")
    served.until(lambda: served.post("/chat/completions", CHAT).status_code == 200)


def test_bodies_are_counted_by_address_without_keys_and_by_client_with_them(serve):
    key_of_a, config = "key-of-team-a-0123456789", ServerConfig(max_client_bodies=1, drain_s=5.0)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
    for served, key in (
        (serve(config=config), ""),
        (serve(ApiKeys({key_of_a: Caller("a", False)}), config=config), key_of_a),
    ):
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        lines = "".join(f"{name}: {value}\r\n" for name, value in authorization.items()).encode()
        address = ("127.0.0.1", int(served.root.rpartition(":")[2]))
        here, there = (
            httpx.Client(base_url=served.url, transport=httpx.HTTPTransport(local_address=one), headers=authorization)
            for one in ("127.0.0.1", "127.0.0.2")
        )
        with here, there, socket.create_connection(address, 10, ("127.0.0.1", 0)) as slow:
            slow.sendall(head + lines + b"\r\n{")
            served.until(lambda ask=here: ask.post("/chat/completions", json=CHAT).status_code == 429)
            assert there.post("/chat/completions", json=CHAT).status_code == (429 if key else 200)


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_connections_without_the_head_of_a_request_are_closed(serve, sent):
    served = serve(config=ServerConfig(head_timeout_s=0.3, keep_alive_s=1, drain_s=5.0))
    with socket.create_connection(("127.0.0.1", int(served.root.rpartition(":")[2])), timeout=10) as silent:
        silent.sendall(sent)
        if sent.endswith(b"\r\n\r\n"):
            answer = b""
            while not answer.endswith(b"}"):
                answer += silent.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")
            silent.sendall(b"GET /he")  # the next one
        assert silent.recv(4096) == b""


def test_headers_that_are_too_long(served):
    response = served.post("/chat/completions", CHAT, headers={"X-Long": "x" * 100_000})
    check(response, 431, "accepted: up to 32768")
    error = check(
        served.post("/chat/completions", CHAT, headers={"X-Tenure-Agent": "x" * 300}), 400, "the agent in the header"
    )
    assert "accepted: a string of 1 to 256 characters" in error["message"]


def test_paths_and_methods_that_there_are_not(served):
    check(httpx.get(f"{served.root}/v1/nothing"), 404, "got GET /v1/nothing; accepted: POST /v1/chat/completions")
    check(httpx.get(f"{served.root}/v1/chat/completions"), 405, "got GET /v1/chat/completions")
    check(httpx.post(f"{served.root}/v1/embeddings", json={}), 404, "POST /v1/responses")


def test_a_page_of_another_site_is_refused(served):
    error = check(served.post("/chat/completions", CHAT, headers={"Origin": "http://evil.example"}), 403, "evil")
    assert error["code"] == "cross_origin"
    response = httpx.post(f"{served.root}/admin/flush", headers={"Origin": "http://evil.example"})
    check(response, 403, "accepted: pages of this server")
    assert served.post("/chat/completions", CHAT, headers={"Origin": served.root}).status_code == 200


def test_pages_of_another_site_may_use_a_key(serve, keys):
    headers = {"Origin": "http://app.example", "Authorization": "Bearer key-of-team-a-0123456789"}
    assert serve(keys).post("/chat/completions", CHAT, headers=headers).status_code == 200


def test_the_description_of_the_endpoints(served):
    paths = httpx.get(f"{served.root}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= paths.keys()


def test_prompts_beyond_the_context(served):
    for stream in (False, True):
        body = message(content="x" * 4000) | {"stream": stream}
        assert check(served.post("/chat/completions", body), 400, "2048")["code"] == "context_length_exceeded"


def test_a_client_with_too_many_requests_is_asked_to_wait(serve):
    served = serve(config=ServerConfig(max_client_requests=2, drain_s=5.0))
    held = threading.Event()
    served.engine.between = held.wait
    try:
        waiting = threading.Thread(target=served.post, args=("/chat/completions", with_fields(n=2)))
        waiting.start()
        served.until(lambda: served.unfinished() == 2)
        response = served.post("/chat/completions", CHAT)
        error = check(response, 429, "accepted: up to 2 at once")
        assert error["code"] == "rate_limit_exceeded" and response.headers["Retry-After"] == "1"
    finally:
        held.set()
    waiting.join()
    assert served.post("/chat/completions", CHAT).status_code == 200


def test_a_full_queue_is_status_429(serve):
    from tenure.serving import SchedulerConfig

    served = serve(scheduler_config=SchedulerConfig(max_queued_requests=1))
    held, waits = threading.Event(), threading.Event()

    def hold() -> None:
        waits.set()
        held.wait()

    served.engine.between = hold
    assert waits.wait(20), "the engine takes all requests together"
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(served.post("/chat/completions", CHAT))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    served.until(lambda: served.unfinished() == 4)
    held.set()
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused and all(check(answer, 429, "the queue is full") for answer in refused)


def test_a_failure_of_the_engine_is_status_500_and_concerns_one_request(served, monkeypatch, caplog):
    def failing(*_: Any) -> None:
        raise RuntimeError("secret of the operator")

    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "_begin_answer", failing)
        answer = served.post("/chat/completions", CHAT)
        check(answer, 500, "the operator's log says why")
        assert "secret" not in answer.text
        streamed = served.post("/chat/completions", with_fields(stream=True))
        check(streamed, 500, "the operator's log says why")
    assert served.post("/chat/completions", CHAT).status_code == 200


def test_a_dead_engine_is_status_503(served):
    def dying() -> None:
        raise RuntimeError("secret of the operator")

    served.engine.between = dying
    served.until(lambda: not served.client.health().alive)
    response = served.post("/chat/completions", CHAT)
    check(response, 503, "the engine has stopped")
    assert "secret" not in response.text and "Retry-After" in response.headers
    health = httpx.get(f"{served.root}/health")
    assert health.status_code == 503 and health.json() == {"status": "dead"}


def test_a_request_that_times_out(serve):
    from tenure.serving import SchedulerConfig

    served = serve(scheduler_config=SchedulerConfig(timeout_s=0.3))
    served.engine.between = lambda: time.sleep(0.05)
    error = check(served.post("/chat/completions", with_fields(max_tokens=1000, ignore_eos=True)), 503, "0.3 s")
    assert error["code"] == "timed_out"
    body = with_fields(max_tokens=1000, ignore_eos=True, stream=True)
    with httpx.stream("POST", f"{served.url}/chat/completions", json=body, timeout=30) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] == "timed_out" and len(events) > 1
