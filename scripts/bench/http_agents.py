"""The agents of `tenure bench agents` as clients of a server: chats with system messages, streamed one by one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from .agent_runs import AgentWorkload
    from .server_process import ServerProcess

PATIENCE_S = 600.0  # for an answer, on a machine that others use, too


@dataclass(frozen=True)
class ChatCall:
    """A chat: the calling agent, and the user's message after its system message."""

    agent: str
    text: str


@dataclass(frozen=True)
class ChatWorkload:
    """An `AgentWorkload` in texts.

    Attributes:
        workflow: the document that declares it.
        systems: each agent's system message.
        calls: of one run; each is sent when the one before is answered.
        answer_tokens: of every answer; its end token is ignored, so that all sides compute the same.
    """

    name: str
    workflow: Mapping[str, Any]
    systems: Mapping[str, str]
    calls: Sequence[ChatCall]
    answer_tokens: int

    def prompt_tokens(self, tokenizer: Any) -> dict[str, int]:
        """Tokens of each agent's system message as the model's template renders it."""
        return {agent: len(tokenizer.apply_chat_template(_turns(text), tokenize=True, return_dict=False))
                for agent, text in self.systems.items()}  # fmt: skip


def as_chats(workload: AgentWorkload, tokenizer: Any) -> ChatWorkload:
    """The prompts of a workload as texts; their tokens may be a few more or fewer than there."""
    edges = [{"from": e.source, "to": e.target, "probability": e.probability} for e in workload.spec.edges]
    return ChatWorkload(
        workload.name,
        {"workflow": workload.name, "agents": list(workload.fixed), "edges": edges},
        {agent: tokenizer.decode(ids) for agent, ids in workload.fixed.items()},
        [ChatCall(call.agent, tokenizer.decode(call.suffix)) for call in workload.calls],
        workload.answer_tokens,
    )


@dataclass(frozen=True)
class HttpRun:
    """Times and answers of the calls of a run, in their order.

    Attributes:
        makespan_s: from the first call to the end of the last answer.
        first_token_s: from sending a call to its first text.
        cached_tokens: as the server reports them; None where it does not.
        waited_tokens: of all prompts together, those that were not on the device when their call came, and were loaded
            or computed for it; None where the server does not count them.
    """

    makespan_s: float
    first_token_s: list[float]
    cached_tokens: list[int | None]
    answers: list[str]
    waited_tokens: int | None = None


@dataclass(frozen=True)
class ChatAnswer:
    """The answer to a call: seconds to its first text, tokens as the server reports them, and the text."""

    first_s: float
    prompt_tokens: int
    cached_tokens: int | None
    text: str


class AgentServer:
    """A server as agents see it.

    Args:
        url: with the version.
        model: by which it is asked.
        process: of a `tenure serve` that was started here.
    """

    def __init__(self, url: str, model: str, process: ServerProcess | None = None) -> None:
        self.url, self.model, self.process = url, model, process
        self._http = httpx.Client(timeout=PATIENCE_S, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def cpu_seconds(self) -> float:
        """Of its process so far."""
        assert self.process is not None, "it was started here"
        return self.process.cpu_seconds()

    def declare(self, workload: ChatWorkload) -> None:
        """Declares the workflow.

        Raises:
            httpx.HTTPStatusError: the server knows no workflows, or refuses this one.
        """
        self._http.post(f"{self.url}/workflows", json=dict(workload.workflow)).raise_for_status()

    def warm_up(self, workload: ChatWorkload) -> None:
        """A call of each agent, so that its prompt is stored; the text is none of the workload's."""
        for agent in workload.systems:
            self._call(workload, ChatCall(agent, f"Are you ready, {agent}?"))

    def loaded_tokens(self) -> int:
        """Cached tokens so far that requests waited for while they were loaded to the device."""
        assert self.process is not None, "it was started here"
        response = self._http.get(f"{self.process.root}/metrics")
        response.raise_for_status()
        lines = response.text.splitlines()
        return next(int(float(line.split()[1])) for line in lines if line.startswith("tenure_loaded_tokens_total "))

    def run(self, workload: ChatWorkload) -> HttpRun:
        """All calls of the workload."""
        loaded = 0 if self.process is None else self.loaded_tokens()
        begun = time.perf_counter()
        answers = [self._call(workload, call) for call in workload.calls]
        makespan_s, waited = time.perf_counter() - begun, None
        if self.process is not None:
            computed = sum(answer.prompt_tokens - (answer.cached_tokens or 0) for answer in answers)
            waited = computed + self.loaded_tokens() - loaded
        return HttpRun(
            makespan_s, [answer.first_s for answer in answers], [answer.cached_tokens for answer in answers],
            [answer.text for answer in answers], waited,
        )  # fmt: skip

    def _call(self, workload: ChatWorkload, call: ChatCall) -> ChatAnswer:
        turns = [*_turns(workload.systems[call.agent]), {"role": "user", "content": call.text}]
        body = {
            "model": self.model, "messages": turns, "max_tokens": workload.answer_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        headers = {"X-Tenure-Agent": call.agent, "X-Tenure-Workflow": str(workload.workflow["workflow"])}
        begun, first_s, text, usage = time.perf_counter(), None, "", None
        url = f"{self.url}/chat/completions"
        with self._http.stream("POST", url, json=body, headers=headers) as response:
            if response.status_code != 200:
                raise RuntimeError(f"got status {response.status_code}: {response.read()[:300]!r}")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    raise RuntimeError(f"got the error {event['error']}")
                part = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                if part and first_s is None:
                    first_s = time.perf_counter() - begun
                text, usage = text + part, event.get("usage") or usage
        end_s = time.perf_counter() - begun
        found = usage or {}
        details = found.get("prompt_tokens_details") or {}
        return ChatAnswer(first_s or end_s, found.get("prompt_tokens", 0), details.get("cached_tokens"), text)


def _turns(system: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}]


async def stream_together(url: str, model: str, prompts: Sequence[Sequence[int]], tokens: int) -> int:
    """Streams an answer of exactly so many tokens to each prompt, all at once; returns the tokens of all answers."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=PATIENCE_S, limits=limits, trust_env=False) as http:

        async def one(prompt: Sequence[int]) -> int:
            body = {
                "model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            usage: dict[str, Any] = {}
            async with http.stream("POST", f"{url}/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        usage = json.loads(line[len("data: ") :]).get("usage") or usage
            return usage["completion_tokens"]

        return sum(await asyncio.gather(*(one(prompt) for prompt in prompts)))
