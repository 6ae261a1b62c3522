"""Prompts from messages and texts: token ids, and the fixed prompt with which an agent's calls begin."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from tenure.documents import shown

from .api_errors import bad_request
from .api_requests import ChatMessage

SYSTEM_ROLES = ("system", "developer")
_PROBE = "\ue000"  # a private character: the content of a user's turn that no client's turn begins with


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the engine reads it.

    Attributes:
        ids: token ids.
        fixed_tokens: of these, the tokens at the beginning that depend on the system messages only; 0: unknown.
        agent: a name made from the fixed prompt, the same for all chats with it; None where it is unknown.
    """

    ids: list[int]
    fixed_tokens: int = 0
    agent: str | None = None


class PromptRenderer:
    """Renders with the model's own chat template. Used by one thread at a time: tokenizers have state.

    Args:
        tokenizer: of transformers.
        min_fixed_tokens: a shorter fixed prompt counts as unknown: a page of the prefix tree, which nothing shorter
            can be shared in.
    """

    def __init__(self, tokenizer: Any, min_fixed_tokens: int) -> None:
        self._tokenizer, self._min_fixed_tokens = tokenizer, min_fixed_tokens

    def chat(self, messages: Sequence[ChatMessage]) -> RenderedPrompt:
        """The prompt of a chat, which ends where the assistant's answer begins.

        The fixed prompt is what rendering the leading system messages alone has in common with the whole prompt.

        Raises:
            ApiError: 400, the model has no chat template, or it refuses the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise bad_request("the model has no chat template; accepted: /v1/completions with the whole prompt")
        turns = [{"role": _role(one), "content": one.text} for one in messages]
        ids = self._encode(self._render(turns, answer=True))
        system = [*takewhile(lambda turn: turn["role"] == "system", turns)]
        alone = self._system_alone(system)
        fixed = _common(alone, ids)
        if fixed < self._min_fixed_tokens:
            return RenderedPrompt(ids)
        digest = hashlib.blake2b(np.asarray(alone, np.int32).tobytes(), digest_size=8)
        return RenderedPrompt(ids, fixed, f"prompt-{digest.hexdigest()}")

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
            RenderedPrompt(list(self._tokenizer(one)["input_ids"]) if isinstance(one, str) else one) for one in prompts
        ]

    def _system_alone(self, system: list[dict[str, str]]) -> list[int]:
        """The system messages without a chat; some templates want a user's turn behind them."""
        from jinja2 import TemplateError

        if not system:
            return []
        try:
            text = self._render(system, answer=False)
        except TemplateError:
            text = self._render([*system, {"role": "user", "content": _PROBE}], answer=False).partition(_PROBE)[0]
        return self._encode(text)

    def _render(self, turns: list[dict[str, str]], answer: bool) -> str:
        return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def token_text(self, token: int) -> str:
        """A token's own text, for log-probabilities; with a replacement sign for a part of a character."""
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)


def _role(message: ChatMessage) -> str:
    return "system" if message.role in SYSTEM_ROLES else message.role


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
