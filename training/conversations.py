"""Conversations as token ids with everything that the assistant says marked: answers, thoughts and tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from .chat import is_special
from .records import RecordError

_SENTINEL = "\ue000\ue001\ue000"  # of the private use area: no text begins or ends with it
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_messages(
    messages: Sequence[dict[str, Any]], tokenizer: Any, tools: Sequence[Any] | None = None, *,
    keep_thoughts: bool = False,
) -> tuple[list[int], list[bool]]:  # fmt: skip
    """Token ids of a conversation in the tokenizer's chat template, and a mask of those that the assistant says.

    Those are what the template marks by `{% generation %}`. In a template without it they are found from renderings:
    an assistant's message begins where the rendering of the messages before it, with the generation prompt, ends. A
    template that renders a message differently once others follow (reasoning models drop earlier thoughts) is rendered
    with the message replaced, and the difference is the message. The special token that ends a turn is included.

    Args:
        tools: definitions of tools, for templates that show them.
        keep_thoughts: templates of reasoning models leave out the thoughts of earlier answers, or of all. This writes
            every message's thoughts as `<think>…</think>` before its answer whatever the template does.

    Raises:
        RecordError: no messages, content that is no text, or a message or tool call that the template does not show.
        ValueError: a tokenizer without offsets.
    """
    turns = [plain_message(message) for message in messages]
    template = template_text(tokenizer)
    thoughtful = keep_thoughts and any(turn["role"] == "assistant" and _thoughts(turn) for turn in turns)
    if _GENERATION.search(template) and not thoughtful:
        encoded = tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(encoded["input_ids"]), [bool(one) for one in encoded["assistant_masks"]]
        shown = tokenizer.decode([token for token, marked in zip(ids, mask, strict=True) if marked])
        for turn in turns:
            _refuse_lost_calls(turn, shown)
        return ids, mask
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no offsets; a fast tokenizer is needed to find the completions"
        )

    def render(part: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        shown, said = _without_thoughts(part) if keep_thoughts else (list(part), {})
        text = tokenizer.apply_chat_template(shown, tools=tools, tokenize=False, add_generation_prompt=prompt)
        for mark, content in said.items():
            found = re.search(rf"(?:<think>\s*</think>\s*)?{mark}", text)
            if found is None:
                raise RecordError("the chat template leaves out an assistant's message, so its thoughts have no place")
            text = text[: found.start()] + content + text[found.end() :]
        return text

    text = render(turns)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    loss_mask = [False] * len(input_ids)
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        start, stop = _span(turns, number, text, render)
        _refuse_lost_calls(turn, text[start:stop])
        inside = [place for place, (begin, end) in enumerate(offsets) if begin < stop and end > start]
        for place in _said(inside, input_ids, text, offsets, tokenizer):
            loss_mask[place] = True
    return input_ids, loss_mask


def _thoughts(turn: dict[str, Any]) -> str:
    """What an assistant thought: `reasoning_content`, or what its content has before `</think>`."""
    content = turn["content"]
    if "</think>" in content:
        return content.partition("</think>")[0].rpartition("<think>")[2].strip()
    return str(turn.get("reasoning_content") or "").strip()


def _without_thoughts(turns: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Messages with a mark in place of every answer with thoughts, and what each mark stands for."""
    shown, said = [], {}
    for number, turn in enumerate(turns):
        thoughts = _thoughts(turn) if turn["role"] == "assistant" else ""
        if thoughts:
            mark = f"{_SENTINEL}{number}{_SENTINEL}"
            answer = turn["content"].rpartition("</think>")[2].lstrip()
            said[mark] = f"<think>\n{thoughts}\n</think>\n\n{answer}"
            turn = {name: value for name, value in turn.items() if name != "reasoning_content"} | {"content": mark}
        shown.append(turn)
    return shown, said


def plain_message(message: Any) -> dict[str, Any]:
    """A message as templates take it: content as one text, arguments of tool calls as objects.

    Raises:
        RecordError: no role, or content with parts that are no text.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RecordError(f"a message is {json.dumps(message, default=str)[:60]}; accepted: an object with a role")
    turn = {name: value for name, value in message.items() if value is not None}
    content = turn.get("content", "")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            kinds = sorted({str(part.get("type")) for part in content if isinstance(part, dict)})
            raise RecordError(f"a message has content of the types {', '.join(kinds)}; accepted: text")
        content = "".join(str(part) for part in parts)
    elif not isinstance(content, str):
        raise RecordError(f"a message has a {type(content).__name__} as content; accepted: text")
    turn["content"] = content
    if turn.get("tool_calls"):
        if not isinstance(turn["tool_calls"], list):
            raise RecordError(f"a message has a {type(turn['tool_calls']).__name__} as tool_calls; accepted: a list")
        turn["tool_calls"] = [_plain_call(call) for call in turn["tool_calls"]]
    return turn


def _plain_call(call: Any) -> Any:
    """OpenAI's tool calls have their arguments as a text of JSON, which templates would quote once more."""
    if not isinstance(call, dict):
        raise RecordError(f"a tool call is a {type(call).__name__}; accepted: an object")
    inner = call.get("function", call)
    if isinstance(inner, dict) and isinstance(inner.get("arguments"), str):
        try:
            inner = inner | {"arguments": json.loads(inner["arguments"])}
        except json.JSONDecodeError:
            return call  # a model may say arguments that are not JSON
    return call | {"function": inner} if "function" in call else inner


def _refuse_lost_calls(turn: dict[str, Any], shown: str) -> None:
    """Raises RecordError for a tool call of an assistant whose function is not named in what its template shows."""
    for call in turn.get("tool_calls") or () if turn["role"] == "assistant" else ():
        inner = call.get("function", call)
        name = inner.get("name") if isinstance(inner, dict) else None
        if isinstance(name, str) and name not in shown:
            raise RecordError("the chat template leaves out an assistant's tool calls; accepted: a template that shows "
                              "them (see chat_template)")  # fmt: skip


def template_text(tokenizer: Any) -> str:
    """The source of a tokenizer's chat template, or of all of them."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else "".join(template.values())


def _span(turns: Sequence[dict[str, Any]], number: int, text: str, render: Any) -> tuple[int, int]:
    """Character range of one assistant's message in the rendered conversation."""
    words = turns[number]["content"].rpartition("</think>")[2].split()
    before, after = render(turns[:number], prompt=True), render(turns[: number + 1])
    if after.startswith(before) and text.startswith(after):
        start, stop = len(before), len(after)
    else:
        replaced = {"role": "assistant", "content": _SENTINEL}
        try:
            other = render([*turns[:number], replaced, *turns[number + 1 :]])
        except Exception as error:  # templates raise errors of their own, for example for a lone result of a tool
            raise RecordError(f"the chat template refuses the conversation with message {number} replaced: {error}") \
                from error  # fmt: skip
        start = _common(text, other)
        stop = len(text) - _common(text[:start:-1], other[:start:-1])
        prompt = render(turns[:number], prompt=True)[len(render(turns[:number])) :]
        begins = text.rfind(prompt, 0, start) if prompt else -1
        start = begins + len(prompt) if begins >= 0 else start
    if words and words[-1] not in text[start:stop]:
        raise RecordError("the chat template does not repeat an assistant's message, so its tokens cannot be found")
    return start, stop


def _common(first: str, second: str) -> int:
    """Length of the longest common beginning."""
    length = min(len(first), len(second))
    return next((place for place in range(length) if first[place] != second[place]), length)


def _said(inside: list[int], input_ids: list[int], text: str, offsets: Any, tokenizer: Any) -> list[int]:
    """The tokens of a message that the model generates: to the special token that ends its turn.

    White space between that token and the next turn comes from the template.
    """

    def special(place: int) -> bool:
        return place < len(input_ids) and is_special(tokenizer, input_ids[place])

    said = list(inside)
    while said and not special(said[-1]) and not text[slice(*offsets[said[-1]])].strip():
        said.pop()
    if said and special(said[-1]):
        return said
    return [*inside, inside[-1] + 1] if inside and special(inside[-1] + 1) else inside
