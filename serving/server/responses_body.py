"""The body of `/v1/responses`, read as a chat: OpenAI's newer form of the same, without the state it can keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tenure.checked import Range, Size

from ..request import MAX_NAME, MAX_NUMBER, shown
from ..sampling.params import MAX_LOGPROBS
from .api_requests import UNSUPPORTED, ApiBody, ChatBody, ChatMessage, StreamOptions
from .structured_output import ResponseFormat, SchemaFormat
from .tool_calls import AllowedTools, CalledFunction, FunctionName, FunctionSpec, MessageCall, ToolChoice, ToolSpec

# Fields that need a store of responses or tools of the server's own, and the values that ask for nothing.
STATEFUL: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (), "conversation": (), "background": (False,), "store": (False,),
    "max_tool_calls": (), "context_management": ([],), "truncation": ("disabled",),
}  # fmt: skip
# Fields that only chats have, and the values that ask for nothing.
NOT_IN_RESPONSES: dict[str, tuple[Any, ...]] = {
    "n": (1,), "stop": ([],), "seed": (), "logprobs": (False,), "presence_penalty": (0, 0.0), "logit_bias": ({},),
    "frequency_penalty": (0, 0.0), "structured_outputs": (), "chat_template_kwargs": ({},),
}  # fmt: skip
LOGPROBS = "message.output_text.logprobs"
# Parts of items that clients ask for as a matter of course; but for the first, there are no such items or parts.
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "code_interpreter_call.outputs", "computer_call_output.output.image_url",
    "message.input_image.image_url",
]  # fmt: skip
TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text")


@dataclass(frozen=True)
class InputPart:
    """A part of an item's content; only text is supported."""

    type: str
    text: str | None = None

    def __post_init__(self) -> None:
        if self.type not in TEXT_PARTS or self.text is None:
            raise ValueError(f"got a part of type {shown(self.type)}; accepted: {', '.join(TEXT_PARTS)}, with its text")


@dataclass(frozen=True)
class InputItem:
    """An item of the input: a message, a call that the model has made, its result, or its reasoning.

    Attributes:
        id, status: of an item that was answered; of no effect.

    Raises:
        ValueError: a field is missing that the type needs.
    """

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | tuple[InputPart, ...] | None = None
    call_id: Annotated[str, Size(1, MAX_NAME)] | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | tuple[InputPart, ...] | None = None
    id: str | None = None
    status: str | None = None

    def __post_init__(self) -> None:
        needed = {
            "message": ("role", "content"), "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }.get(self.type, ())  # fmt: skip
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"got an item of type {self.type} without {missing[0]}; accepted: with {', '.join(needed)}"
            )


@dataclass(frozen=True)
class ResponsesTool:
    """A tool; only functions are supported."""

    type: Literal["function"]
    name: str = ""
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(
                'got a tool without name; accepted: {"type": "function", "name": …, "parameters": …}, not nested as in '
                "chats"
            )

    def of_chat(self) -> ToolSpec:
        """The same in a chat."""
        return ToolSpec("function", FunctionSpec(self.name, self.description, self.parameters, self.strict))


@dataclass(frozen=True)
class ResponsesTextFormat:
    """The form of the text: as `response_format` of chats, with the schema's fields beside its type.

    Raises:
        ValueError: a schema is missing, or there is one that the type does not have.
    """

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: Mapping[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("name", "schema") if getattr(self, name) is not None]
        if len(given) != (2 if self.type == "json_schema" else 0):
            raise ValueError(
                f"got type {self.type} with {' and '.join(given) or 'neither name nor schema'}; accepted: "
                '{"type": "json_schema", "name": …, "schema": …}, or another type alone'
            )


@dataclass(frozen=True)
class ResponsesText:
    """The field `text`; `verbosity` is of no effect."""

    format: ResponsesTextFormat | None = None
    verbosity: str | None = None


@dataclass(frozen=True)
class ResponsesToolChoice:
    """`tool_choice` of one function, or of some.

    Raises:
        ValueError: without the fields of its type, or with others.
    """

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[tuple[ResponsesTool, ...], Size(1)] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("name", "mode", "tools") if getattr(self, name) is not None]
        if given != (["name"] if self.type == "function" else ["mode", "tools"]):
            raise ValueError(
                f"got a tool_choice of type {self.type} with {' and '.join(given) or 'no other field'}; accepted: "
                '{"type": "function", "name": …} or {"type": "allowed_tools", "mode": "auto" or "required", '
                '"tools": […]}'
            )

    def of_chat(self) -> ToolChoice:
        """The same in a chat."""
        if self.type == "function":
            return ToolChoice("function", FunctionName(self.name or ""))
        tools = tuple(one.of_chat() for one in self.tools or ())
        return ToolChoice("allowed_tools", allowed_tools=AllowedTools(self.mode or "auto", tools))


@dataclass(frozen=True, kw_only=True)
class ResponsesBody(ApiBody):
    """The body of `/v1/responses`.

    Attributes:
        include: logprobs of the text's tokens, each beside the `top_logprobs` likeliest ones; the rest has no effect.
        stream_options: of no effect.

    Raises:
        ValueError: `top_logprobs` without logprobs.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {
        "messages": "input", "prompt": "input", "max_tokens": "max_output_tokens", "response_format": "text.format",
        "max_completion_tokens": "max_output_tokens",
    }  # fmt: skip

    model: Annotated[str, Size(1, MAX_NAME)]
    input: str | Annotated[tuple[InputItem, ...], Size(1)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Range(1, MAX_NUMBER)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: tuple[ResponsesTool, ...] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: ResponsesText | None = None
    include: tuple[Includable, ...] | None = None
    top_logprobs: Annotated[int, Range(0, MAX_LOGPROBS)] | None = None
    stream_options: StreamOptions | None = None
    explain_cache: bool | None = None
    cache_salt: Annotated[str, Size(1, MAX_NAME)] | None = None

    def __post_init__(self) -> None:
        if self.top_logprobs and not self.with_logprobs:
            raise ValueError(
                f'got top_logprobs={self.top_logprobs} without logprobs; accepted: with include=["{LOGPROBS}"]'
            )

    @property
    def with_logprobs(self) -> bool:
        """Whether the text's tokens get their logprobs."""
        return LOGPROBS in (self.include or ())

    @classmethod
    def unsupported(cls) -> dict[str, tuple[Any, ...]]:
        return UNSUPPORTED | STATEFUL | NOT_IN_RESPONSES

    def generation(self) -> ChatBody:
        """The chat that asks for the same.

        Raises:
            ValueError: a field of another form.
        """
        given = None if self.text is None else self.text.format
        format = None
        if given is not None and given.type != "text":
            schema = None
            if given.type == "json_schema":
                schema = SchemaFormat(given.name or "", given.schema or {}, given.description, given.strict)
            format = ResponseFormat(given.type, schema)
        choice = self.tool_choice
        if isinstance(choice, ResponsesToolChoice):
            choice = choice.of_chat()
        tools = tuple(one.of_chat() for one in self.tools or ())
        return ChatBody(
            model=self.model, messages=tuple(self._messages()), stream=self.stream, tools=tools or None,
            max_completion_tokens=self.max_output_tokens, temperature=self.temperature, top_p=self.top_p,
            tool_choice=choice, parallel_tool_calls=self.parallel_tool_calls, response_format=format,
            explain_cache=self.explain_cache, cache_salt=self.cache_salt,
            logprobs=self.with_logprobs, top_logprobs=self.top_logprobs if self.with_logprobs else None,
        )  # fmt: skip

    def _messages(self) -> list[ChatMessage]:
        """The input as messages; calls that follow each other, or an assistant's text, are in one message."""
        found = [] if self.instructions is None else [ChatMessage("system", self.instructions)]
        if isinstance(self.input, str):
            return [*found, ChatMessage("user", self.input)]
        reasoning: str | None = None
        called: set[str | None] = set()
        for number, item in enumerate(self.input):
            if item.type == "reasoning":
                reasoning = _text(item.content) or None
            elif item.type == "function_call":
                called.add(item.call_id)
                call = MessageCall(
                    item.call_id or "", "function", CalledFunction(item.name or "", item.arguments or "")
                )
                last = found.pop() if found and found[-1].role == "assistant" else ChatMessage("assistant", "")
                calls = (*(last.tool_calls or ()), call)
                thoughts = last.reasoning_content or reasoning
                found.append(ChatMessage("assistant", last.text, tool_calls=calls, reasoning_content=thoughts))
                reasoning = None
            elif item.type == "function_call_output":
                if item.call_id not in called:
                    raise ValueError(
                        f"got {shown(item.call_id)} as input[{number}].call_id; accepted: the call_id of an earlier "
                        "function_call"
                    )
                found.append(ChatMessage("tool", _text(item.output), tool_call_id=item.call_id))
            else:
                assert item.role is not None, "checked"
                mine = reasoning if item.role == "assistant" else None
                found.append(ChatMessage(item.role, _text(item.content), reasoning_content=mine))
                reasoning = None
        return found


def _text(content: str | tuple[InputPart, ...] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content if part.text is not None)
