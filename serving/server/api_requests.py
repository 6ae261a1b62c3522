"""The bodies of chats and completions, checked field by field; unsupported fields are refused by name."""

from __future__ import annotations

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from tenure.checked import Range, Size, read
from tenure.documents import parse_json

from ..request import MAX_NAME, MAX_NUMBER, shown
from ..sampling.constraint import Constraint
from ..sampling.params import MAX_LOGPROBS, SamplingParams
from .api_errors import bad_request
from .server_config import ServerConfig
from .structured_output import ResponseFormat, StructuredOutputs, requested_constraint
from .tool_calls import MessageCall, ToolChoice, ToolSpec

logger = logging.getLogger(__name__)
Tokens = Annotated[int, Range(1, MAX_NUMBER)]
Body = TypeVar("Body", bound="ApiBody")

# Fields that this server does not carry out, and the values with which they ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (),
    "web_search_options": (), "best_of": (1,), "echo": (False,), "suffix": ("",), "prompt_logprobs": (),
    "chat_template": (), "documents": ([],), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "use_beam_search": (False,), "guided_decoding_backend": (), "guided_whitespace_pattern": (), "structural_tag": (),
    "logits_processors": ([],), "prompt_embeds": (),
}  # fmt: skip
# The same, of completions only.
ONLY_CHATS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "chat_template_kwargs": ({},),
}
# Fields whose unknown parts are refused, as they would change the answer.
STRICT_FIELDS = ("response_format", "structured_outputs", "chat_template_kwargs", "tool_choice", "text")
# Fields about the account, storage or billing at OpenAI: known, and of no effect here.
WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Hints by the field that carries them, with their format in `serving.hints`.
HINT_FIELDS = {
    "agent_hints": "sglang", "session_params": "sglang_session", "nvext": "dynamo", "agent_hint": "vllm",
    "kv_transfer_params": "vllm_transfer", "kv_hints": "kv_hints", "kv_cache_retention_config": "tensorrt",
    "kvflow": "kvflow",
}  # fmt: skip


@dataclass(frozen=True)
class StreamOptions:
    """Options of a stream.

    Attributes:
        include_usage: the last event gives the numbers of tokens.
        include_obfuscation: of no effect: events are not padded.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ApiBody(ABC):
    """A body, as `read_body` reads it.

    Attributes:
        elsewhere: fields of other endpoints, and what this one has in their place: ignoring them would surprise.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def generation(self) -> GenerationBody:
        """The request that is to be computed.

        Raises:
            ValueError: a field of another form.
        """

    @classmethod
    def unsupported(cls) -> dict[str, tuple[Any, ...]]:
        """Fields that are refused, with the values that ask for nothing."""
        return UNSUPPORTED


@dataclass(frozen=True, kw_only=True)
class GenerationBody(ApiBody):
    """Fields that chats and completions share. null is the default; sampling fields are those of `SamplingParams`.

    Attributes:
        model: one of `/v1/models`.
        temperature: 1 by default, as OpenAI has it.
        stop: a text, or up to 16, that end the answer.
        min_tokens: `SamplingParams.min_new_tokens`, by vLLM's name.
        n: answers to each prompt.
        cache_salt: divides the client's cache: prompts are found by calls with the same salt only, as in vLLM.
        explain_cache: each answer tells what of its prompt was reused, and why the rest was not.
    """

    model: Annotated[str, Size(1, MAX_NAME)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    n: Annotated[int, Range(1, 128)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    stop: str | tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Range(0, MAX_NUMBER)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Mapping[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: tuple[Annotated[str, Size(1)], ...] | None = None
    guided_grammar: str | None = None
    cache_salt: Annotated[str, Size(1, MAX_NAME)] | None = None
    explain_cache: bool | None = None

    def generation(self) -> GenerationBody:
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the last event of a stream gives the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens of an answer; None: not given."""
        return self.max_tokens

    @abstractmethod
    def top_logprobs_wanted(self) -> int | None:
        """`SamplingParams.logprobs`."""

    def constraint(self) -> tuple[str, Constraint] | None:
        """The form that the text must have, with the field that says so; None: any.

        Raises:
            ApiError, ValueError: as `requested_constraint`.
        """
        guided = StructuredOutputs(
            json=self.guided_json, regex=self.guided_regex, choice=self.guided_choice, grammar=self.guided_grammar
        )
        return requested_constraint(self.response_format, self.structured_outputs, guided)

    def sampling(self) -> SamplingParams:
        """The parameters of all `n` answers.

        Raises:
            ValueError: a value out of range, by its name.
        """
        names = (
            "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "logit_bias", "stop_token_ids", "ignore_eos", "n",
        )  # fmt: skip
        given: dict[str, Any] = {"temperature": 1.0}
        given |= {name: value for name in names if (value := getattr(self, name)) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return SamplingParams(
            stop=stop, min_new_tokens=self.min_tokens or 0, logprobs=self.top_logprobs_wanted(), **given
        )


@dataclass(frozen=True)
class ContentPart:
    """A part of a message; only text is supported.

    Raises:
        ValueError: a part of another type, by name.
    """

    type: str
    text: str | None = None

    def __post_init__(self) -> None:
        if self.type != "text" or self.text is None:
            raise ValueError(f"got a part of type {shown(self.type)}; accepted: type text, with its text")


@dataclass(frozen=True)
class ChatMessage:
    """A message of a chat.

    Attributes:
        tool_calls: that the assistant has made.
        tool_call_id: of a tool's message: the call whose result it is.
        reasoning_content: that the assistant's answer came with; for templates that render it.

    Raises:
        ValueError: a message without what its role needs.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[tuple[ContentPart, ...], Size(1)] | None = None
    name: Annotated[str, Size(1, MAX_NAME)] | None = None
    tool_calls: tuple[MessageCall, ...] | None = None
    tool_call_id: Annotated[str, Size(1, MAX_NAME)] | None = None
    reasoning_content: str | None = None

    def __post_init__(self) -> None:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"got tool_calls in a message of role {self.role}; accepted: of role assistant")
        if self.content is None and not self.tool_calls:
            raise ValueError("got no content; accepted: a text or text parts, or an assistant's tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError(
                f"got role {self.role}, tool_call_id={shown(self.tool_call_id)}; accepted: role tool with it"
            )

    @property
    def text(self) -> str:
        """The content as one text; parts are joined by line ends."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content if part.text is not None)


@dataclass(frozen=True)
class TemplateOptions:
    """Variables of a chat template that a client may set."""

    enable_thinking: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ChatBody(GenerationBody):
    """The body of `/v1/chat/completions`."""

    elsewhere: ClassVar[Mapping[str, str]] = {
        "input": "messages", "prompt": "messages", "instructions": "a message of role system",
        "max_output_tokens": "max_completion_tokens", "text": "response_format",
    }  # fmt: skip

    messages: Annotated[tuple[ChatMessage, ...], Size(1)]
    tools: tuple[ToolSpec, ...] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Range(0, MAX_LOGPROBS)] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError(
                f"got max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens}; accepted: "
                "one of them"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(f"got top_logprobs={self.top_logprobs} without logprobs; accepted: with logprobs=true")
        called: set[str] = set()
        for number, message in enumerate(self.messages):
            called.update(call.id for call in message.tool_calls or ())
            if message.tool_call_id is not None and message.tool_call_id not in called:
                raise ValueError(
                    f"got {shown(message.tool_call_id)} as messages[{number}].tool_call_id; accepted: the id of a call "
                    "in an earlier message"
                )

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


@dataclass(frozen=True, kw_only=True)
class CompletionBody(GenerationBody):
    """The body of `/v1/completions`; a prompt is a text or token ids, or a list of these."""

    elsewhere: ClassVar[Mapping[str, str]] = {
        "messages": "prompt",
        "max_completion_tokens": "max_tokens",
        "max_output_tokens": "max_tokens",
    }

    prompt: Any
    logprobs: Annotated[int, Range(0, MAX_LOGPROBS)] | None = None

    @classmethod
    def unsupported(cls) -> dict[str, tuple[Any, ...]]:
        return UNSUPPORTED | ONLY_CHATS

    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs


_INDEX = re.compile(r"\[[0-9]+\]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped


def parse_body(raw: bytes, config: ServerConfig) -> Any:
    """The values of a body in JSON; an empty one is an empty object.

    Raises:
        ValueError: no JSON in UTF-8, beyond the bounds, or with a half of a character, which no answer could repeat.
    """
    text = decode_body(raw) or "{}"
    document = parse_json(text, "the body", config.body_limits)
    if _SURROGATE.search(text):
        require_whole_characters(json.dumps(document, ensure_ascii=False))
    return document


def decode_body(raw: bytes) -> str:
    """A body as text; ValueError unless it is UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"got {len(raw)} bytes that are no text in UTF-8 as the body; accepted: UTF-8") from None


def require_whole_characters(text: str) -> None:
    """ValueError for a text with one half of a surrogate pair, which JSON and YAML can write as an escape."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"got {text[error.start]!a} in the body; accepted: whole characters") from None


class UnknownFields:
    """Warns once about each unknown field of bodies; used by the thread that reads them."""

    def __init__(self, max_fields: int) -> None:
        self._max_fields, self._warned = max_fields, set[str]()

    def warn(self, unknown: set[str]) -> None:
        """Logs the fields of a body that are not known, except those it has logged before."""
        names = {_INDEX.sub("[]", name)[:60] for name in unknown}
        fresh = sorted(names - self._warned)
        fresh = fresh[: self._max_fields - len(self._warned)]
        if fresh:
            self._warned.update(fresh)
            quoted = ", ".join(f"'{name}'" for name in fresh[:10])  # without line ends, see `shown_name`
            logger.warning("unknown fields of requests are ignored: %s", quoted)


def read_body(
    kind: type[Body], document: Any, config: ServerConfig, unknown_fields: UnknownFields
) -> tuple[Body, dict[str, Any]]:
    """A parsed body as its dataclass, and the hints in it by field.

    Raises:
        ApiError: 400, a field is not supported, or belongs to another endpoint.
        ValueError: a field is missing, or of a wrong type or size.
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"got {shown(document)} as the body; accepted: a JSON object")
    for name in kind.elsewhere:
        if document.get(name) is not None:
            meant = kind.elsewhere[name]
            raise bad_request(f"{name} is a field of other endpoints; accepted: {meant}", name, "unsupported_parameter")
    unsupported = kind.unsupported()
    for name, neutral in unsupported.items():
        value = document.get(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
            asked = f"; accepted: {' or '.join(map(shown, neutral))}, or no such field" if neutral else ""
            raise bad_request(f"{name} is not supported by this server{asked}", name, "unsupported_parameter")
    hints = {name: value for name, value in document.items() if name in HINT_FIELDS and value is not None}
    known = {
        name: value
        for name, value in document.items()
        if name not in unsupported and name not in HINT_FIELDS and name not in WITHOUT_EFFECT
    }
    unknown: set[str] = set()
    body = read(kind, known, unknown=unknown)
    wrong = sorted(name for name in unknown if name.startswith(tuple(f"{one}." for one in STRICT_FIELDS)))
    if wrong:
        raise bad_request(f"{shown(wrong[0])} is not supported by this server", wrong[0], "unsupported_parameter")
    unknown_fields.warn(unknown)
    return body, hints
