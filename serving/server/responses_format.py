"""Answers of `/v1/responses`: items of output, whole, or as the events in which they grow."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from ..events import AnswerEvent
from ..request import RequestOutput
from .answer_parsers import AnswerDelta, CallDelta, TextParser
from .answers import AnswerFormat, usage
from .api_errors import ApiError, bad_request
from .cache_explanation import explanation
from .responses_body import LOGPROBS, ResponsesBody

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}  # of ids, as OpenAI has them


class ResponsesFormat(AnswerFormat):
    """Of `/v1/responses`; there is one answer.

    Raises:
        ApiError: 400, logprobs of an answer that is not all text: its tokens are not told apart by item.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._parser = self._make_parser()
        self._items: list[dict[str, Any]] = []  # of output; the last one grows, unless it has been completed
        self._number = 0  # of events
        self._call = -1  # index of the call that grows
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text, if they have one, is still to come
        if LOGPROBS in (self._request.include or ()) and self._make_parser is not TextParser:
            raise bad_request(
                f"include {LOGPROBS!r} is not supported by this server with tools, or with a model that reasons; "
                "accepted: where the answer is text, or chat completions", "include", "unsupported_parameter",
            )  # fmt: skip

    def whole(self, choices: Sequence[AnswerEvent], n: int) -> dict[str, Any]:
        (event,) = choices
        self._events(event)
        return self._response([event.output] if event.output is not None else [])

    def events(self, choice: int, event: AnswerEvent) -> bytes:
        return self._events(event)

    def end(self, outputs: Sequence[RequestOutput], n: int, include_usage: bool) -> bytes:
        response = self._response(outputs)
        return self._encode(f"response.{response['status']}", response=response)

    def error(self, error: ApiError) -> bytes:
        return self._encode("error", code=error.code, message=str(error), param=error.param)

    def _events(self, event: AnswerEvent) -> bytes:
        """The events for a part of the answer."""
        found = b""
        if not self._number:
            for name in ("created", "in_progress"):
                found += self._encode(f"response.{name}", response=self._response([]))
        self._logprobs += self._token_logprobs(event)
        found += self._delta(self._parser.push(event.text or "", event.tokens))
        if event.output is not None:
            found += self._delta(self._parser.finish())
            if not self._items:
                found += self._open("message")
            if self._logprobs:
                found += self._grow("message", "response.output_text", "")
            complete = event.output.finished_by is not None
            found += self._close("completed" if complete else "incomplete")
        return found

    def _delta(self, delta: AnswerDelta) -> bytes:
        found = b""
        if delta.reasoning:
            found += self._grow("reasoning", "response.reasoning_text", delta.reasoning)
        if delta.content:
            found += self._grow("message", "response.output_text", delta.content)
        for part in delta.calls:
            found += self._grow_call(part)
        return found

    def _grow(self, kind: str, event: str, text: str) -> bytes:
        """More text of the last item, or of a new one."""
        found = b"" if self._is_open(kind) else self._open(kind)
        self._items[-1]["content"][0]["text"] += text
        more: dict[str, Any] = {}
        if kind == "message":
            more["logprobs"], self._logprobs = self._logprobs, []
            self._items[-1]["content"][0]["logprobs"] += more["logprobs"]
        return found + self._of_item(f"{event}.delta", content_index=0, delta=text, **more)

    def _grow_call(self, part: CallDelta) -> bytes:
        found = b""
        if part.id is not None:
            self._call = part.index
            found += self._open("function_call", call_id=part.id, name=part.name)
        if part.arguments and self._is_open("function_call") and part.index == self._call:
            self._items[-1]["arguments"] += part.arguments
            found += self._of_item("response.function_call_arguments.delta", delta=part.arguments)
        return found

    def _is_open(self, kind: str) -> bool:
        return bool(self._items) and self._items[-1]["type"] == kind and self._items[-1]["status"] == "in_progress"

    def _open(self, kind: str, /, **fields: Any) -> bytes:
        """Begins an item, after completing the one before."""
        found = self._close("completed")
        item: dict[str, Any] = {"id": f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
        part: dict[str, Any] = {}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item |= {"role": "assistant", "content": [part]}
        elif kind == "reasoning":
            part = {"type": "reasoning_text", "text": ""}
            item |= {"summary": [], "content": [part]}
        else:
            item |= fields | {"arguments": ""}
        self._items.append(item)
        found += self._encode(
            "response.output_item.added", output_index=len(self._items) - 1, item=_without_parts(item)
        )
        if part:
            found += self._of_item("response.content_part.added", content_index=0, part=part)
        return found

    def _close(self, status: str) -> bytes:
        """Ends the last item, if it grows."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return b""
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            fields = {"arguments": item["arguments"], "name": item["name"]}
            found = self._of_item("response.function_call_arguments.done", **fields)
        else:
            (part,) = item["content"]
            message = item["type"] == "message"
            name = "response.output_text" if message else "response.reasoning_text"
            more = {"logprobs": part["logprobs"]} if message else {}
            found = self._of_item(f"{name}.done", content_index=0, text=part["text"], **more)
            found += self._of_item("response.content_part.done", content_index=0, part=part)
        return found + self._encode("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _of_item(self, name: str, /, **fields: Any) -> bytes:
        """An event about the last item."""
        return self._encode(name, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _encode(self, name: str, /, **fields: Any) -> bytes:
        document = {"type": name, "sequence_number": self._number} | fields
        self._number += 1
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        return f"event: {name}\ndata: {text}\n\n".encode()

    def _response(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The whole response as far as it is known; it has ended if there are `outputs`."""
        body, status, details, numbers = self._request, "in_progress", None, None
        assert isinstance(body, ResponsesBody), "the endpoint reads these"
        if outputs:
            status = "completed" if outputs[0].finished_by is not None else "incomplete"
            details = None if status == "completed" else {"reason": "max_output_tokens"}
            counted = usage(outputs, 1)
            numbers = {
                "input_tokens": counted["prompt_tokens"], "output_tokens": counted["completion_tokens"],
                "total_tokens": counted["total_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "input_tokens_details": counted["prompt_tokens_details"] | {"cache_write_tokens": 0},
            }  # fmt: skip
        choice = body.tool_choice or "auto"
        given_choice = choice if isinstance(choice, str) else _given(choice)
        format = {"type": "text"} if body.text is None or body.text.format is None else _given(body.text.format)
        return {
            "id": self.id, "object": "response", "created_at": self._base["created"], "status": status, "error": None,
            "incomplete_details": details, "instructions": body.instructions, "metadata": {}, "model": body.model,
            "max_output_tokens": body.max_output_tokens, "output": self._items, "previous_response_id": None,
            "parallel_tool_calls": body.parallel_tool_calls is not False, "store": False, "usage": numbers,
            "temperature": 1.0 if body.temperature is None else body.temperature, "text": {"format": format},
            "top_p": 1.0 if body.top_p is None else body.top_p, "truncation": "disabled",
            "tool_choice": given_choice, "top_logprobs": body.top_logprobs or 0,
            "tools": [_given(one) for one in body.tools or ()], "reasoning": {"effort": None, "summary": None},
        } | (explanation(outputs[0]) if outputs else {})  # fmt: skip


def _without_parts(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it begins."""
    return item | ({"content": []} if "content" in item else {})


def _given(value: Any) -> dict[str, Any]:
    """A part of the body, without fields that were not given."""
    fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
    found = {name: _plain(one) for name, one in fields.items() if one is not None}
    if found.get("type") == "function" and "name" in found and hasattr(value, "parameters"):
        found = {"parameters": None, "strict": None} | found
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_given(one) for one in value]
    return dict(value) if hasattr(value, "keys") else value
