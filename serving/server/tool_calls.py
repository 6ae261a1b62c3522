"""Tools of a chat: their declaration, the forms in which models call them, and the grammars that make them do so."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tenure.checked import Size

from ..request import MAX_NAME, shown
from ..sampling.constraint import JsonValue, Tagged, Tags
from .answer_parsers import AnswerParser, HermesParser, LlamaParser
from .api_errors import bad_request

MAX_TOOLS = 128  # as OpenAI has it
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class FunctionSpec:
    """The function of a tool.

    Attributes:
        parameters: a JSON schema of an object; None: there are none.
        strict: the arguments follow the schema also where the model is free to call; else only where it must.

    Raises:
        ValueError: another form of name or schema.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        check_function_name(self.name)
        if self.parameters is not None and self.parameters.get("type", "object") != "object":
            raise ValueError(f"got parameters of type {shown(self.parameters['type'])}; accepted: object")

    @property
    def schema(self) -> dict[str, Any]:
        """Of the arguments."""
        if not self.parameters:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object"} | dict(self.parameters)


def check_function_name(name: str) -> None:
    """ValueError unless it is a name that OpenAI accepts, or has dots."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"got {shown(name)} as the name of a function; accepted: 1 to 64 letters, digits and _ . -")


@dataclass(frozen=True)
class ToolSpec:
    """A tool; only functions are supported.

    Raises:
        ValueError: without a function.
    """

    type: Literal["function"]
    function: FunctionSpec | None = None

    def __post_init__(self) -> None:
        if self.function is None:
            raise ValueError(
                'got a tool without function; accepted: {"type": "function", "function": {"name": …, "parameters": …}}'
            )

    @property
    def spec(self) -> FunctionSpec:
        """The function."""
        assert self.function is not None, "checked"
        return self.function

    def document(self) -> dict[str, Any]:
        """As chat templates expect it."""
        spec = self.spec
        function: dict[str, Any] = {"name": spec.name, "description": spec.description or ""}
        function["parameters"] = dict(spec.parameters or {"type": "object", "properties": {}})
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class FunctionName:
    """A function by its name."""

    name: str


@dataclass(frozen=True)
class AllowedTools:
    """Some of the tools: the prompt shows all, so that it stays in the cache, and only these are called."""

    mode: Literal["auto", "required"]
    tools: Annotated[tuple[ToolSpec, ...], Size(1)]


@dataclass(frozen=True)
class ToolChoice:
    """`tool_choice` of one function, or of some.

    Raises:
        ValueError: without the field that its type names, or with the other one.
    """

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("function", "allowed_tools") if getattr(self, name) is not None]
        if given != [self.type]:
            raise ValueError(
                f"got a tool_choice of type {self.type} with {' and '.join(given) or 'no tool'}; accepted: "
                '{"type": "function", "function": {"name": …}} or {"type": "allowed_tools", "allowed_tools": '
                '{"mode": "auto" or "required", "tools": […]}}'
            )

    @property
    def names(self) -> list[str]:
        """Of the functions."""
        if self.allowed_tools is not None:
            return [one.spec.name for one in self.allowed_tools.tools]
        assert self.function is not None, "checked"
        return [self.function.name]

    @property
    def mode(self) -> Literal["auto", "required"]:
        """Whether one of them must be called."""
        return "required" if self.allowed_tools is None else self.allowed_tools.mode


@dataclass(frozen=True)
class CalledFunction:
    """The function of a call that the assistant has made, as it made it: clients send back what they were answered.

    Attributes:
        name: of any form, also of a function that is none of the tools.
        arguments: JSON text, also with mistakes or cut short.
    """

    name: Annotated[str, Size(1, MAX_NAME)]
    arguments: str

    @property
    def parsed(self) -> Any:
        """The arguments as values; the text itself if it is no JSON object."""
        try:
            found = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            return self.arguments
        return found if isinstance(found, dict) else self.arguments


@dataclass(frozen=True)
class MessageCall:
    """A call in an assistant's message."""

    id: Annotated[str, Size(1, MAX_NAME)]
    type: Literal["function"]
    function: CalledFunction

    def document(self) -> dict[str, Any]:
        """As chat templates expect it: the arguments are values, or the model's text where it is none."""
        function = {"name": self.function.name, "arguments": self.function.parsed}
        return {"id": self.id, "type": "function", "function": function}


class ToolForm(ABC):
    """The text of a call, as a model was trained to write it."""

    name: str

    @abstractmethod
    def parser(self, max_calls: int | None) -> AnswerParser:
        """A parser of one answer."""

    @abstractmethod
    def tagged(self, function: FunctionSpec) -> Tagged:
        """The text of a call of `function`."""

    separator: str
    trigger: str

    def required(self, functions: Sequence[FunctionSpec], many: bool) -> Tags:
        """Answers that are calls, one or, with `many`, more."""
        return Tags(tuple(self.tagged(one) for one in functions), self.separator, many)

    def strict(self, functions: Sequence[FunctionSpec], many: bool) -> Tags:
        """Any answer whose calls, if there are some, are right."""
        return Tags(tuple(self.tagged(one) for one in functions), self.separator, many, self.trigger)


class HermesForm(ToolForm):
    """`<tool_call>` and JSON with `arguments`: Hermes, Qwen 2.5 and 3, and many others."""

    name, separator, trigger = "hermes", "\n", "<tool_call>"

    def parser(self, max_calls: int | None) -> AnswerParser:
        return HermesParser(max_calls)

    def tagged(self, function: FunctionSpec) -> Tagged:
        begin = f'<tool_call>\n{{"name": "{function.name}", "arguments": '
        return Tagged(begin, _arguments(function), "}\n</tool_call>")


class LlamaForm(ToolForm):
    """JSON with `parameters` as the whole answer: Llama 3.1 to 3.3."""

    name, separator, trigger = "llama3_json", "; ", '{"name": '

    def parser(self, max_calls: int | None) -> AnswerParser:
        return LlamaParser(max_calls)

    def tagged(self, function: FunctionSpec) -> Tagged:
        return Tagged(f'{{"name": "{function.name}", "parameters": ', _arguments(function), "}")


def _arguments(function: FunctionSpec) -> JsonValue:
    return JsonValue(function.schema, f"the parameters of {function.name}")


def form_of(template: str) -> ToolForm | None:
    """The form that a chat template's text describes; None: another one.

    A template without tools gets the Hermes form from `hermes_system_text`.
    """
    if not has_tools(template):
        return HermesForm()
    if "<function=" in template or "<arg_key>" in template:  # XML inside the marks
        return None
    if "<tool_call>" in template:
        return HermesForm()
    if '"parameters"' in template and ("<|python_tag|>" in template or "<|start_header_id|>" in template):
        return LlamaForm()
    return None


def has_tools(template: str) -> bool:
    """Whether a chat template renders tools."""
    return re.search(r"\btools\b", template) is not None


def hermes_system_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """Text about tools for a system message, where the chat template has no place for them."""
    declared = "\n".join(json.dumps(one, ensure_ascii=False) for one in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{declared}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call>"
    )


def without_tools(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation with tools, as messages of plain text, for a chat template that knows none."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        content = turn["content"]
        for call in turn.get("tool_calls") or ():
            called = json.dumps(call["function"], ensure_ascii=False)
            content += ("\n" if content else "") + f"<tool_call>\n{called}\n</tool_call>"
        if turn["role"] == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if found and found[-1].get("responses"):
                found[-1]["content"] += f"\n{content}"
                continue
            found.append({"role": "user", "content": content, "responses": True})
        else:
            found.append({"role": turn["role"], "content": content})
    if tools:
        text = hermes_system_text(tools)
        if found and found[0]["role"] == "system":
            found[0]["content"] += f"\n\n{text}"
        else:
            found.insert(0, {"role": "system", "content": text})
    return [{"role": one["role"], "content": one["content"]} for one in found]


def chosen_functions(
    tools: Sequence[ToolSpec], choice: str | ToolChoice | None
) -> tuple[list[FunctionSpec], Literal["none", "auto", "required"]]:
    """The functions that may be called, and whether one must be.

    Raises:
        ApiError: 400, too many tools, a name twice, or a choice of none of them.
    """
    functions = [one.spec for one in tools]
    names = [one.name for one in functions]
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"got {len(tools)} tools; accepted: up to {MAX_TOOLS}", "tools")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise bad_request(f"got the function {shown(twice)} twice in tools; accepted: each once", "tools")
    if isinstance(choice, ToolChoice):
        for name in choice.names:
            if name not in names:
                raise bad_request(f"got tool_choice of {shown(name)}; accepted: one of the tools", "tool_choice")
        return [one for one in functions if one.name in choice.names], choice.mode
    if not functions:
        if choice == "required":
            raise bad_request("got tool_choice 'required' without tools; accepted: with tools", "tool_choice")
        return [], "none"
    mode: Any = choice or "auto"
    return ([] if mode == "none" else functions), mode
