"""Clients of a server under load: each does one thing after the other, and checks what it is answered."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from .expected_answers import AGENTS, Catalog, ExpectedCall

PATIENCE_S = 120.0  # for any answer; one that takes longer counts as lost
SLOW_READ_S = 0.2  # the longest pause of a slow reader between two events
MAX_VIOLATIONS = 20  # after which a load stops
RING = {
    "workflow": "report",
    "agents": list(AGENTS),
    "edges": [[a, b] for a, b in zip(AGENTS, AGENTS[1:] + AGENTS[:1], strict=True)],
}
HINTS: tuple[dict[str, Any], ...] = (
    {"agent_hints": {"reuse_hint": "keep", "cache_ttl_ms": 2000, "children_step_ids": ["reader", "coder"]}},
    {"agent_hints": {"reuse_hint": "discard", "expected_tool_duration_ms": 1500}},
    {"nvext": {"agent_hints": {"priority": 7, "speculative_prefill": True}}},
    {"agent_hint": {"cache_control": {"type": "ephemeral", "ttl": 5}}},
    {"kv_hints": {"message_id": "m1", "agent_id": "critic", "actions": [{"action_type": "kv.fetch"}]}},
    {"kv_hints": {"message_id": "m2", "agent_id": "tester", "actions": [{"action_type": "kv.evict"}]}},
    {"kvflow": {"agent_data": {"writer": 3, "critic": 1, "planner": 0}, "timestep_cnt": 4}},
)
# Path, body, and the status of the answer.
BAD_BODIES: tuple[tuple[str, bytes, int], ...] = (
    ("/v1/chat/completions", b"{", 400),
    ("/v1/chat/completions", b"\xff\xfe", 400),
    ("/v1/chat/completions", b"[" * 100 + b"]" * 100, 400),
    ("/v1/chat/completions", b'{"model": "tiny", "messages": []}', 400),
    ("/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    ("/v1/chat/completions", b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', 404),
    ("/v1/completions", b'{"model": "tiny", "prompt": "x", "temperature": -1}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": [1, 2, 1000000]}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": "x", "n": 1000}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": "x", "max_tokens": 1000000}', 400),
    ("/v1/workflows", b'{"workflow": "x", "agents": ["a"], "edges": [["a", "nobody"]]}', 400),
    ("/v1/nothing", b"{}", 404),
)


class Violation(Exception):
    """Something that a client must never see."""


@dataclass
class LoadCounts:
    """Counts and times of all clients together.

    Attributes:
        done: by kind. excused: ended by a kill, a restart or a flush.
        seconds: of whole answers and complete streams, by kind. first_token_s: of streams.
        cached_tokens: of the answers.
        violations: in words.
    """

    done: Counter[str] = field(default_factory=Counter)
    excused: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    first_token_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    violations: list[str] = field(default_factory=list)


class HttpLoad:
    """Clients against one server.

    The server may be taken down between `interrupt` and `resume`; requests that were in progress then, and those during
    a flush, may end with an error. Any other error, a wrong answer, and an answer that does not come are violations.

    Args:
        root: of the server, without the version.
        keys: of API clients, which the load's clients share; admin_key: of an operator.
        seed: of all that clients choose.
    """

    def __init__(self, root: str, catalog: Catalog, keys: Sequence[str], admin_key: str, seed: int) -> None:
        self.root, self.catalog, self.keys, self.admin_key, self.seed = root, catalog, keys, admin_key, seed
        self.counts = LoadCounts()
        self._stop_s = 0.0
        self._disturbances = 0
        self._up = asyncio.Event()
        self._up.set()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=root, timeout=PATIENCE_S, limits=limits, trust_env=False)

    # The server's life --------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """The server is about to be killed: clients begin nothing more."""
        self._up.clear()
        self._disturbances += 1

    def resume(self) -> None:
        """It is up again."""
        self._disturbances += 1
        self._up.set()

    async def run(self, num_clients: int, seconds: float) -> None:
        """All clients for so long; each completes what it has begun."""
        self._stop_s = time.monotonic() + seconds
        await asyncio.gather(*(self._client(number) for number in range(num_clients)))

    async def close(self) -> None:
        await self._http.aclose()

    async def metrics(self) -> dict[str, float]:
        """The server's counters by their names with labels."""
        response = await self._http.get("/metrics", headers=_bearer(self.admin_key))
        response.raise_for_status()
        rows = (line.rsplit(" ", 1) for line in response.text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    async def declare_workflow(self) -> None:
        """The ring of all agents, for each API client."""
        for key in self.keys:
            response = await self._http.post("/v1/workflows", json=RING, headers=_bearer(key))
            self._require(response.status_code == 201, f"a workflow got {response.status_code}: {response.text[:200]}")

    async def check_stored(self) -> int:
        """Asks as every agent of every API client; returns the tokens that were found in the cache."""
        before = self.counts.cached_tokens
        for key in self.keys:
            for call in self.catalog.first_calls():
                await self._whole(call, _bearer(key))
        return self.counts.cached_tokens - before

    # A client -----------------------------------------------------------------------------------------------------

    async def _client(self, number: int) -> None:
        random = Random(f"{self.seed}/{number}")
        key = self.keys[number % len(self.keys)]
        kinds = {name: weight for name, (_, weight) in ACTIONS.items()}
        while time.monotonic() < self._stop_s and len(self.counts.violations) < MAX_VIOLATIONS:
            await self._up.wait()
            kind = random.choices([*kinds], [*kinds.values()])[0]
            known, begun = self._disturbances, time.monotonic()
            try:
                await asyncio.wait_for(ACTIONS[kind][0](self, random, key), PATIENCE_S)
            except (httpx.TransportError, OSError, Violation, asyncio.TimeoutError) as error:
                if known != self._disturbances:
                    self.counts.excused += 1
                    continue
                self.counts.violations.append(f"{kind} by client {number}: {type(error).__name__}: {error}")
            else:
                self.counts.done[kind] += 1
                self.counts.seconds[kind].append(time.monotonic() - begun)

    def _headers(self, random: Random, key: str, call: ExpectedCall) -> dict[str, str]:
        headers = _bearer(key)
        if call.agent is not None:
            headers["X-Tenure-Agent"] = call.agent
            if random.random() < 0.8:
                headers["X-Tenure-Workflow"] = str(RING["workflow"])
        return headers

    async def whole_answer(self, random: Random, key: str) -> None:
        call = random.choice(self.catalog.calls)
        hints = random.choice(HINTS) if random.random() < 0.2 else {}
        await self._whole(call, self._headers(random, key, call), hints)

    async def stream(self, random: Random, key: str) -> None:
        call = random.choice(self.catalog.calls)
        await self._stream(call, self._headers(random, key, call))

    async def slow_reader(self, random: Random, key: str) -> None:
        call = random.choice(self.catalog.calls)
        await self._stream(call, self._headers(random, key, call), lambda: random.random() * SLOW_READ_S)

    async def cancelled_stream(self, random: Random, key: str) -> None:
        """Leaves after some events; what has come until then begins the right answer."""
        call, left = random.choice(self.catalog.calls), random.randrange(6)
        texts = [""] * len(call.texts)
        async with aclosing(self._events(call, self._headers(random, key, call))) as events:
            async for event in events:
                for choice in event.get("choices", ()):
                    texts[choice["index"]] += _text_of(choice)
                left -= 1
                if left < 0:
                    break
        for text, wanted in zip(texts, call.texts, strict=True):
            self._require(wanted.startswith(text), f"a stream began with {text!r} instead of {wanted!r}: {call.body}")

    async def gone_client(self, random: Random, key: str) -> None:
        """Sends a request, or a part of one, and disconnects."""
        body = json.dumps({**random.choice(self.catalog.calls).body, "stream": random.random() < 0.5}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        sent = (head + f"Content-Length: {len(body)}\r\n\r\n").encode() + body
        if random.random() < 0.5:
            sent = sent[: random.randrange(1, len(sent))]
        url = httpx.URL(self.root)
        _, writer = await asyncio.open_connection(url.host, url.port)
        try:
            writer.write(sent)
            await writer.drain()
            await asyncio.sleep(random.choice((0.0, 0.01, 0.1)))
        finally:
            writer.close()

    async def bad_body(self, random: Random, key: str) -> None:
        path, body, status = random.choice(BAD_BODIES)
        headers = _bearer(key)
        if random.random() < 0.1:
            headers, status = _bearer("no such key, ever"), 401 if path != "/v1/nothing" else 404
        response = await self._http.post(path, content=body, headers=headers)
        self._require(response.status_code == status, f"{body[:80]!r} to {path} got {response.status_code}")
        self._require(set(response.json()["error"]) == {"message", "type", "param", "code"}, response.text[:200])

    async def conversation(self, random: Random, key: str) -> None:
        """Calls of a session that continue each other; then it is kept, ended or left alone."""
        session = f"session-{random.randrange(1000)}"
        for call in random.choice(self.catalog.conversations):
            headers = self._headers(random, key, call) | {"X-Tenure-Session": session}
            await (self._whole(call, headers) if random.random() < 0.5 else self._stream(call, headers))
        end = random.random()
        if end < 0.4:
            response = await self._http.delete(f"/v1/sessions/{session}", headers=_bearer(key))
            self._require(response.status_code == 200, response.text[:200])
        elif end < 0.7:
            keep = {"ttl_s": random.choice((0.1, 5))}
            response = await self._http.put(f"/v1/sessions/{session}", json=keep, headers=_bearer(key))
            self._require(response.status_code == 200, response.text[:200])

    async def workflow(self, random: Random, key: str) -> None:
        """Declares a workflow of its own and ends it; other calls go on in the one that all share."""
        name = f"own-{random.randrange(10**9)}"
        response = await self._http.post("/v1/workflows", json=RING | {"workflow": name}, headers=_bearer(key))
        self._require(response.status_code == 201, response.text[:200])
        call = random.choice(self.catalog.calls)
        await self._whole(call, self._headers(random, key, call) | {"X-Tenure-Workflow": name})
        response = await self._http.delete(f"/v1/workflows/{name}", headers=_bearer(key))
        self._require(response.status_code == 200, response.text[:200])

    async def looking(self, random: Random, key: str) -> None:
        """Health, models and metrics, while others compute."""
        path = random.choice(("/health", "/v1/models", "/metrics"))
        response = await self._http.get(path, headers=_bearer(self.admin_key if path == "/metrics" else key))
        self._require(response.status_code == 200, f"{path} got {response.status_code}: {response.text[:200]}")

    async def flush(self, random: Random, key: str) -> None:
        self._disturbances += 1
        response = await self._http.post("/admin/flush", headers=_bearer(self.admin_key))
        self._disturbances += 1
        self._require(response.status_code == 200, response.text[:200])

    # Requests -----------------------------------------------------------------------------------------------------

    async def _whole(self, call: ExpectedCall, headers: dict[str, str], more: dict[str, Any] | None = None) -> None:
        response = await self._http.post(f"/v1{call.path}", json={**call.body, **(more or {})}, headers=headers)
        self._require(response.status_code == 200, f"got {response.status_code} {response.text[:300]}: {call.body}")
        document = response.json()
        choices = sorted(document["choices"], key=lambda choice: choice["index"])
        texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
        self._compare(call, texts, [choice["finish_reason"] for choice in choices], document["usage"])

    async def _stream(
        self, call: ExpectedCall, headers: dict[str, str], pause_s: Callable[[], float] | None = None
    ) -> None:
        begun, first_s, usage = time.monotonic(), None, None
        texts, reasons = [""] * len(call.texts), [""] * len(call.texts)
        async with aclosing(self._events(call, headers)) as events:
            async for event in events:
                for choice in event["choices"]:
                    first_s = first_s or time.monotonic() - begun
                    texts[choice["index"]] += _text_of(choice)
                    reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
                usage = event.get("usage") or usage
                if pause_s is not None:
                    await asyncio.sleep(pause_s())
        self._require(usage is not None, f"a stream ended without its usage: {call.body}")
        self._compare(call, texts, reasons, usage)
        self.counts.first_token_s.append(first_s or 0.0)

    async def _events(self, call: ExpectedCall, headers: dict[str, str]) -> AsyncGenerator[dict[str, Any], None]:
        """The documents of a stream; a violation if it ends otherwise than with [DONE]."""
        body = {**call.body, "stream": True, "stream_options": {"include_usage": True}}
        async with self._http.stream("POST", f"/v1{call.path}", json=body, headers=headers) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise Violation(f"got {response.status_code} {text[:300]}: {call.body}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    document = json.loads(line[len("data: ") :])
                    self._require("error" not in document, f"a stream failed: {document}: {call.body}")
                    yield document
        raise Violation(f"a stream ended without [DONE]: {call.body}")

    def _compare(self, call: ExpectedCall, texts: list[str], reasons: list[str], usage: Any) -> None:
        self._require(texts == [*call.texts], f"got {texts} instead of {[*call.texts]}: {call.body}")
        self._require(reasons == [*call.reasons], f"ended by {reasons} instead of {call.reasons}: {call.body}")
        counts = usage["prompt_tokens"], usage["completion_tokens"]
        self._require(counts == (call.prompt_tokens, sum(call.num_tokens)), f"got {usage}: {call.body}")
        self.counts.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise Violation(otherwise)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _text_of(choice: dict[str, Any]) -> str:
    return choice["delta"].get("content") or "" if "delta" in choice else choice["text"]


# By name: the action, and how often it is chosen.
ACTIONS: dict[str, tuple[Callable[[HttpLoad, Random, str], Awaitable[None]], float]] = {
    "whole answer": (HttpLoad.whole_answer, 25),
    "stream": (HttpLoad.stream, 25),
    "slow reader": (HttpLoad.slow_reader, 8),
    "cancelled stream": (HttpLoad.cancelled_stream, 10),
    "gone client": (HttpLoad.gone_client, 6),
    "bad body": (HttpLoad.bad_body, 8),
    "conversation": (HttpLoad.conversation, 6),
    "workflow": (HttpLoad.workflow, 2),
    "looking": (HttpLoad.looking, 3),
    "flush": (HttpLoad.flush, 0.05),
}
