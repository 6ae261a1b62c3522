"""`/v1/responses` through the client's own calls: text, messages, tools, schemas, streams, and refusals by name."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tenure.serving.server.responses_body import LOGPROBS

from .test_tool_calls import CALL, PARAMETERS, answering

__all__ = ["answering"]  # a fixture

TOOL: Any = {"type": "function", "name": "forecast", "parameters": PARAMETERS, "strict": False}


@pytest.fixture
def client(served) -> OpenAI:
    return OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)


def ask(client: OpenAI, **options: Any) -> Any:
    return client.responses.create(**({"model": "tiny", "input": "Rain?", "max_output_tokens": 8} | options))


def test_a_text_is_answered_as_a_chat(client):
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    found = ask(client, instructions="Be brief.", temperature=0, include=["reasoning.encrypted_content"])
    assert found.output_text == chat.choices[0].message.content
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.usage.output_tokens == chat.usage.completion_tokens
    cut = ask(client, instructions="Be brief.", temperature=0, max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]}]
    again = ask(client, instructions="Be brief.", temperature=0, input=parts)
    assert again.output_text == found.output_text and again.usage.input_tokens_details.cached_tokens > 0
    assert found.id.startswith("resp_") and found.store is False


def test_the_events_of_a_stream_make_up_the_response(client):
    events = list(ask(client, temperature=0, stream=True, max_output_tokens=2))
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert [event.type for event in events[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.incomplete_details
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == last.response.output_text


def test_a_call_and_its_result(answering):
    _, client = answering(f"I look.\n{CALL}")
    found = ask(client, tools=[TOOL], max_output_tokens=200)
    message, call = found.output
    assert message.content[0].text == "I look." and found.status == "completed"
    assert call.type == "function_call" and call.name == "forecast"
    assert json.loads(call.arguments) == {"city": "Oslo", "days": 2}
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "wet"}
    conversation: list[Any] = [{"role": "user", "content": "Rain?"}, *found.output, result]
    assert ask(client, input=conversation, tools=[TOOL], max_output_tokens=200).output[1].type == "function_call"
    events = list(ask(client, tools=[TOOL], max_output_tokens=200, stream=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == call.arguments == done[0].arguments and len(deltas) > 3
    assert [event.item.type for event in events if event.type == "response.output_item.done"] == [
        "message", "function_call",
    ]  # fmt: skip


def test_a_named_tool_is_called(answering):
    _, client = answering()
    found = ask(client, tools=[TOOL], tool_choice={"type": "function", "name": "forecast"}, max_output_tokens=200)
    (call,) = found.output
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")


def test_only_allowed_tools_are_called(answering):
    _, client = answering()
    clock: Any = {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}}
    options: dict[str, Any] = {"tools": [TOOL, clock], "max_output_tokens": 200, "temperature": 1.0}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    found = ask(client, tool_choice=choice, **options)
    assert {call.name for call in found.output} == {"clock"}
    assert found.tool_choice.type == "allowed_tools" and found.tool_choice.tools[0]["name"] == "clock"
    with pytest.raises(openai.BadRequestError, match="got tool_choice of 'other'; accepted: one of the tools"):
        ask(client, tool_choice=choice | {"tools": [{"type": "function", "name": "other"}]}, **options)


def test_logprobs_are_those_of_a_chat(client):
    messages: list[Any] = [{"role": "user", "content": "Rain?"}]
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    options: dict[str, Any] = {"temperature": 0, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    found = ask(client, **options)
    (part,) = found.output[0].content
    assert found.top_logprobs == 2 and len(part.logprobs) == found.usage.output_tokens
    expected = [
        (one.token, one.logprob, [top.token for top in one.top_logprobs]) for one in chat.choices[0].logprobs.content
    ]
    got = [(one.token, one.logprob, [top.token for top in one.top_logprobs]) for one in part.logprobs]
    assert [one[0::2] for one in got] == [one[0::2] for one in expected]
    assert [one[1] for one in got] == pytest.approx([one[1] for one in expected], abs=1e-5)
    events = list(ask(client, stream=True, **options))
    parts = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert [one.token for one in parts] == [one.token for one in done.logprobs] == [one[0] for one in expected]
    assert [one.token for one in events[-1].response.output[0].content[0].logprobs] == [one[0] for one in expected]


class Answer(BaseModel):
    kind: Literal["cat", "dog"]
    sure: bool


def test_models_are_parsed_by_the_client(client, served):
    options: dict[str, Any] = {"model": "tiny", "input": "Which?", "text_format": Answer, "max_output_tokens": 200}
    assert isinstance(client.responses.parse(**options).output_parsed, Answer)

    async def stream() -> Any:
        other = AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0)
        async with other, other.responses.stream(**options) as events:
            async for _ in events:
                pass
            return await events.get_final_response()

    assert isinstance(asyncio.run(stream()).output_parsed, Answer)


def test_reasoning_is_an_item_of_its_own(answering):
    _, client = answering("<think>\nhm\n</think>\n\nWet.", thinking="{# <think></think> #}")
    thought, message = ask(client, max_output_tokens=100).output
    assert thought.type == "reasoning" and thought.content[0].text == "hm" and message.content[0].text == "Wet."
    events = list(ask(client, max_output_tokens=100, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "hm"
    conversation: list[Any] = [{"role": "user", "content": "Rain?"}, thought, message, {"role": "user", "content": "?"}]
    assert ask(client, input=conversation, max_output_tokens=100).output[1].content[0].text == "Wet."


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"store": True}, "store is not supported by this server; accepted: False"),
        ({"include": ["nothing"]}, "got 'nothing' as include[0]; accepted"),
        ({"include": [LOGPROBS], "tools": [TOOL]}, f"include '{LOGPROBS}' is not supported by this server with tools"),
        ({"top_logprobs": 2}, "got top_logprobs=2 without logprobs; accepted: with include="),
        ({"top_logprobs": 21, "include": [LOGPROBS]}, "top_logprobs"),
        ({"truncation": "auto"}, "truncation is not supported by this server; accepted: 'disabled'"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "got 'custom' as tools[0].type; accepted: function"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom", "name": "f"}}, "'custom' as tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "name": "f"}}, "allowed_tools with name; accepted"),
        ({"background": True}, "background is not supported"),
        ({"conversation": "c"}, "conversation is not supported"),
        ({"tools": [{"type": "web_search"}]}, "got 'web_search' as tools[0].type; accepted: function"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0]: got a tool without name; accepted"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "'a b' as the name of a function"),
        ({"max_tokens": 3}, "max_tokens is a field of other endpoints; accepted: max_output_tokens"),
        ({"messages": []}, "accepted: input"),
        ({"response_format": {}}, "accepted: text.format"),
        ({"stop": ["a"]}, "stop is not supported"),
        ({"n": 2}, "n is not supported by this server; accepted: 1"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "got type json_schema with name; accepted"),
        (
            {"text": {"format": {"type": "json_object", "json_schema": {}}}},
            "'text.format.json_schema' is not supported",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type; accepted: message"),
        ({"input": [{"role": "user"}]}, "without content; accepted: with role, content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "'input_image'"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
            "'c' as input[0].call_id; accepted: the call_id of",
        ),
        ({"input": []}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "the keyword 'not'"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_refusals_by_name(client, fields, text):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, extra_body=fields)
    assert text in error.value.message


def test_responses_are_not_stored(client):
    with pytest.raises(openai.NotFoundError, match="responses are not stored"):
        client.responses.retrieve("resp_1")


def test_calls_are_read_as_in_a_chat():
    """An assistant's text and the calls that follow it are one message."""
    from tenure.serving.server.responses_body import InputItem, InputPart, ResponsesBody

    items = (
        InputItem(role="user", content="Rain?"), InputItem("reasoning"), InputItem(role="assistant", content="I look."),
        InputItem("function_call", call_id="c1", name="forecast", arguments="{}"),
        InputItem("function_call", call_id="c2", name="forecast", arguments="{}"),
        InputItem("function_call_output", call_id="c1", output=(InputPart("input_text", "wet"),)),
    )  # fmt: skip
    body = ResponsesBody(model="tiny", input=items, instructions="Be brief.")
    roles = [(one.role, one.text, len(one.tool_calls or ())) for one in body.generation().messages]
    assert roles == [("system", "Be brief.", 0), ("user", "Rain?", 0), ("assistant", "I look.", 2), ("tool", "wet", 0)]


class Trip(BaseModel):
    city: Literal["Rome", "Oslo"]
    dry: bool


def test_the_agents_sdk_works_with_its_own_default_model(answering):
    """Plain and streamed runs: a tool that is called, instructions and a second turn, an output that is parsed."""
    pytest.importorskip("agents")
    from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled

    set_tracing_disabled(True)
    asked = []

    @function_tool
    def forecast(city: str, days: int) -> str:
        """The weather of a city."""
        asked.append((city, days))
        return f"wet in {city}"

    def agent(client: OpenAI, **parts: Any) -> Agent[Any]:
        own = AsyncOpenAI(base_url=str(client.base_url), api_key="none", max_retries=0, timeout=60)
        settings = ModelSettings(temperature=0, max_tokens=120)
        return Agent(
            "helper", instructions="Be brief.", model=OpenAIResponsesModel("tiny", own), model_settings=settings,
            **parts,
        )  # fmt: skip

    async def streamed(one: Agent[Any], question: Any) -> tuple[str, list[str]]:
        running = Runner.run_streamed(one, question)
        kinds = [event.data.type async for event in running.stream_events() if event.type == "raw_response_event"]
        return running.final_output, kinds

    async def conversations() -> None:
        calling = agent(answering(f"I look.\n{CALL}")[1], tools=[forecast], tool_use_behavior="stop_on_first_tool")
        assert (await Runner.run(calling, "Rain?")).final_output == "wet in Oslo"
        found, kinds = await streamed(calling, "Rain?")
        assert found == "wet in Oslo" and asked == [("Oslo", 2)] * 2
        assert "response.function_call_arguments.delta" in kinds

        talking = agent(answering()[1], output_type=Trip)
        first = await Runner.run(talking, "Where to?")
        assert isinstance(first.final_output, Trip)
        second, kinds = await streamed(talking, [*first.to_input_list(), {"role": "user", "content": "And then?"}])
        assert isinstance(second, Trip) and kinds[-1] == "response.completed"

    asyncio.run(conversations())
