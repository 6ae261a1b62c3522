"""Tool calls and reasoning in answers: the result does not depend on the pieces, and no text is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.serving.sampling.stop import StopChecker
from tenure.serving.server.answer_parsers import (
    AnswerParser,
    HermesParser,
    LlamaParser,
    ReasoningParser,
    TemplateParser,
    TextParser,
)
from tenure.serving.server.answers import joined_calls

from .conftest import byte_tokenizer

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x}"}}\n</tool_call>'
FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool", "\n", " ", '{"name": "add", "arguments": {"a": [1, {"b": "}"}]}}',
    '{"name": "add", "parameters": {}}', '{"arguments": {"a": 1}, "name": "add"}', '{"name": "f", "arguments": "{}"}',
    '{"name": "f"}', '{"a": 1}', "{", "}", '"', "\\", "text", "é", ";", "<think>", "</think>", "</th", "[", "]",
    '{"type": "function", "name": "f", "parameters": {"x": "\\u00e9\\""}}', '{"name": "f", "arguments": null}',
    "<|python_tag|>", "<|py", '{"name": "f", "arguments": {"unclosed": "', '{"name": 3, "arguments": {}}',
]  # fmt: skip
answers = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
MAKERS: dict[str, Callable[[], AnswerParser]] = {
    "hermes": HermesParser,
    "hermes, one call": lambda: HermesParser(1),
    "llama": LlamaParser,
    "reasoning": lambda: ReasoningParser(HermesParser(), opened=False),
    "reasoning opened": lambda: ReasoningParser(TextParser(), opened=True),
}


def parsed(parser: AnswerParser, pieces: list[str]) -> tuple[str, str, list[tuple[str | None, str]]]:
    """Content, reasoning, and names and arguments of the calls."""
    parts = [*map(parser.push, pieces), parser.finish()]
    calls = joined_calls(parts)
    assert [one.index for one in calls] == list(range(len(calls))) and all(one.id for one in calls)
    first = [one for part in parts for one in part.calls if one.name is not None]
    assert [one.index for one in first] == [one.index for one in calls], "the name comes once, and first"
    return (
        "".join(part.content for part in parts), "".join(part.reasoning for part in parts),
        [(one.name, one.arguments) for one in calls],
    )  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
@given(answer=answers, data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_pieces_give_the_same_result(name: str, answer: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    edges = [0, *cuts, len(answer)]
    pieces = [answer[a:b] for a, b in pairwise(edges)]
    whole = parsed(MAKERS[name](), [answer])
    assert parsed(MAKERS[name](), pieces) == whole
    assert parsed(MAKERS[name](), list(answer)) == whole


@given(answer=st.text(alphabet='<tol_ca>/{}"n: ,\\ \n', max_size=40))
@settings(max_examples=200, deadline=None)
def test_text_without_a_call_is_unchanged(answer: str) -> None:
    for make in (HermesParser, LlamaParser):
        content, _, calls = parsed(make(), [answer])
        assert not calls and content == answer


@pytest.mark.parametrize(
    ("answer", "content", "calls"),
    [
        (CALL, "", [("add", '{"a": 1, "b": "x}"}')]),
        (f"Let me see.\n{CALL}\n{CALL}", "Let me see.", [("add", '{"a": 1, "b": "x}"}')] * 2),
        (f"{CALL} Done.", " Done.", [("add", '{"a": 1, "b": "x}"}')]),
        ('<tool_call>{"arguments": {"é": 1}, "name": "f"}</tool_call>', "", [("f", '{"é": 1}')]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g", "arguments": {}}', "",
         [("f", "{}"), ("g", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"a": "cut', "", [("f", '{"a": "cut')]),
        ('<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
        ('<tool_call>{"no": "call"}</tool_call>', '<tool_call>{"no": "call"}</tool_call>', []),
        ('<tool_call>{"name": "f", "arguments": [1]}', '<tool_call>{"name": "f", "arguments": [1]}', []),
        ("a <b> c <tool", "a <b> c <tool", []),
        ("  \n", "  \n", []),
    ],
)  # fmt: skip
def test_hermes(answer: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parsed(HermesParser(), [answer]) == (content, "", calls)


@pytest.mark.parametrize(
    ("answer", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('\n{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", [("f", "{}"), ("g", "{}")]),
        ('{"name": "f", "parameters": {}} and more', " and more", [("f", "{}")]),
        ('{"city": "Rome"}', '{"city": "Rome"}', []),
        ('The call is {"name": "f", "parameters": {}}', 'The call is {"name": "f", "parameters": {}}', []),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ('{"name": "f", "parame', '{"name": "f", "parame', []),
    ],
)
def test_llama(answer: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parsed(LlamaParser(), [answer]) == (content, "", calls)


def test_further_calls_are_dropped_where_one_is_allowed() -> None:
    assert parsed(HermesParser(1), [f"{CALL}\n{CALL} end"]) == (" end", "", [("add", '{"a": 1, "b": "x}"}')])


@pytest.mark.parametrize(
    ("answer", "opened", "content", "reasoning"),
    [
        ("<think>\nI see.\n</think>\n\nYes.", False, "Yes.", "I see."),
        ("\nI see.\n</think>\n\nYes.", True, "Yes.", "I see."),
        ("Yes.", False, "Yes.", ""),
        ("No <think>later</think>", False, "No <think>later</think>", ""),
        ("<think>\n\n</think>\n\nYes.", False, "Yes.", ""),
        ("<think>cut off </th", False, "", "cut off </th"),
        ("<thi", False, "<thi", ""),
    ],
)
def test_reasoning(answer: str, opened: bool, content: str, reasoning: str) -> None:
    assert parsed(ReasoningParser(TextParser(), opened), [answer]) == (content, reasoning, [])


def test_a_call_follows_reasoning() -> None:
    found = parsed(ReasoningParser(HermesParser(), False), [f"<think>hm</think>\n{CALL}"])
    assert found == ("", "hm", [("add", '{"a": 1, "b": "x}"}')])


RESPONSE_TEMPLATE: dict[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "content": {"close": "<|im_end|>", "content": "text", "content_args": {"strip": False}},
        "thinking": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}  # fmt: skip


def template_result(answer: str) -> tuple[str, str, list[tuple[str | None, str]]]:
    """Of a whole answer, which is also read in pieces of a token."""
    tokenizer = byte_tokenizer()
    tokenizer.response_template = RESPONSE_TEMPLATE
    ids = tokenizer(answer)["input_ids"]

    def result(pieces: list[list[int]]) -> Any:
        decoder = StopChecker(lambda some: tokenizer.decode(some, skip_special_tokens=False))  # pyright: ignore[reportArgumentType]
        parser = TemplateParser(tokenizer, "<|im_start|>assistant\n", [], decoder)
        parts = [*(parser.push("", piece) for piece in pieces), parser.finish()]
        return (
            "".join(part.content for part in parts), "".join(part.reasoning for part in parts),
            [(one.name, one.arguments) for one in joined_calls(parts)],
        )  # fmt: skip

    whole = result([ids])
    assert result([[one] for one in ids]) == whole
    return whole


def test_the_tokenizers_own_parser() -> None:
    content, reasoning, calls = template_result(f"<think>hm</think>See.{CALL}<|im_end|>")
    assert (content, reasoning) == ("See.", "hm")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("add", {"a": 1, "b": "x}"})]


def test_a_broken_call_is_text_for_the_tokenizers_own_parser() -> None:
    content, _, calls = template_result('So: <tool_call>{"name": "f", </tool_call> and on')
    assert content == 'So: <tool_call>{"name": "f", </tool_call> and on' and not calls
