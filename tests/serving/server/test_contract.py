"""The served OpenAPI document, and the server against it: generated requests, of which none is a failure of the server.

`TENURE_API_EXAMPLES=500 python -m pytest tests/serving/server/test_contract.py` tries more requests of each endpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tenure.serving.server import ApiKeys, Backend, Caller, build_app
from tenure.serving.server.api_requests import HINT_FIELDS, UNSUPPORTED, WITHOUT_EFFECT, ChatBody, CompletionBody
from tenure.serving.server.openapi import OPERATIONS, SchemaBuilder
from tenure.serving.server.responses_body import STATEFUL, ResponsesBody
from tenure.serving.workflow.loaders import WorkflowDocument

EXAMPLES = int(os.environ.get("TENURE_API_EXAMPLES", "12"))  # of each endpoint
KEY = "key-of-team-a-0123456789"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Plan."}], "max_tokens": 4}


def check_error(response: Any) -> None:
    """Every refusal is OpenAI's error object."""
    if response.status_code >= 400 and response.status_code != 503:
        document = json.loads(response.content)
        assert set(document) == {"error"} and set(document["error"]) == {"message", "type", "param", "code"}
        assert document["error"]["message"] and "\n" not in document["error"]["message"]


def test_no_generated_request_is_a_failure_of_the_server(serve):
    schemathesis = pytest.importorskip("schemathesis", reason="it needs Python 3.11")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    wanted = [
        not_a_server_error, checks.content_type_conformance, checks.response_schema_conformance,
        checks.status_code_conformance,
    ]  # fmt: skip
    served = serve(ApiKeys({KEY: Caller("team-a", True)}))
    schema = schemathesis.openapi.from_url(f"{served.root}/openapi.json")
    tried: dict[str, set[int]] = {}

    def try_out(operation: Any) -> None:
        @settings(
            max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=[*HealthCheck],  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            if isinstance(case.body, dict) and "completions" in operation.label:  # long answers would test the model
                case.body["max_tokens"] = 2
            if isinstance(case.body, dict) and operation.label.endswith("/responses"):
                case.body["max_output_tokens"] = 2
            response = case.call(base_url=served.root, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
            case.validate_response(response, checks=wanted)
            check_error(response)
            tried.setdefault(operation.label, set()).add(response.status_code)

        check()

    for result in schema.get_all_operations():
        try_out(result.ok())
    assert {label.partition(" ")[2] for label in tried} >= {path for _, path in OPERATIONS}
    assert 200 in tried["GET /v1/models"] and 201 in tried["POST /v1/workflows"], tried
    served.until(lambda: served.unfinished() == 0)
    served.system.tiers.check()
    assert served.post("/chat/completions", CHAT, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_the_document_describes_all_fields_and_endpoints(served):
    document = httpx.get(f"{served.root}/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert document["openapi"] == "3.1.0" and "security" not in document
    assert set(schemas["ChatBody"]["properties"]) >= {"model", "messages", "stream", "cache_salt", *HINT_FIELDS}
    assert schemas["ChatBody"]["required"] == ["model", "messages"]
    assert schemas["ChatBody"]["properties"]["model"] == {"enum": ["tiny"]}
    assert not set(schemas["ChatBody"]["properties"]) & (set(UNSUPPORTED) | WITHOUT_EFFECT)
    fields = set(schemas["ResponsesBody"]["properties"])
    assert fields >= {"input", "instructions", *HINT_FIELDS} and not fields & (set(UNSUPPORTED) | set(STATEFUL))
    assert schemas["EdgeSpec"]["anyOf"][0]["required"] == ["from", "to"]
    for (method, path), operation in OPERATIONS.items():
        described = document["paths"][path][method.lower()]
        assert described["summary"] and ("requestBody" in described) is (operation.body is not None)
    known = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert known >= set(OPERATIONS), "no endpoint is described that is not there"


def test_keys_are_described(served):
    backend = Backend(served.client, served.system, served.tokenizer, "tiny", 2048)
    document = build_app(backend, ApiKeys({KEY: Caller("a", False)})).openapi()
    assert document["security"] == [{"key": []}] and document["paths"]["/health"]["get"]["security"] == []


def test_schemas_have_the_bounds_of_their_annotations():
    schemas = SchemaBuilder()
    for body in (ChatBody, CompletionBody, ResponsesBody, WorkflowDocument):
        schemas.of(body)
    chat = schemas.components["ChatBody"]["properties"]
    assert chat["n"] == {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 128}, {"type": "null"}]}
    assert chat["messages"]["minItems"] == 1
    assert chat["logit_bias"]["anyOf"][0]["propertyNames"] == {"pattern": "^-?[0-9]+$"}
    edge = schemas.components["EdgeSpec"]["anyOf"][0]["properties"]
    assert edge["probability"] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert edge["from"] == {"type": "string", "minLength": 1, "maxLength": 256}
    agent = schemas.components["AgentFields"]["properties"]
    assert agent["join"] == {"enum": ["or", "and"]}


@pytest.mark.parametrize("options", [{}, {"logprobs": True, "top_logprobs": 2, "n": 2}])
def test_answers_have_the_fields_of_the_clients_models_and_of_the_right_types(served, options):
    """In strict mode, in which nothing is converted; the client itself would accept wrong types."""
    whole = served.post("/chat/completions", CHAT | options)
    ChatCompletion.model_validate_json(whole.content, strict=True)
    text = served.post("/completions", {"model": "tiny", "prompt": "a", "max_tokens": 4, "logprobs": 1})
    Completion.model_validate_json(text.content, strict=True)
    body = CHAT | options | {"stream": True, "stream_options": {"include_usage": True}}
    streamed = served.post("/chat/completions", body)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(event, strict=True) for event in events]
    assert not chunks[-1].choices and chunks[-1].usage is not None
    for choice in range(options.get("n", 1)):
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice]
        assert own[0].delta.role == "assistant" and all(part.delta.role is None for part in own[1:])
        assert own[-1].finish_reason is not None and all(part.finish_reason is None for part in own[:-1])


def test_curl(served):
    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "--max-time", "30", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    url, kind = f"{served.url}/chat/completions", ["-H", "Content-Type: application/json"]
    answer = json.loads(curl(url, *kind, "-d", json.dumps(CHAT)))
    assert answer["choices"][0]["message"]["role"] == "assistant"
    streamed = curl("-N", url, *kind, "-d", json.dumps(CHAT | {"stream": True}))
    assert streamed.startswith("data: {") and streamed.endswith("data: [DONE]\n\n")
    assert json.loads(curl(url, "-d", "{"))["error"]["type"] == "invalid_request_error"
    head = curl("-i", f"{served.url}/nothing")
    assert head.startswith("HTTP/1.1 404") and json.loads(head.partition("\n\n")[2])["error"]["code"] == "not_found"


def test_langchain(served):
    import asyncio

    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    chat = ChatOpenAI(
        base_url=served.url, api_key=SecretStr("none"), model="tiny", max_completion_tokens=6, temperature=0,
        max_retries=0, timeout=60, stream_usage=True, extra_body={"ignore_eos": True},
        default_headers={"X-Tenure-Agent": "planner"},
    )  # fmt: skip
    messages = [SystemMessage("You plan, step by step, all day long, and you say who is next."), HumanMessage("Plan.")]
    whole = chat.invoke(messages)
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] == 6
    parts = list(chat.stream(messages))
    assert "".join(str(part.content) for part in parts) == whole.content
    assert any(part.usage_metadata for part in parts)

    async def later() -> tuple[Any, str]:
        answer = await chat.ainvoke(messages)
        return answer, "".join([str(part.content) async for part in chat.astream(messages)])

    again, streamed = asyncio.run(later())  # a loop for both: the client's connections belong to it
    assert streamed == whole.content
    assert again.content == whole.content and again.usage_metadata is not None
    details = again.usage_metadata.get("input_token_details", {})
    assert details.get("cache_read", 0) >= 48, "the prompt was found in the cache"

    with served.system.tiers.lock:
        assert served.system.tiers.lookup_agent("planner") is not None
