"""Tools as OpenAI's client uses them: forced by a grammar, called freely, streamed, and their results sent back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tenure.serving.server.api_errors import ApiError
from tenure.serving.server.api_requests import ChatMessage
from tenure.serving.server.prompts import PromptRenderer
from tenure.serving.server.tool_calls import CalledFunction, FunctionSpec, HermesForm, MessageCall, ToolSpec, form_of

from .conftest import TEMPLATE, Served, byte_tokenizer

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORECAST: Any = {"type": "function", "function": {"name": "forecast", "parameters": PARAMETERS}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "forecast", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
MESSAGES: list[Any] = [{"role": "user", "content": "Rain?"}]
# The parts of Qwen's and of Llama's templates that concern tools.
QWEN = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "# Tools in <tools>:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\nAnswer with <tool_call>.<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response>"
    "<|im_end|>\n{% elif m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% if tools %}{# <|python_tag|> #}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if tools and loop.first %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}Answer with "
    '{"name": function, "parameters": values}.\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}'
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ScriptedMask:
    """Allows one text, then the end."""

    def __init__(self, tokens: Sequence[int], end: int) -> None:
        self._tokens, self._end = [*tokens, end], end

    def allowed(self, tokens: Sequence[int]) -> torch.Tensor:
        found = torch.zeros(259, dtype=torch.bool)
        found[self._tokens[min(len(tokens), len(self._tokens) - 1)]] = True
        return found

    def accept(self, token: int) -> None:
        pass

    @property
    def is_finished(self) -> bool:
        return False


@pytest.fixture
def answering(serve, monkeypatch) -> Callable[..., tuple[Served, OpenAI]]:
    """A server whose model gives one answer to everything, as if it were trained to."""

    def start(answer: str | None = None, template: str = QWEN, thinking: str = "") -> tuple[Served, OpenAI]:
        served = serve()
        served.tokenizer.chat_template = template + thinking
        if answer is not None:
            tokens, end = served.tokenizer(answer)["input_ids"], served.engine.end_token_ids[0]
            submit = served.engine.submit

            def scripted(request: Any) -> int:
                sampling = replace(request.sampling, make_mask=lambda: ScriptedMask(tokens, end))
                return submit(replace(request, sampling=sampling))

            monkeypatch.setattr(served.engine, "submit", scripted)
        return served, OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)

    return start


def create(client: OpenAI, **options: Any) -> Any:
    options = {"messages": MESSAGES, "tools": [FORECAST, CLOCK], "max_tokens": 200, "temperature": 1.0} | options
    return client.chat.completions.create(model="tiny", **options)


def joined(chunks: Any) -> tuple[str, dict[int, dict[str, str]], str | None]:
    """Text, calls and finish reason of a stream, joined as OpenAI's documentation has it."""
    text, calls, reason = "", {}, None
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for part in choice.delta.tool_calls or ():
            if part.index not in calls:
                assert part.id and part.type == "function" and part.function.name
                calls[part.index] = {"id": part.id, "name": part.function.name, "arguments": ""}
            else:
                assert part.id is None and part.function.name is None
            calls[part.index]["arguments"] += part.function.arguments
    return text, calls, reason


@pytest.mark.parametrize("template", [QWEN, LLAMA, TEMPLATE])
def test_a_required_call_is_always_valid(answering, template):
    _, client = answering(template=template)
    names = set()
    for seed in range(3):
        found = create(client, tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
        assert found.finish_reason == "tool_calls" and found.message.content is None
        (call,) = found.message.tool_calls
        names.add(call.function.name)
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS if call.function.name == "forecast" else {})
    assert names <= {"forecast", "clock"}
    named = {"type": "function", "function": {"name": "forecast"}}
    found = create(client, tool_choice=named, seed=1).choices[0]
    assert {call.function.name for call in found.message.tool_calls} == {"forecast"}
    text, calls, reason = joined(create(client, tool_choice=named, seed=1, stream=True))
    assert not text and reason == "tool_calls"
    expected = [(one.function.name, one.function.arguments) for one in found.message.tool_calls]
    assert [(one["name"], one["arguments"]) for one in calls.values()] == expected


@pytest.mark.parametrize("template", [QWEN, LLAMA, TEMPLATE])
def test_only_allowed_tools_are_called(answering, template):
    """Also where the model is free to call, and all tools stay in the prompt."""
    served, client = answering(template=template)
    clock: Any = {"type": "function", "function": {"name": "clock"}}
    allowed: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [clock]}}
    prompts = set()
    for seed in range(3):
        found = create(client, tool_choice=allowed, seed=seed)
        assert {call.function.name for call in found.choices[0].message.tool_calls} == {"clock"}
        prompts.add(found.usage.prompt_tokens)
    assert prompts == {create(client, tool_choice="required", seed=1).usage.prompt_tokens}
    submit, masks = served.engine.submit, []

    def watched(request: Any) -> int:
        masks.append(request.sampling.make_mask())
        return submit(request)

    served.engine.submit = watched
    for function, accepted in (("clock", True), ("forecast", False)):
        create(client, tool_choice=allowed | {"allowed_tools": {"mode": "auto", "tools": [clock]}}, max_tokens=2)
        text = (form_of(template) or HermesForm()).tagged(FunctionSpec(function)).begin
        tokens, mask = served.tokenizer(text)["input_ids"], masks.pop()
        with contextlib.nullcontext() if accepted else pytest.raises(ValueError):
            for token in tokens:
                mask.accept(token)


def test_a_free_call_and_its_result(answering):
    _, client = answering(f"I look.\n{CALL}")
    found = create(client)
    message = found.choices[0].message
    assert message.content == "I look." and found.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls
    assert call.id.startswith("call_") and json.loads(call.function.arguments) == {"city": "Oslo", "days": 2}
    text, calls, reason = joined(create(client, stream=True))
    assert (text, reason) == ("I look.", "tool_calls")
    assert calls[0]["arguments"] == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "wet"}
    assert create(client, messages=[*MESSAGES, message, result]).choices[0].message.tool_calls


def test_the_stream_of_arguments_comes_in_pieces(answering):
    _, client = answering(CALL)
    parts = [chunk.choices[0].delta for chunk in create(client, stream=True)]
    assert parts[0].role == "assistant" and parts[0].content is None
    assert sum(bool(part.tool_calls) for part in parts) > 3, "a token is a byte here"


def test_without_tools_or_with_none_the_text_is_unchanged(answering):
    _, client = answering(CALL)
    for options in ({"tools": openai.omit}, {"tool_choice": "none"}):
        found = create(client, **options).choices[0]
        assert found.message.content == CALL and not found.message.tool_calls and found.finish_reason == "stop"


def test_several_calls_unless_one_is_asked_for(answering):
    _, client = answering(f"{CALL}\n{CALL}")
    found = create(client).choices[0].message.tool_calls
    assert len(found) == 2 and len({call.id for call in found}) == 2
    assert len(create(client, parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    _, calls, _ = joined(create(client, parallel_tool_calls=False, stream=True))
    assert [*calls] == [0]


def test_a_call_that_is_cut_short_ends_by_its_length(answering):
    _, client = answering(CALL)
    found = create(client, max_tokens=60).choices[0]
    assert found.finish_reason == "length" and CALL.find(found.message.tool_calls[0].function.arguments) > 0


class Trip(BaseModel):
    days: int = Field(ge=1, le=9)


def test_strict_tools_are_parsed_by_the_client(answering):
    _, client = answering()
    tool = openai.pydantic_function_tool(Trip, name="plan")
    found = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, tools=[tool], tool_choice="required", max_tokens=120, seed=2,
        parallel_tool_calls=False,
    )  # fmt: skip
    (call,) = found.choices[0].message.tool_calls or ()  # pyright: ignore[reportAssignmentType]
    assert isinstance(call.function.parsed_arguments, Trip)


def test_a_strict_tool_that_need_not_be_called_cannot_be_called_wrongly(answering, monkeypatch):
    served, client = answering()
    masks: list[Any] = []
    submit = served.engine.submit
    monkeypatch.setattr(
        served.engine, "submit", lambda request: masks.append(request.sampling.make_mask) or submit(request)
    )
    strict = {"type": "function", "function": FORECAST["function"] | {"strict": True}}
    for tools in ([strict], [FORECAST]):
        create(client, tools=tools, max_tokens=2)
    assert masks[1] is None, "a tool that is not strict leaves the model free"

    def allows(text: str) -> bool:
        """Whether the text may be the beginning of an answer."""
        mask = masks[0]()
        for token in served.tokenizer(text)["input_ids"]:
            if not mask.allowed([])[token // 32] >> token % 32 & 1:
                return False
            mask.accept(token)
        return True

    assert allows("It is wet.") and allows(CALL) and allows(f"See:\n{CALL} and more, {{}}")
    assert not allows(CALL.replace("Oslo", "Paris")) and not allows(CALL.replace("forecast", "other"))


def test_a_format_beside_tools_gives_one_of_both(answering):
    _, client = answering()
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    format: Any = {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": schema | {"additionalProperties": False}},
    }
    kinds = set()
    for seed in range(6):
        message = create(client, response_format=format, seed=seed).choices[0].message
        kinds.add(message.content is None)
        if message.content:
            jsonschema.validate(json.loads(message.content), schema)
    assert kinds == {True, False}


def test_asynchronous_calls(answering):
    served, _ = answering(CALL)

    async def ask() -> Any:
        async with AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
            options: Any = {"model": "tiny", "messages": MESSAGES, "tools": [FORECAST], "max_tokens": 200}
            async with client.chat.completions.stream(**options) as stream:
                async for _ in stream:
                    pass
                return await stream.get_final_completion()

    found = asyncio.run(ask()).choices[0]
    assert found.message.tool_calls[0].function.name == "forecast" and found.finish_reason == "tool_calls"


def test_langchain_calls_and_is_given_the_result(answering):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    def forecast(city: str, days: int) -> str:
        """The weather of a city."""
        return f"{days} wet days in {city}"

    served, _ = answering(CALL)
    chat = ChatOpenAI(base_url=served.url, api_key="none", model="tiny", max_tokens=200, max_retries=0, timeout=60)  # pyright: ignore[reportCallIssue]
    bound = chat.bind_tools([forecast])
    messages: list[Any] = [HumanMessage("Rain?")]
    answer = bound.invoke(messages)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("forecast", {"city": "Oslo", "days": 2})
    parts = list(bound.stream(messages))
    whole = parts[0]
    for part in parts[1:]:
        whole += part
    assert [(one["name"], one["args"]) for one in whole.tool_calls] == [("forecast", {"city": "Oslo", "days": 2})]  # pyright: ignore[reportAttributeAccessIssue]
    messages += [answer, ToolMessage(forecast(**call["args"]), tool_call_id=call["id"])]
    assert bound.invoke(messages).tool_calls, "the conversation goes on"

    class Weather(BaseModel):
        wet: bool

    _, client = answering(template=TEMPLATE)
    free = ChatOpenAI(
        base_url=str(client.base_url),
        api_key="none",
        model="tiny",
        max_tokens=120,  # pyright: ignore[reportCallIssue]
        max_retries=0,
        timeout=60,
    )
    for method in ("json_schema", "function_calling"):
        assert isinstance(free.with_structured_output(Weather, method=method).invoke(messages[:1]), Weather)


def test_a_broken_call_can_be_sent_back(answering):
    """As clients do that tell the model of its mistake; a call may also be of a function that does not exist."""
    for template in (QWEN, TEMPLATE):
        _, client = answering("Sorry.", template)
        for name, arguments in [("forecast", '{"city": "Os'), ("no such", "[1]"), ("clock", "")]:
            call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
            turn, result = {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1"}
            found = create(client, messages=[*MESSAGES, turn, result | {"content": "?"}])
            assert found.choices[0].message.content == "Sorry."


def test_tools_with_nested_schemas(answering):
    """Ten levels of objects in lists."""
    _, client = answering(CALL)
    schema: dict[str, Any] = {"type": "object", "properties": {"x": {"enum": [1]}}}
    for _ in range(9):
        schema = {"type": "object", "properties": {"x": {"type": "array", "items": schema}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert create(client, tools=[tool], max_tokens=2).choices


def test_reasoning_is_apart_from_the_answer(answering):
    thinking = "{# <think></think> #}"
    _, client = answering(f"<think>\nhm\n</think>\n\n{CALL}", thinking=thinking)
    message = create(client).choices[0].message
    assert message.reasoning_content == "hm" and message.content is None and message.tool_calls
    parts = [chunk.choices[0].delta for chunk in create(client, stream=True)]
    assert "".join(getattr(part, "reasoning_content", None) or "" for part in parts) == "hm"


def test_a_format_holds_after_reasoning(answering):
    opened = "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"
    served, client = answering(thinking=opened)
    close = {str(token): 40 for token in served.tokenizer("</think>")["input_ids"]}
    found = create(
        client, tools=openai.omit, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, logit_bias=close,
        max_tokens=400, seed=5,
    ).choices[0]  # fmt: skip
    if found.finish_reason == "stop":
        assert found.message.content in ("yes", "no")
    else:
        assert not found.message.content and found.message.reasoning_content


def test_a_template_of_an_unknown_form_is_refused(answering):
    _, client = answering(template=QWEN.replace("<tool_call>", "<call>"))
    with pytest.raises(openai.BadRequestError, match="its chat template describes calls in a form") as error:
        create(client)
    assert error.value.param == "tools" and error.value.code == "unsupported_parameter"
    assert create(client, tools=openai.omit, max_tokens=2).choices


def test_a_schema_that_cannot_be_enforced_is_refused_where_the_call_is_required(answering):
    _, client = answering(CALL)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "minContains": 2}}}
    with pytest.raises(openai.BadRequestError, match="'minContains' in the parameters of f") as error:
        create(client, tools=[tool], tool_choice="required")
    assert error.value.param == "tools"
    assert create(client, tools=[tool]).choices[0].message.tool_calls


# Prompts ------------------------------------------------------------------------------------------------------------

TOOLS = [ToolSpec("function", FunctionSpec("forecast", "Weather", PARAMETERS))]
SYSTEM = ChatMessage("system", "You know the weather.")


@pytest.mark.parametrize("template", [QWEN, LLAMA, TEMPLATE])
def test_the_fixed_prompt_has_the_tools(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    renderer = PromptRenderer(tokenizer, 16)
    for system in ([], [SYSTEM]):
        first, second = (renderer.chat([*system, ChatMessage("user", text)], TOOLS) for text in ("Rain?", "Snow?"))
        assert first.agent == second.agent is not None and first.fixed_tokens == second.fixed_tokens
        fixed = tokenizer.decode(first.ids[: first.fixed_tokens])
        assert '"forecast"' in fixed and "Rain" not in fixed
        other = renderer.chat([*system, ChatMessage("user", "Rain?")], [ToolSpec("function", FunctionSpec("clock"))])
        assert other.agent != first.agent


def test_calls_and_results_are_rendered_by_the_template():
    tokenizer = byte_tokenizer()
    call = MessageCall("c1", "function", CalledFunction("forecast", '{"city": "Oslo", "days": 2}'))
    turns = [
        ChatMessage("user", "Rain?"), ChatMessage("assistant", None, tool_calls=(call,)),
        ChatMessage("tool", "wet", tool_call_id="c1"), ChatMessage("tool", "cold", tool_call_id="c1"),
    ]  # fmt: skip
    tokenizer.chat_template = QWEN
    text = PromptRenderer(tokenizer, 16).chat(turns, TOOLS).text
    assert '<tool_call>{"name": "forecast", "arguments": {"city": "Oslo", "days": 2}}</tool_call>' in text
    assert text.endswith("<tool_response>cold</tool_response><|im_end|>\n<|im_start|>assistant\n")
    tokenizer.chat_template = TEMPLATE  # without tools: Hermes' form as plain text
    text = PromptRenderer(tokenizer, 16).chat(turns, TOOLS).text
    assert text.startswith("<|im_start|>system\n# Tools") and '<tools>\n{"type": "function"' in text
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in text
    both = "<tool_response>\nwet\n</tool_response>\n<tool_response>\ncold\n</tool_response>"
    assert text.endswith(f"<|im_start|>user\n{both}<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_refuses_the_messages_is_a_bad_request():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ApiError, match="refuses the messages: roles must alternate"):
        PromptRenderer(tokenizer, 16).chat([ChatMessage("user", "x")])


def test_forms_by_their_template():
    names = [None if (form := form_of(template)) is None else form.name for template in (QWEN, LLAMA, TEMPLATE)]
    assert names == ["hermes", "llama3_json", "hermes"]
    assert form_of(QWEN + "<function=") is None and form_of("{{ tools }}") is None
