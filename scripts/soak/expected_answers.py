"""The calls of a load test, and the answers of the engine alone: one request at a time, nothing cached, no server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from .tiny_served import CONTEXT, TinyServed

NOISE = 1e-5  # relative, of every weight: about ten times the rounding of float32 that a batch's other rows change
DRAWS = 2  # of the noise
DEVICE_TOKENS = 4 * CONTEXT  # of the engine alone: more than one request ever needs
AGENTS = ("planner", "searcher", "reader", "coder", "tester", "checker", "writer", "critic")
WORDS = (
    "plan", "search", "read", "write", "the", "next", "step", "of", "a", "report", "code", "test", "and", "check",
    "every", "claim", "twice", "before", "answer", "42", "rivers?", "(a, b)", "{x: 1}", "#1", "ok.",
)  # fmt: skip


@dataclass(frozen=True)
class ExpectedCall:
    """A request, and its answer by the engine alone.

    Attributes:
        path: of the endpoint, behind the version.
        body: without `stream`.
        agent: in the header; None: not named.
        texts, reasons, num_tokens: by choice: the answer's text, why it ended, and its tokens.
        prompt_tokens: of the prompt.
    """

    path: str
    body: Mapping[str, Any]
    agent: str | None = None
    texts: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    num_tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Catalog:
    """All that clients of a load test send and should receive.

    Attributes:
        calls: chats and completions that stand alone.
        conversations: calls of which each continues the one before.
        undecided: requests left out, as rounding decides about their answers.
    """

    calls: list[ExpectedCall]
    conversations: list[list[ExpectedCall]]
    undecided: int

    def first_calls(self) -> list[ExpectedCall]:
        """A call of each agent."""
        found = {call.agent: call for call in reversed(self.calls) if call.agent is not None}
        return [found[agent] for agent in sorted(found)]


@dataclass
class EngineAlone:
    """Answers bodies with an engine that has nothing else to do.

    Attributes:
        engine: of the tiny model. render: prompts of a body. count: requests so far.
    """

    engine: Any
    render: Callable[[str, Mapping[str, Any]], Any]
    count: int = field(default=0)

    def answer(self, path: str, body: Mapping[str, Any], agent: str | None = None) -> ExpectedCall:
        from ...serving import Request

        parsed, prompt = self.render(path, body)
        sampling = parsed.sampling()
        texts, reasons, counts = [], [], []
        for choice in range(sampling.n):
            self.count += 1
            self.engine.submit(
                Request(
                    "alone", prompt.ids, parsed.answer_tokens, agent=prompt.agent, fixed_tokens=prompt.fixed_tokens,
                    sampling=sampling.for_choice(choice), namespace=f"call {self.count}",
                )
            )  # fmt: skip
            text, output = "", None
            while output is None:
                self.engine.step()
                for event in self.engine.take_events():
                    text, output = text + (event.text or ""), event.finished or output
            assert output.error is None, output.error
            texts.append(text)
            reasons.append("length" if output.finished_by is None else "stop")
            counts.append(output.num_output_tokens)
        return ExpectedCall(path, body, agent, tuple(texts), tuple(reasons), tuple(counts), len(prompt.ids))


@contextmanager
def engine_alone(served: TinyServed, keep: float, noise_seed: int | None = None) -> Iterator[EngineAlone]:
    """An engine of the served model in this process.

    Args:
        keep: share of a fixed prompt's entries, as the server's `--compress`.
        noise_seed: of the noise on the weights; None: without it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ...eviction import evict
    from ...retention import CheckpointInfo, RetentionGates
    from ...serving import LinearCosts, MemoryPool, ThreadedTransfer, Tier, build_system
    from ...serving.engine import Compression, Engine
    from ...serving.prompt_cache import PromptKV
    from ...serving.server.api_requests import ChatBody, CompletionBody, UnknownFields, read_body
    from ...serving.server.prompts import PromptRenderer
    from ...serving.server.server_config import ServerConfig

    tokenizer = AutoTokenizer.from_pretrained(served.model)
    model: Any = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32).eval()
    if noise_seed is not None:
        generator = torch.Generator().manual_seed(noise_seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + NOISE * torch.randn(weight.shape, generator=generator))
    gates = RetentionGates.from_pretrained(served.gates)
    gates.info = CheckpointInfo()  # which would refuse the noisy weights
    with evict(model, "full", gates=gates, observe=["retention"]) as session:
        rate = PromptKV(session).bytes_per_token()
        system = build_system(
            "lru", {Tier.DEVICE: MemoryPool(rate * DEVICE_TOKENS)}, ThreadedTransfer(),
            costs=LinearCosts(1e3, (1e9, 1e9)), bytes_per_token=rate, clock=time.monotonic,
        )  # fmt: skip
        renderer = PromptRenderer(tokenizer, system.tiers.page_size)

        def render(path: str, body: Mapping[str, Any]) -> Any:
            kind: Any = ChatBody if path == "/chat/completions" else CompletionBody
            parsed, _ = read_body(kind, dict(body), ServerConfig(), UnknownFields(0))
            if kind is ChatBody:
                return parsed, renderer.chat(parsed.messages)
            return parsed, renderer.completion(parsed.prompt, 1)[0]

        try:
            yield EngineAlone(Engine(session, system, Compression("retention", keep), tokenizer), render)
        finally:
            system.close()


def make_catalog(served: TinyServed, keep: float, size: int, max_tokens: int, seed: int, model: str) -> Catalog:
    """Draws `size` calls and a quarter as many conversations, and answers them.

    Args:
        max_tokens: of an answer.
        model: by which the server is asked.
    """
    random = Random(seed)
    bodies = [_draw(random, max_tokens, model) for _ in range(size)]
    with engine_alone(served, keep) as alone:
        calls = [alone.answer(*body) for body in bodies]
        conversations = [_converse(alone, random, max_tokens, model) for _ in range(max(1, size // 4))]
    everything = [*([call] for call in calls), *conversations]
    decided = [True] * len(everything)
    for draw in range(DRAWS):
        with engine_alone(served, keep, draw) as noisy:
            for i, several in enumerate(everything):
                decided[i] = decided[i] and all(noisy.answer(c.path, c.body, c.agent) == c for c in several)
    return Catalog(
        [call for i, call in enumerate(calls) if decided[i]],
        [several for i, several in enumerate(conversations) if decided[size + i]],
        decided.count(False),
    )


def _draw(random: Random, max_tokens: int, model: str) -> tuple[str, dict[str, Any], str | None]:
    """Path, body and agent of a call."""
    body: dict[str, Any] = {"model": model, "max_tokens": random.randint(1, max_tokens), "temperature": 0}
    if random.random() < 0.5:
        body |= {"temperature": random.choice((0.7, 1.0, 1.3)), "seed": random.randrange(1000)}
        body |= random.choice(({}, {"top_p": 0.9}, {"top_k": 20}, {"n": random.randint(2, 3)}))
    options = ({"ignore_eos": True}, {"stop": ["e", "?x"]}, {"presence_penalty": 0.5}, {"logit_bias": {"20": 2.0}})
    body |= random.choice(({}, {}, *options))
    if random.random() < 0.2:
        return "/completions", body | {"prompt": sentence(random, 5, 30)}, None
    agent = random.choice(AGENTS)
    messages = [{"role": "system", "content": system_of(agent)}, {"role": "user", "content": sentence(random, 2, 20)}]
    if random.random() < 0.1:  # without a fixed prompt
        return "/chat/completions", body | {"messages": messages[1:]}, None
    return "/chat/completions", body | {"messages": messages}, agent if random.random() < 0.8 else None


def _converse(alone: EngineAlone, random: Random, max_tokens: int, model: str) -> list[ExpectedCall]:
    agent, calls = random.choice(AGENTS), []
    messages: list[dict[str, str]] = [{"role": "system", "content": system_of(agent)}]
    for _ in range(3):
        messages = [*messages, {"role": "user", "content": sentence(random, 2, 8)}]
        body = {"model": model, "messages": messages, "max_tokens": random.randint(2, max_tokens), "temperature": 0}
        calls.append(alone.answer("/chat/completions", body, agent))
        messages = [*messages, {"role": "assistant", "content": calls[-1].texts[0]}]
    return calls


def sentence(random: Random, least: int, most: int) -> str:
    """Words in any order."""
    return " ".join(random.choices(WORDS, k=random.randint(least, most)))


def system_of(agent: str) -> str:
    """An agent's system message; the first pages of all of them are alike."""
    return "You are one of several agents that write a report together. " + sentence(Random(agent), 20, 60)
