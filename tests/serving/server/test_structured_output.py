"""Answers of a given form, over HTTP: a random model writes valid JSON, and nothing else, when a grammar makes it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from dataclasses import replace
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tenure.serving.sampling.grammar_config import GrammarConfig
from tenure.serving.server import ApiKeys

from .conftest import KEYS

SHORT: dict[str, Any] = {"type": "string", "maxLength": 4}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]}, "tags": {"type": "array", "items": SHORT, "maxItems": 2},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}  # fmt: skip
MESSAGES: list[Any] = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def client(served) -> OpenAI:
    return OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)


def ask(client: OpenAI, **options: Any) -> Any:
    options = {"max_tokens": 300, "temperature": 1.0, "seed": 1} | options
    return client.chat.completions.create(model="tiny", messages=MESSAGES, **options)


def schema_format(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_a_schema_is_followed_by_every_answer(client):
    found = ask(client, response_format=schema_format(SCHEMA), n=2)
    texts = [choice.message.content for choice in found.choices]
    for choice in found.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert choice.finish_reason == "stop"
    assert len(set(texts)) > 1
    again = ask(client, response_format=schema_format(SCHEMA), n=2)
    assert [choice.message.content for choice in again.choices] == texts, "seeds give the same answers"


def test_a_stream_has_the_same_text(client):
    whole = ask(client, response_format=schema_format(SCHEMA)).choices[0]
    chunks = list(ask(client, response_format=schema_format(SCHEMA), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


class Pet(BaseModel):
    name: str = Field(max_length=5)
    kind: Literal["cat", "dog"]
    weight: int = Field(ge=0, le=99)


class Home(BaseModel):
    pets: list[Pet] = Field(max_length=2)
    first: Pet | None


def test_pydantic_models_are_parsed_by_the_client(client, served):
    found = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Home, max_tokens=400, temperature=1.0, seed=3
    )
    assert isinstance(found.choices[0].message.parsed, Home)

    async def parse() -> Any:
        async with AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as other:
            return await other.chat.completions.parse(
                model="tiny", messages=MESSAGES, response_format=Pet, max_tokens=200, seed=4
            )

    assert isinstance(asyncio.run(parse()).choices[0].message.parsed, Pet)


def test_any_object(client):
    text = ask(client, response_format={"type": "json_object"}, max_tokens=60).choices[0].message.content
    assert text.startswith("{")


@pytest.mark.parametrize(
    ("field", "value", "check"),
    [
        ("regex", r"[a-f]{3}-\d{2}", lambda text: re.fullmatch(r"[a-f]{3}-\d{2}", text)),
        ("regex", r"a.c", lambda text: re.fullmatch(r"a.c", text)),
        ("choice", ["yes", "no", "né\"\n/"], lambda text: text in ("yes", "no", "né\"\n/")),
        ("grammar", 'root ::= "a" ("b" | "c")', lambda text: text in ("ab", "ac")),
        ("json", {"type": "integer", "minimum": 3, "maximum": 5}, lambda text: json.loads(text) in (3, 4, 5)),
        ("json", '{"enum": [[1, {"a": null}]]}', lambda text: json.loads(text) == [1, {"a": None}]),
        ("json", {"allOf": [{"type": "integer", "minimum": 7}, {"maximum": 7}]}, lambda text: json.loads(text) == 7),
    ],
)  # fmt: skip
def test_vllms_fields(client, field, value, check):
    for seed in range(3):
        for extra in ({"structured_outputs": {field: value}}, {f"guided_{field}": value}):
            found = ask(client, extra_body=extra, seed=seed, max_tokens=40)
            assert check(found.choices[0].message.content), found.choices[0].message.content
            assert found.choices[0].finish_reason == "stop"
    found = client.completions.create(
        model="tiny", prompt="x", max_tokens=40, extra_body={"structured_outputs": {field: value}}
    )
    assert check(found.choices[0].text)


def test_the_other_ends_of_an_answer_hold_too(client):
    """Stop texts, end tokens that are ignored, least numbers of tokens and biases, beside a grammar."""
    letters = {"structured_outputs": {"regex": "[a-c]+"}}
    stopped = ask(client, extra_body=letters, stop=["b"], max_tokens=100).choices[0]
    assert "b" not in stopped.message.content and stopped.finish_reason == "stop"
    long = ask(client, extra_body=letters | {"min_tokens": 30, "ignore_eos": True}, max_tokens=40)
    assert re.fullmatch("[a-c]+", long.choices[0].message.content) and long.usage.completion_tokens >= 30
    end = {"structured_outputs": {"regex": "[a-c]{5}"}, "ignore_eos": True, "min_tokens": 2}
    assert ask(client, extra_body=end).usage.completion_tokens == 5
    cut = ask(client, extra_body=letters | {"ignore_eos": True}, max_tokens=3).choices[0]
    assert cut.finish_reason == "length"
    rows = ask(client, extra_body={"structured_outputs": {"choice": ["xyz"]}}, logprobs=True).choices[0].logprobs
    assert [row.token for row in rows.content] == ["x", "y", "z"]


def test_a_preempted_answer_goes_on_with_its_grammar(serve, tokenizer):
    """Requests that are computed anew when the device is full continue token for token."""
    digits = r"[0-9](,[0-9]){59}"
    options: dict[str, Any] = {"extra_body": {"structured_outputs": {"regex": digits}}, "temperature": 1.0}

    def answers(tokens: int) -> tuple[list[str], int]:
        served = serve(tokens=tokens)
        client = OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)
        ask(client, max_tokens=1, **options)  # the others find it compiled, and come together
        found: list[str] = [""] * 4

        def one(number: int) -> None:
            found[number] = ask(client, seed=number, **options).choices[0].message.content

        threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found, served.system.scheduler.metrics.preemptions

    roomy, none = answers(8192)
    tight, some = answers(192)
    assert not none and some and tight == roomy
    assert all(re.fullmatch(digits, text) for text in tight) and len(set(tight)) == 4


def test_an_explosive_expression_stops_nobody_else(serve):
    served = serve(ApiKeys(KEYS), grammars=GrammarConfig(compile_s=0.3))
    attacker, other = (OpenAI(base_url=served.url, api_key=key, max_retries=0, timeout=60) for key in [*KEYS][:2])
    explosive = {"structured_outputs": {"regex": "(([a-z]{0,200}[0-9]{0,200}){0,200}[a-f]{0,300}){0,300}"}}
    simple = {"structured_outputs": {"choice": ["yes"]}}
    ask(other, extra_body=simple)  # starts the worker
    outcomes: list[Any] = []

    def attack() -> None:
        try:
            ask(attacker, extra_body=explosive)
        except openai.APIStatusError as error:
            outcomes.append(error.status_code)

    threads = [threading.Thread(target=attack) for _ in range(2)]
    for thread in threads:
        thread.start()
    answered = 0
    while any(thread.is_alive() for thread in threads):
        assert ask(other, extra_body=simple).choices[0].message.content == "yes"
        answered += 1
    for thread in threads:
        thread.join()
    assert outcomes == [400] * 2
    assert answered > 2, "others are answered meanwhile"
    assert ask(attacker, extra_body=simple).choices[0].message.content == "yes"


def test_a_grammar_whose_masks_take_too_long_is_the_clients_mistake(served, make_grammars, monkeypatch):
    client = OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)
    compiler = make_grammars(served.engine)
    ask(client, extra_body={"guided_regex": "[a-c]{3}"})  # starts the worker, which has bounds of its own
    monkeypatch.setattr(compiler, "config", replace(compiler.config, max_step_s=1e-9, mean_step_s=1e-9))
    for stream in (False, True):
        with pytest.raises(openai.APIError, match=r"the grammar took .* use a simpler schema, expression or") as error:
            list(ask(client, extra_body={"guided_regex": "[a-c]{33}"}, stream=stream))
        assert error.value.code == "grammar_too_complex"
    assert ask(client, max_tokens=2).choices


def test_a_server_without_grammars_says_so(serve, monkeypatch):
    monkeypatch.setattr("tenure.serving.sampling.grammar_compiler.GrammarCompiler.available", False)
    served = serve()
    client = OpenAI(base_url=served.url, api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="response_format is not supported by this server") as error:
        ask(client, response_format={"type": "json_object"})
    assert error.value.param == "response_format"
    assert ask(client, max_tokens=2).choices[0].message.content is not None
