"""The server as OpenAI's own client sees it: whole answers, streams, several at a time, each equal to the engine's."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tenure.serving import Request, SamplingParams, StorePolicy
from tenure.serving.sampling.stop import StopChecker
from tenure.serving.server.prompts import PromptRenderer

SYSTEM = "You are the planner of a small team. You plan, and say who does what, in one sentence."
TEXT = "When the rivers rise"


def chat(question: str = "Who is next?") -> list[Any]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


@pytest.fixture
def client(served) -> OpenAI:
    return OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def alone(make_engine, tokenizer):
    """The text and tokens that an engine gives for a prompt's token ids, without a server."""

    def answer(ids: list[int], tokens: int, sampling: SamplingParams | None = None) -> tuple[str, list[int]]:
        engine = make_engine()
        request = Request("alone", ids, tokens, sampling=sampling or SamplingParams(), store_policy=StorePolicy.DISCARD)
        engine.submit(request)
        (output,) = engine.run()
        checker = StopChecker(
            lambda some: tokenizer.decode(some, skip_special_tokens=True), request.sampling.stop, context=ids[-4:]
        )
        text = "".join(checker.push(token).text for token in output.tokens[: output.num_output_tokens])
        return text + checker.finish().text, output.tokens

    return answer


def chat_ids(tokenizer, question: str = "Who is next?") -> list[int]:
    text = tokenizer.apply_chat_template(chat(question), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_chat_is_answered_as_by_the_engine_alone(client, alone, tokenizer):
    found = client.chat.completions.create(model="tiny", messages=chat(), max_tokens=12, temperature=0)
    text, tokens = alone(chat_ids(tokenizer), 12)
    (choice,) = found.choices
    assert choice.message.content == text and choice.message.role == "assistant"
    assert choice.finish_reason == ("length" if len(tokens) == 12 else "stop")
    assert found.model == "tiny" and found.id.startswith("chatcmpl-") and found.object == "chat.completion"
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(chat_ids(tokenizer))
    assert found.usage.completion_tokens == len(tokens)
    assert found.usage.total_tokens == len(chat_ids(tokenizer)) + len(tokens)


def test_the_second_call_reports_cached_tokens(client, tokenizer):
    details = []
    for question in ("Who is next?", "And then?"):
        found = client.chat.completions.create(model="tiny", messages=chat(question), max_tokens=2)
        assert found.usage is not None and found.usage.prompt_tokens_details is not None
        details.append(found.usage.prompt_tokens_details.cached_tokens)
    system = len(tokenizer(SYSTEM)["input_ids"])
    assert details[0] == 0 and details[1] is not None and details[1] >= system - system % 16


def test_a_stream_has_the_same_text_and_ends_with_its_usage(client, alone, tokenizer):
    stream = client.chat.completions.create(
        model="tiny", messages=chat(), max_completion_tokens=20, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    expected, tokens = alone(chat_ids(tokenizer), 20)
    assert text == expected
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == ("length" if len(tokens) == 20 else "stop") and not any(reasons[:-1])
    assert not chunks[-1].choices and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_completion_continues_a_text_and_token_ids(client, alone, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    text, _ = alone(ids, 8)
    for prompt in (TEXT, ids):
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
        assert found.choices[0].text == text and found.object == "text_completion"
    several = client.completions.create(model="tiny", prompt=[TEXT, "Once"], max_tokens=8, temperature=0)
    assert [choice.text for choice in several.choices] == [text, alone(tokenizer("Once")["input_ids"], 8)[0]]
    streamed = client.completions.create(model="tiny", prompt=TEXT, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text


def test_a_completion_has_sixteen_tokens_unless_it_says_otherwise(client):
    found = client.completions.create(model="tiny", prompt=TEXT, temperature=0, extra_body={"ignore_eos": True})
    assert found.usage is not None and found.usage.completion_tokens == 16


def test_n_answers_have_a_seed_each_and_can_be_repeated(client):
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": chat(),
        "max_tokens": 8,
        "n": 3,
        "seed": 7,
        "temperature": 1.5,
    }
    first = [choice.message.content for choice in client.chat.completions.create(**options).choices]
    assert len(set(first)) > 1
    found = client.chat.completions.create(**options)
    assert [choice.message.content for choice in found.choices] == first
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == first


def test_a_prompt_counts_once_for_its_n_answers(client, tokenizer):
    found = client.chat.completions.create(model="tiny", messages=chat(), max_tokens=2, n=3)
    assert found.usage is not None and found.usage.prompt_tokens == len(chat_ids(tokenizer))


def test_a_stop_text_ends_the_answer(client, alone, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    whole, _ = alone(ids, 24)
    stop = whole[9:11]
    found = client.completions.create(model="tiny", prompt=TEXT, max_tokens=24, temperature=0, stop=[stop])
    assert found.choices[0].text == whole[: whole.index(stop)] and found.choices[0].finish_reason == "stop"


def test_logprobs_of_a_chat(client, tokenizer):
    found = client.chat.completions.create(
        model="tiny", messages=chat(), max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    assert found.choices[0].logprobs is not None and found.usage is not None
    rows = found.choices[0].logprobs.content
    assert rows is not None and len(rows) == found.usage.completion_tokens
    for row in rows:
        assert row.logprob <= 0 and len(row.top_logprobs) == 3 and row.top_logprobs[0].logprob == row.logprob
        assert row.bytes is None or bytes(row.bytes).decode() == row.token
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=chat(), max_tokens=4, temperature=0, logprobs=True, stream=True
        )
    )
    streamed = [row.logprob for chunk in chunks if (part := chunk.choices[0].logprobs) for row in part.content or []]
    assert streamed == pytest.approx([row.logprob for row in rows], abs=1e-5)  # the prompt is cached now


def test_logprobs_of_a_completion(client):
    found = client.completions.create(model="tiny", prompt=TEXT, max_tokens=4, temperature=0, logprobs=2)
    rows = found.choices[0].logprobs
    assert rows is not None and rows.tokens is not None and rows.token_logprobs is not None
    assert found.usage is not None
    assert len(rows.tokens) == len(rows.token_logprobs) == len(rows.text_offset or []) == found.usage.completion_tokens
    assert rows.top_logprobs is not None
    assert all(max(top.values()) == one for top, one in zip(rows.top_logprobs, rows.token_logprobs, strict=True))


def test_a_bias_and_penalties_reach_the_sampler(client, alone, tokenizer):
    token = tokenizer("z")["input_ids"][0]
    found = client.completions.create(
        model="tiny", prompt=TEXT, max_tokens=5, temperature=0, logit_bias={str(token): 100}
    )
    assert found.choices[0].text == "zzzzz"
    ids = tokenizer(TEXT)["input_ids"]
    penalties: dict[str, Any] = {"presence_penalty": 2.0, "frequency_penalty": 1.5}
    found = client.completions.create(model="tiny", prompt=TEXT, max_tokens=24, temperature=0, **penalties)
    assert found.choices[0].text == alone(ids, 24, SamplingParams(**penalties))[0]
    assert found.choices[0].text != alone(ids, 24)[0]


def test_concurrent_clients_get_the_answers_of_the_engine_alone(served, client, alone, tokenizer):
    questions = [f"Question {number} about {'x' * number}?" for number in range(8)]

    def ask(question: str) -> str | None:
        found = client.chat.completions.create(model="tiny", messages=chat(question), max_tokens=10, temperature=0)
        return found.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, questions))
    assert answers == [alone(chat_ids(tokenizer, question), 10)[0] for question in questions]


def test_asynchronous_streams_run_together(served, alone, tokenizer):
    questions = [f"Question {number}?" for number in range(4)]

    async def ask(client: AsyncOpenAI, question: str) -> str:
        stream = await client.chat.completions.create(
            model="tiny", messages=chat(question), max_tokens=10, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, question) for question in questions))

    answers = asyncio.run(all_of_them())
    assert answers == [alone(chat_ids(tokenizer, question), 10)[0] for question in questions]


def test_answers_stay_right_while_others_are_cancelled(served, client, alone, tokenizer):
    questions = [f"Question {number}?" for number in range(12)]

    def ask(number: int) -> str | None:
        stream = client.chat.completions.create(
            model="tiny", messages=chat(questions[number]), max_tokens=300 if number % 2 else 10, temperature=0,
            stream=True, extra_body={"ignore_eos": True},
        )  # fmt: skip
        text = ""
        with stream:
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if number % 2 and len(text) > number:
                    return None  # leaves the stream
        return text

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(12)))
    served.until(lambda: served.unfinished() == 0)
    sampling = SamplingParams(ignore_eos=True)
    for number in range(0, 12, 2):
        assert answers[number] == alone(chat_ids(tokenizer, questions[number]), 10, sampling)[0]
    finished = {reason.name: count for reason, count in served.system.scheduler.metrics.finished.items() if count}
    assert finished == {"ANSWERED": 6, "CANCELLED": 6}


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="got 'gpt-4' as model; accepted: tiny"):
        client.models.retrieve("gpt-4")


def test_errors_have_their_types_in_the_client(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=chat())
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=chat(), max_tokens=3000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as streamed:
        client.chat.completions.create(model="tiny", messages=chat(), max_tokens=3000, stream=True)
    assert streamed.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="functions is not supported by this server") as functions:
        client.chat.completions.create(model="tiny", messages=chat(), functions=[{"name": "search"}])
    assert functions.value.param == "functions" and functions.value.code == "unsupported_parameter"


def test_the_fixed_prompt_is_what_the_system_messages_give(tokenizer):
    from tenure.serving.server.api_requests import ChatMessage

    renderer = PromptRenderer(tokenizer, 16)
    turns = [ChatMessage("developer", SYSTEM), ChatMessage("user", "Who is next?")]
    first, second = renderer.chat(turns), renderer.chat([turns[0], ChatMessage("user", "And then?")])
    assert first.ids == chat_ids(tokenizer)
    assert first.agent == second.agent and first.fixed_tokens == second.fixed_tokens
    alone = tokenizer.apply_chat_template([{"role": "system", "content": SYSTEM}], tokenize=False)
    assert first.ids[: first.fixed_tokens] == tokenizer(alone)["input_ids"]
    other = renderer.chat([ChatMessage("system", SYSTEM + "!"), turns[1]])
    assert other.agent != first.agent
    assert renderer.chat(turns[1:]).fixed_tokens == 0 and renderer.chat(turns[1:]).agent is None


def test_a_template_that_wants_a_user_still_gives_the_fixed_prompt(tokenizer):
    from tenure.serving.server.api_requests import ChatMessage

    users = "messages|selectattr('role', 'equalto', 'user')|list"
    strict = f"{{% if not {users} %}}{{{{ raise_exception('no user') }}}}{{% endif %}}"
    turns = [ChatMessage("system", SYSTEM), ChatMessage("user", "Who is next?")]
    plain = PromptRenderer(tokenizer, 16).chat(turns)
    tokenizer.chat_template = strict + tokenizer.chat_template
    found = PromptRenderer(tokenizer, 16).chat(turns)
    header = tokenizer("<|im_start|>user\n")["input_ids"]
    assert found.ids == plain.ids and found.fixed_tokens == plain.fixed_tokens + len(header)
