"""Parsers of answers as they arrive: text, reasoning and tool calls.

A parser is pushed the pieces of one answer. The joined result does not depend on how the answer is cut into pieces:
text that may still become a call is held back. An answer that only looks like a call is text, unchanged.
"""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_SPACE = " \t\r\n"


@dataclass
class CallDelta:
    """A part of a tool call.

    Attributes:
        index: of the call in its answer.
        id, name: in the call's first part; else None.
        arguments: more of the arguments' JSON text.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class AnswerDelta:
    """More of an answer: its text, its reasoning, and its calls in order."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class AnswerParser(ABC):
    """Splits one answer; made for each.

    Args:
        max_calls: further calls are dropped; None: all are kept.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        self._max_calls = max_calls
        self._delta = AnswerDelta()
        self.num_calls = 0  # seen, also those dropped

    def push(self, text: str, tokens: Sequence[int] = ()) -> AnswerDelta:
        """The next piece of the answer's text, and the tokens that it is made of; returns what is certain by now."""
        self._read(text, tokens)
        return self._take()

    def finish(self) -> AnswerDelta:
        """The answer has ended: returns the rest."""
        self._end()
        return self._take()

    @abstractmethod
    def _read(self, text: str, tokens: Sequence[int]) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...

    def _take(self) -> AnswerDelta:
        found, self._delta = self._delta, AnswerDelta()
        return found

    def _begin_call(self, name: str) -> None:
        self.num_calls += 1
        if self._kept:
            self._delta.calls.append(CallDelta(self.num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name))

    def _add_arguments(self, text: str) -> None:
        """More of the arguments of the last call."""
        if not self._kept or not text:
            return
        if not self._delta.calls:
            self._delta.calls.append(CallDelta(self.num_calls - 1))
        self._delta.calls[-1].arguments += text

    @property
    def _kept(self) -> bool:
        return self._max_calls is None or self.num_calls <= self._max_calls


class TextParser(AnswerParser):
    """Everything is text."""

    def _read(self, text: str, tokens: Sequence[int]) -> None:
        self._delta.content += text

    def _end(self) -> None:
        pass


class CallReader:
    """Reads the JSON object of a call by character: `{"name": …, "arguments": {…}}`, or with `parameters`.

    Attributes:
        name: of the function; None: not known yet, or the object is no call.
        started, complete: the object has begun, and ended.
    """

    _HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{')

    def __init__(self) -> None:
        self.name: str | None = None
        self.started = self.complete = False
        self._characters: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = self._in_arguments = False

    @property
    def text(self) -> str:
        """Everything so far, as long as the name is not known."""
        return "".join(self._characters)

    def push(self, character: str) -> str:
        """The next character; returns what it adds to the arguments."""
        if self.name is None:
            self._characters.append(character)
        self._count(character)
        if self._in_arguments:
            self._in_arguments = self._depth > 1
            return character
        if self.name is None and self._depth == 2 and character == "{" and not self._in_string:
            head = self._HEAD.fullmatch(self.text)
            if head is not None and (name := _parsed(head[1])):
                self.name, self._in_arguments = name, True
                return character
        if self.complete and self.name is None:
            return self._read_whole()
        return ""

    def _count(self, character: str) -> None:
        """Follows strings and brackets."""
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped, self._in_string = character == "\\", character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
            self.started = True
        elif character in "}]":
            self._depth -= 1
            self.complete = self._depth <= 0

    def _read_whole(self) -> str:
        """Sets the name, and returns all arguments, of a complete object whose fields are in another order."""
        found = _parsed(self.text)
        if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
            return ""
        if not {"arguments", "parameters"} & set(found):
            return ""
        given = found.get("arguments", found.get("parameters"))
        arguments = _parsed(given) if isinstance(given, str) else {} if given is None else given
        if not isinstance(arguments, dict):
            return ""
        self.name = found["name"]
        return given if isinstance(given, str) else json.dumps(arguments, ensure_ascii=False)


def _parsed(text: str) -> Any:
    """The JSON value of a text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class _CharacterParser(AnswerParser):
    """A parser whose state changes by character: `_state` takes one, and returns those to be read again."""

    def __init__(self, max_calls: int | None = None) -> None:
        super().__init__(max_calls)
        self._held = ""  # read, and not decided yet
        self._call = CallReader()

    def _read(self, text: str, tokens: Sequence[int]) -> None:
        for character in text:
            again = self._step(character)
            while again:
                again = self._step(again[0]) + again[1:]

    @abstractmethod
    def _step(self, character: str) -> str:
        """Reads a character; returns characters that are to be read again in the state that follows."""

    def _read_call(self, character: str) -> None:
        known = self._call.name is not None
        more = self._call.push(character)
        if not known and self._call.name is not None:
            self._begin_call(self._call.name)
        self._add_arguments(more)


class HermesParser(_CharacterParser):
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`, also among text, of Hermes, Qwen and others.

    White space around calls is not part of the text.
    """

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, max_calls: int | None = None) -> None:
        super().__init__(max_calls)
        self._step_now = self._in_text

    def _step(self, character: str) -> str:
        return self._step_now(character)

    def _in_text(self, character: str) -> str:
        self._held += character
        bare = self._held.lstrip(_SPACE)
        if bare == self.OPEN:
            self._call, self._step_now = CallReader(), self._in_call
        elif not self.OPEN.startswith(bare):
            keep = len(self._held) - _tail(self._held, self.OPEN)
            self._delta.content += self._held[:keep]
            self._held = self._held[keep:]
        return ""

    def _in_call(self, character: str) -> str:
        if not self._call.started and character != "{" and character not in _SPACE:
            self._delta.content += self._held + self._call.text  # no object follows: it was text
            self._held, self._step_now = "", self._in_text
            return character
        self._read_call(character)
        if self._call.complete:
            if self._call.name is None:
                self._delta.content += self._held + self._call.text
                self._step_now = self._in_text
            else:
                self._step_now = self._after_call
            self._held = ""
        return ""

    def _after_call(self, character: str) -> str:
        self._held += character
        bare = self._held.lstrip(_SPACE)
        if bare == self.CLOSE:
            self._held, self._step_now = "", self._in_text
        elif not self.CLOSE.startswith(bare):  # the mark is missing
            again, self._held, self._step_now = self._held, "", self._in_text
            return again
        return ""

    def _end(self) -> None:
        if self._step_now == self._in_call and self._call.name is None:
            self._delta.content += self._held + self._call.text
        elif self._step_now == self._in_text and (self._held.strip(_SPACE) or not self.num_calls):
            self._delta.content += self._held


class LlamaParser(_CharacterParser):
    """`{"name": …, "parameters": …}` as the whole answer, of Llama 3; several are separated by `;` or white space."""

    MARK = "<|python_tag|>"  # usually a special token, which the text does not have

    def __init__(self, max_calls: int | None = None) -> None:
        super().__init__(max_calls)
        self._step_now = self._at_start

    def _step(self, character: str) -> str:
        return self._step_now(character)

    def _at_start(self, character: str) -> str:
        self._held += character
        bare = self._held.lstrip(_SPACE)
        if bare.removeprefix(self.MARK).lstrip(_SPACE) == "{":
            self._held = self._held[:-1]
            self._call, self._step_now = CallReader(), self._in_call
            return "{"
        if not self.MARK.startswith(bare) and bare.removeprefix(self.MARK).strip(_SPACE):
            return self._to_text()
        return ""

    def _in_call(self, character: str) -> str:
        self._read_call(character)
        if self._call.complete:
            if self._call.name is None:
                self._held += self._call.text
                return self._to_text()
            self._held, self._step_now = "", self._between
        return ""

    def _between(self, character: str) -> str:
        self._held += character
        bare = self._held.lstrip(_SPACE + ";")
        if bare == "{":
            self._held = self._held[:-1]
            self._call, self._step_now = CallReader(), self._in_call
            return "{"
        return self._to_text() if bare else ""

    def _to_text(self) -> str:
        self._delta.content += self._held
        self._held, self._step_now = "", self._in_text
        return ""

    def _in_text(self, character: str) -> str:
        self._delta.content += character
        return ""

    def _end(self) -> None:
        if self._step_now == self._in_call and self._call.name is None:
            self._delta.content += self._held + self._call.text
        elif self._step_now == self._at_start:
            self._delta.content += self._held


def _tail(text: str, mark: str) -> int:
    """Length of the end of `text` that may be white space before `mark`, with a beginning of it."""
    part = next((n for n in range(min(len(mark), len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    return len(text) - len(text[: len(text) - part].rstrip(_SPACE))


class ReasoningParser(AnswerParser):
    """Separates `<think>…</think>` at the beginning of an answer; `inner` reads the rest.

    White space around the two marks is dropped.

    Args:
        opened: the prompt has ended with `<think>`.
    """

    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self, inner: AnswerParser, opened: bool) -> None:
        super().__init__()
        self._inner = inner
        self._held = ""
        self._phase = "thinking" if opened else "start"
        self._begun = False  # some reasoning has been passed on

    def _read(self, text: str, tokens: Sequence[int]) -> None:
        self._held += text
        if self._phase == "start":
            bare = self._held.lstrip(_SPACE)
            if bare.startswith(self.OPEN):
                self._phase, self._held = "thinking", bare[len(self.OPEN) :]
            elif not self.OPEN.startswith(bare):
                self._phase = "rest"
        if self._phase == "thinking":
            if self._begun is False:
                self._held = self._held.lstrip(_SPACE)
            before, mark, after = self._held.partition(self.CLOSE)
            if mark:
                self._pass_on(before.rstrip(_SPACE))
                self._phase, self._held = "gap", after
            else:
                keep = len(self._held) - _tail(self._held, self.CLOSE)
                self._pass_on(self._held[:keep])
                self._held = self._held[keep:]
        if self._phase == "gap":
            self._held = self._held.lstrip(_SPACE)
            if self._held:
                self._phase = "rest"
        if self._phase == "rest":
            self._merge(self._inner.push(self._held, tokens))
            self._held = ""

    def _pass_on(self, text: str) -> None:
        self._begun = self._begun or bool(text)
        self._delta.reasoning += text

    def _merge(self, delta: AnswerDelta) -> None:
        self._delta.content += delta.content
        self._delta.calls += delta.calls
        self.num_calls = self._inner.num_calls

    def _end(self) -> None:
        if self._phase == "thinking":
            self._pass_on(self._held.rstrip(_SPACE))
        elif self._phase == "start":
            self._merge(self._inner.push(self._held))
        self._merge(self._inner.finish())


class TemplateParser(AnswerParser):
    """transformers' own parser, of a tokenizer with a `response_template`.

    Its template describes marks that are special tokens, so it is pushed the text with them. A call arrives as a whole.

    Args:
        tokenizer: of transformers.
        prompt: the rendered prompt, in which the answer may have begun.
        tools: as they were rendered: arguments are cast to their types.
        decoder: turns tokens into text with special tokens, piece by piece.
    """

    _REASONING = ("reasoning_content", "reasoning", "thinking")

    def __init__(
        self,
        tokenizer: Any,
        prompt: str,
        tools: Sequence[Mapping[str, Any]],
        decoder: Any,
        max_calls: int | None = None,
    ) -> None:
        super().__init__(max_calls)
        self._parser = tokenizer.get_response_parser(prefix=prompt, tools=list(tools))
        self._decoder = decoder
        self._region = ""  # read since the last text or complete call
        self._failed = False

    def _read(self, text: str, tokens: Sequence[int]) -> None:
        self._feed("".join(self._decoder.push(token).text for token in tokens))

    def _feed(self, text: str) -> None:
        for number, character in enumerate(text):  # one by one: what came before a mistake is kept
            if self._failed:
                self._delta.content += text[number:]
                return
            self._region += character
            self._guarded(lambda character=character: self._parser.feed(character))

    def _guarded(self, parse: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        """Takes the events of `parse`; text that the template does not describe, as a broken call, is content."""
        try:
            for event in parse():
                self._take_event(event)
        except (ValueError, KeyError, TypeError, AttributeError):
            self._failed = True
            self._delta.content += self._region

    def _take_event(self, event: Mapping[str, Any]) -> None:
        name = event["field"]
        # The mark that ends plain text opens something else, which may still turn out to be text.
        if (event["type"], name == "tool_calls") in (("region_chunk", False), ("region_close", True)):
            self._region = ""
        if name == "tool_calls":
            if event["type"] == "region_close":
                for call in event["value"] if isinstance(event["value"], list) else [event["value"]]:
                    self._add_call(call)
        elif event["type"] == "region_chunk":
            if name == "content":
                self._delta.content += event["text"]
            elif name in self._REASONING:
                self._delta.reasoning += event["text"]

    def _add_call(self, call: Mapping[str, Any]) -> None:
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        self._begin_call(function["name"])
        self._add_arguments(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))

    def _end(self) -> None:
        self._feed(self._decoder.finish().text)
        if not self._failed:
            self._guarded(lambda: self._parser.finalize()[1])
