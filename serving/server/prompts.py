"""Prompts from messages and texts: token ids, and the fixed prompt with which an agent's calls begin."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from tenure.documents import shown

from .answer_parsers import ReasoningParser
from .api_errors import ApiError, bad_request
from .api_requests import ChatMessage
from .tool_calls import ToolForm, ToolSpec, form_of, has_tools, without_tools

SYSTEM_ROLES = ("system", "developer")
_PROBE = "\ue000"  # a private character: the content of a user's turn that no client's turn begins with


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the engine reads it.

    Attributes:
        ids: token ids.
        fixed_tokens: of these, the tokens at the beginning that depend on the system messages only; 0: unknown.
        agent: a name made from the fixed prompt, the same for all chats with it; None where it is unknown.
        text: of a chat.
    """

    ids: list[int]
    fixed_tokens: int = 0
    agent: str | None = None
    text: str = ""

    @property
    def thinking(self) -> bool:
        """Whether the answer begins inside reasoning."""
        return self.text.rstrip().endswith(ReasoningParser.OPEN)


class PromptRenderer:
    """Renders with the model's own chat template. Used by one thread at a time: tokenizers have state.

    Args:
        tokenizer: of transformers.
        min_fixed_tokens: a shorter fixed prompt counts as unknown: a page of the prefix tree, which nothing shorter
            can be shared in.
    """

    def __init__(self, tokenizer: Any, min_fixed_tokens: int) -> None:
        self.tokenizer, self._min_fixed_tokens = tokenizer, min_fixed_tokens
        self.decode_all = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @property
    def has_response_template(self) -> bool:
        """Whether the tokenizer brings its own parser of answers."""
        return getattr(self.tokenizer, "response_template", None) is not None

    def chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[ToolSpec] = (), enable_thinking: bool | None = None
    ) -> RenderedPrompt:
        """The prompt of a chat, which ends where the assistant's answer begins.

        The fixed prompt is what rendering the leading system messages and the tools alone has in common with the whole
        prompt.

        Args:
            tools: that the model may call.
            enable_thinking: the template's variable of this name; None: its default.

        Raises:
            ApiError: 400, the model has no chat template, it refuses the messages, or has an unknown form for tools.
        """
        template = self.template(bool(tools))
        turns, declared = _turns(messages), [one.document() for one in tools]
        if not has_tools(template) and (tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns)):
            turns, declared = without_tools(turns, declared), []
        options: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        if declared:
            options["tools"] = declared
        text = self._render(turns, answer=True, **options)
        ids = self._encode(text)
        alone = self._fixed_alone([*takewhile(lambda turn: turn["role"] == "system", turns)], options)
        fixed = _common(alone, ids)
        if fixed < self._min_fixed_tokens:
            return RenderedPrompt(ids, text=text)
        digest = hashlib.blake2b(np.asarray(alone, np.int32).tobytes(), digest_size=8)
        return RenderedPrompt(ids, fixed, f"prompt-{digest.hexdigest()}", text)

    def template(self, with_tools: bool) -> str:
        """The text of the chat template.

        Args:
            with_tools: of the one for tools, where the model has several.

        Raises:
            ApiError: 400, there is none.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise bad_request("the model has no chat template; accepted: /v1/completions with the whole prompt")
        return self.tokenizer.get_chat_template(tools=[{}] if with_tools else None)

    def tool_form(self) -> ToolForm:
        """The form in which the model calls tools.

        Raises:
            ApiError: 400, the template describes one that is not known.
        """
        form = form_of(self.template(True))
        if form is None:
            raise bad_request(
                "tools are not supported with this model: its chat template describes calls in a form that is not "
                "known; accepted: the forms of Hermes and Llama 3, templates without tools, and tokenizers with a "
                "response_template", "tools", "unsupported_parameter",
            )  # fmt: skip
        return form

    @property
    def thinks(self) -> bool:
        """Whether the chat template knows reasoning."""
        return ReasoningParser.CLOSE in self.template(False)

    def completion(self, prompt: Any, max_prompts: int) -> list[RenderedPrompt]:
        """The prompts of a completion: a text, token ids, or a list of up to `max_prompts` of these.

        Raises:
            ValueError: anything else.
        """
        prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
            raise ValueError(f"got {shown(prompt)} as prompt; accepted: a text, token ids, or a list of these")
        if len(prompts) > max_prompts:  # before they are tokenised
            raise ValueError(f"got {len(prompts)} prompts; accepted: up to {max_prompts}, and as many answers")
        return [
            RenderedPrompt(list(self.tokenizer(one)["input_ids"]) if isinstance(one, str) else one) for one in prompts
        ]

    def _fixed_alone(self, system: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        """The system messages and tools without a chat.

        Some templates want a user's turn behind them, or put the tools into it: then that has a private character,
        and the text up to it is taken.
        """
        if not system and "tools" not in options:
            return []
        if "tools" not in options:
            try:
                return self._encode(self._render(system, answer=False, **options))
            except ApiError:
                pass
        probe = [*system, {"role": "user", "content": _PROBE}]
        return self._encode(self._render(probe, answer=False, **options).partition(_PROBE)[0])

    def _render(self, turns: list[dict[str, Any]], answer: bool, **options: Any) -> str:
        """The text of a chat template.

        Raises:
            ApiError: 400, the template refuses the messages.
        """
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer, **options)
        except (TemplateError, TypeError) as error:  # a template that expects another type of content
            raise bad_request(
                f"the model's chat template refuses the messages: {str(error)[:200]}", "messages"
            ) from None

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def token_text(self, token: int) -> str:
        """A token's own text, for log-probabilities; with a replacement sign for a part of a character."""
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)


def _turns(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates expect them."""
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the functions, by call
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.text}
        if message.role in SYSTEM_ROLES:
            turn["role"] = "system"
        if message.reasoning_content is not None:
            turn["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            turn["tool_calls"] = [call.document() for call in message.tool_calls]
            names |= {call.id: call.function.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            turn |= {"tool_call_id": message.tool_call_id, "name": names.get(message.tool_call_id, "")}
        turns.append(turn)
    return turns


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
