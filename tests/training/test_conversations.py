"""The assistant's tokens: answers, thoughts and tool calls, in templates with and without a generation mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tenure.training.conversations import encode_messages
from tenure.training.records import RecordError

from .conftest import CHAT_TEMPLATE

# After Qwen3's: tools in the system turn, thoughts of the last answer only, tool calls as JSON between tags.
AGENT_TEMPLATE = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{%- set ns = namespace(last=0) %}{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{%- if m.role == 'assistant' %}<|im_start|>assistant
{% if loop.index0 > ns.last %}<think>
{{ m.reasoning_content or '' }}
</think>

{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501
CALL = {"type": "function", "function": {"name": "search", "arguments": '{"query": "work time"}'}}
AGENT = [
    {"role": "user", "content": "What is work?"},
    {"role": "assistant", "content": "Time.", "reasoning_content": "I know"},
    {"role": "user", "content": "Are you there? Time."},
    {"role": "assistant", "content": None, "reasoning_content": "I should search", "tool_calls": [CALL]},
    {"role": "tool", "content": "work is money"},
    {"role": "assistant", "content": "Money.", "reasoning_content": "found"},
]


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def said(
    messages: list[dict[str, Any]], tokenizer: Any, tools: list[Any] | None = None, keep_thoughts: bool = False
) -> str:
    ids, mask = encode_messages(messages, tokenizer, tools, keep_thoughts=keep_thoughts)
    return tokenizer.decode([token for token, target in zip(ids, mask, strict=True) if target])


def test_thoughts_and_tool_calls_are_said_by_the_assistant(chat_tokenizer: Any) -> None:
    """The first answer's thought is not in the rendered conversation, because another question follows."""
    agent = with_template(chat_tokenizer, AGENT_TEMPLATE)
    tools = [{"type": "function", "function": {"name": "search"}}]
    assert said(AGENT, agent, tools) == (
        "Time.<|im_end|>"
        '<think>\nI should search\n</think>\n\n<tool_call>search {"query": "work time"}</tool_call><|im_end|>'
        "<think>\nfound\n</think>\n\nMoney.<|im_end|>"
    )
    ids, _ = encode_messages(AGENT, agent, tools)
    assert '"name": "search"' in agent.decode(ids)


def test_tool_calls_that_a_template_leaves_out_are_refused(chat_tokenizer: Any) -> None:
    """Otherwise the model would learn to end its turn where it called a tool."""
    content = "{{ message['content'] }}"
    marked = CHAT_TEMPLATE.replace(content, f"{{% generation %}}{content}{{% endgeneration %}}")
    for template in (CHAT_TEMPLATE, marked):
        with pytest.raises(RecordError, match="leaves out an assistant's tool calls; accepted: a template that shows"):
            said(AGENT, with_template(chat_tokenizer, template))


def test_thoughts_that_templates_leave_out_are_kept_on_request(chat_tokenizer: Any) -> None:
    """Those of earlier answers (after Qwen3's template), and of all answers (after R1's)."""
    content = "message['content']"
    reasoning = CHAT_TEMPLATE.replace(content, f"{content}.split('</think>')[-1].lstrip()")
    inline = [
        {"role": "user", "content": "What is work?"},
        {"role": "assistant", "content": "<think>\nI know\n</think>\n\nTime."},
        {"role": "user", "content": "Are you there? Time."},
        {"role": "assistant", "content": "Money."},
    ]
    kept = "<think>\nI know\n</think>\n\nTime.<|im_end|>"
    for template, messages, plain, wanted in (
        (reasoning, inline, "Time.<|im_end|>Money.<|im_end|>", f"{kept}Money.<|im_end|>"),
        (AGENT_TEMPLATE, AGENT[:3], "Time.<|im_end|>", kept),
    ):
        tokenizer = with_template(chat_tokenizer, template)
        assert said(messages, tokenizer) == plain
        assert said(messages, tokenizer, keep_thoughts=True) == wanted
    agent = with_template(chat_tokenizer, AGENT_TEMPLATE)
    assert said(AGENT, agent, keep_thoughts=True) == said(AGENT, agent).replace("Time.<|im_end|>", kept)


def test_short_answers_are_not_found_in_other_turns(chat_tokenizer: Any) -> None:
    """The answers "a" and "" stand in every turn of the conversation as text."""
    messages = [
        {"role": "system", "content": "Be a kind assistant."},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": ""},
    ]
    assert said(messages, chat_tokenizer) == "a<|im_end|><|im_end|>"


def test_a_templates_own_generation_mask_is_used(chat_tokenizer: Any) -> None:
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "work a"}]
    assert said(messages, with_template(chat_tokenizer, marked)) == "work a"


def test_a_template_without_a_generation_prompt(chat_tokenizer: Any) -> None:
    """The header of the assistant's turn then counts as said, since nothing else tells where it ends."""
    bare = CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "work"}]
    assert said(messages, with_template(chat_tokenizer, bare)).endswith("work<|im_end|>")


def test_parts_of_text_are_joined_and_others_refused(chat_tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "work "}, {"type": "text", "text": "time"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    assert said(messages, chat_tokenizer) == "work time<|im_end|>"
    with pytest.raises(RecordError, match="content of the types image; accepted: text"):
        encode_messages([{"role": "user", "content": [{"type": "image"}]}], chat_tokenizer)
    with pytest.raises(RecordError, match="a message is 3; accepted: an object with a role"):
        encode_messages([3], chat_tokenizer)  # type: ignore[list-item]
