"""Answers in OpenAI's form: whole, and as the events of a stream. One class an endpoint."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from ..events import AnswerEvent
from ..request import RequestOutput
from ..sampling.sampler import TokenLogprobs
from ..sampling.stop import REPLACEMENT
from .answer_parsers import AnswerDelta, AnswerParser, CallDelta, TextParser
from .api_errors import ApiError
from .cache_explanation import explanation

PING = b": ping\n\n"  # a comment, which clients skip
DONE = b"data: [DONE]\n\n"


def finish_reason(output: RequestOutput, num_calls: int = 0) -> str:
    """`stop`: the answer ended by itself; `tool_calls`: with calls; `length`: at its limit of tokens, or of memory."""
    if output.finished_by is None:
        return "length"
    return "tool_calls" if num_calls else "stop"


def joined_calls(parts: Sequence[AnswerDelta]) -> list[CallDelta]:
    """The whole calls of an answer."""
    found: dict[int, CallDelta] = {}
    for part in (one for delta in parts for one in delta.calls):
        whole = found.setdefault(part.index, CallDelta(part.index, part.id, part.name))
        whole.arguments += part.arguments
    return list(found.values())


def _call_document(part: CallDelta) -> dict[str, Any]:
    """A part of a call, as an event of a chat has it."""
    if part.id is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}


def usage(outputs: Sequence[RequestOutput], n: int) -> dict[str, Any]:
    """Numbers of tokens. A prompt counts once for its `n` answers, which follow each other in `outputs`.

    `cached_tokens` are those of the first answer's prompt: the others find what that one has computed.
    """
    prompts = outputs[::n]
    prompt_tokens = sum(len(one.request.prompt) for one in prompts)
    answer_tokens = sum(one.num_output_tokens for one in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
    }


class AnswerFormat(ABC):
    """The documents of one response.

    Args:
        id: of the response.
        created: seconds since 1970.
        token_text: a token's own text.
        make_parser: of one answer, which finds reasoning and tool calls.
        request: the body that is answered.
    """

    def __init__(
        self, id: str, created: int, model: str, token_text: Callable[[int], str],
        make_parser: Callable[[], AnswerParser] = TextParser, request: Any = None,
    ) -> None:  # fmt: skip
        self.id, self._token_text, self._make_parser, self._request = id, token_text, make_parser, request
        self._base = {"id": id, "created": created, "model": model}

    @abstractmethod
    def whole(self, choices: Sequence[AnswerEvent], n: int) -> dict[str, Any]:
        """The response of a request without a stream, from the complete answers."""

    @abstractmethod
    def events(self, choice: int, event: AnswerEvent) -> bytes:
        """The events of a stream for a part of an answer."""

    @abstractmethod
    def end(self, outputs: Sequence[RequestOutput], n: int, include_usage: bool) -> bytes:
        """The last events of a stream."""

    def error(self, error: ApiError) -> bytes:
        """The last event of a stream that has failed."""
        return error.event()

    def _token_logprobs(self, event: AnswerEvent) -> list[dict[str, Any]]:
        """An entry for each token of the event, in the form of chats; none if they were not asked for."""
        found = []
        for token, row in zip(event.tokens, event.logprobs or (), strict=event.logprobs is not None):
            top = zip(row.top_ids, row.top_logprobs, strict=True)
            found.append(self._one(token, row.logprob) | {"top_logprobs": [self._one(*each) for each in top]})
        return found

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        known = REPLACEMENT not in text  # else the token is a part of a character, whose bytes are not known here
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}


class ChoicesFormat(AnswerFormat):
    """A response with a choice for each answer."""

    whole_object: str
    chunk_object: str

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._offsets: dict[int, int] = {}  # characters of the answer so far, by choice

    def whole(self, choices: Sequence[AnswerEvent], n: int) -> dict[str, Any]:
        outputs = [one.output for one in choices if one.output is not None]
        found = [self._whole_choice(number, one) | explanation(one.output) for number, one in enumerate(choices)]
        return self._base | {"object": self.whole_object, "choices": found, "usage": usage(outputs, n)}

    def events(self, choice: int, event: AnswerEvent) -> bytes:
        first = choice not in self._offsets
        found = self._chunk_choices(choice, event, first)
        if event.output is not None:
            found[-1] |= explanation(event.output)
        self._offsets[choice] = self._offsets.get(choice, 0) + len(event.text or "")
        return b"".join(self._event([one]) for one in found)

    def usage_event(self, outputs: Sequence[RequestOutput], n: int) -> bytes:
        """The event with the numbers of tokens, which has no choices."""
        return self._event([], usage=usage(outputs, n))

    def end(self, outputs: Sequence[RequestOutput], n: int, include_usage: bool) -> bytes:
        return (self.usage_event(outputs, n) if include_usage else b"") + DONE

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        document = self._base | {"object": self.chunk_object, "choices": choices} | more
        return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    @abstractmethod
    def _whole_choice(self, choice: int, event: AnswerEvent) -> dict[str, Any]:
        """A complete answer."""

    @abstractmethod
    def _chunk_choices(self, choice: int, event: AnswerEvent, first: bool) -> list[dict[str, Any]]:
        """A part of an answer, as the choices of one event each."""


class ChatFormat(ChoicesFormat):
    """Of `/v1/chat/completions`."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._parsers: dict[int, AnswerParser] = {}  # by choice
        self._with_calls = self._make_parser is not TextParser

    def _whole_choice(self, choice: int, event: AnswerEvent) -> dict[str, Any]:
        assert event.output is not None, "the answer is complete"
        parser = self._make_parser()
        parts = [parser.push(event.text or "", event.tokens), parser.finish()]
        message: dict[str, Any] = {
            "role": "assistant", "content": "".join(part.content for part in parts), "refusal": None,
        }  # fmt: skip
        reasoning = "".join(part.reasoning for part in parts)
        if reasoning:
            message["reasoning_content"] = reasoning
        calls = joined_calls(parts)
        if calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
                for one in calls
            ]
        return {
            "index": choice, "message": message, "logprobs": self._logprobs(event),
            "finish_reason": finish_reason(event.output, parser.num_calls),
        }  # fmt: skip

    def _chunk_choices(self, choice: int, event: AnswerEvent, first: bool) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        parser = self._parsers.setdefault(choice, self._make_parser())
        parts = [parser.push(event.text or "", event.tokens)]
        if event.output is not None:
            parts.append(parser.finish())
        for part in parts:
            if part.reasoning:
                deltas.append({"reasoning_content": part.reasoning})
            if part.content:
                deltas.append({"content": part.content})
            deltas += [{"tool_calls": [_call_document(one)]} for one in part.calls]
        if event.logprobs and not deltas:
            deltas.append({"content": ""})
        found = [self._delta(choice, delta) for delta in deltas]
        if event.logprobs:
            found[0]["logprobs"] = self._logprobs(event)
        if first:
            found.insert(0, self._delta(choice, {"role": "assistant", "content": None if self._with_calls else ""}))
        if event.output is not None:
            reason = finish_reason(event.output, parser.num_calls)
            found.append(self._delta(choice, {}) | {"finish_reason": reason})
        return found

    @staticmethod
    def _delta(choice: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, event: AnswerEvent) -> dict[str, Any] | None:
        return None if event.logprobs is None else {"content": self._token_logprobs(event), "refusal": None}


class CompletionFormat(ChoicesFormat):
    """Of `/v1/completions`."""

    whole_object = chunk_object = "text_completion"

    def _whole_choice(self, choice: int, event: AnswerEvent) -> dict[str, Any]:
        assert event.output is not None, "the answer is complete"
        return self._part(choice, event) | {"finish_reason": finish_reason(event.output)}

    def _chunk_choices(self, choice: int, event: AnswerEvent, first: bool) -> list[dict[str, Any]]:
        reason = None if event.output is None else finish_reason(event.output)
        if not event.text and not event.logprobs and reason is None:
            return []
        return [self._part(choice, event) | {"finish_reason": reason}]

    def _part(self, choice: int, event: AnswerEvent) -> dict[str, Any]:
        return {"index": choice, "text": event.text or "", "logprobs": self._logprobs(choice, event)}

    def _logprobs(self, choice: int, event: AnswerEvent) -> dict[str, Any] | None:
        if event.logprobs is None:
            return None
        texts = [self._token_text(token) for token in event.tokens]
        rows: list[TokenLogprobs] = event.logprobs
        offsets, end = [], self._offsets.get(choice, 0)
        for text in texts:
            offsets.append(end)
            end += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [row.logprob for row in rows],
            "top_logprobs": [self._top(row) for row in rows],
            "text_offset": offsets,
        }

    def _top(self, row: TokenLogprobs) -> dict[str, float]:
        """By the tokens' texts; of tokens with the same text, such as parts of characters, the most likely one."""
        top = zip(row.top_ids, row.top_logprobs, strict=True)
        return {self._token_text(token): value for token, value in reversed([*top])}
