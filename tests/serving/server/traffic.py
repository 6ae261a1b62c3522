"""Calls of three clients' agents to a tiny server, some of them in progress: something to look at."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from .conftest import Served

AGENTS = ("planner", "researcher", "writer", "editor", "critic")
WORKFLOW: dict[str, Any] = {
    "workflow": "report",
    "agents": {name: {"join": "and"} if name == "editor" else None for name in AGENTS},
    "edges": [
        ["planner", "researcher"], ["planner", "writer"], ["researcher", "editor"], ["writer", "editor"],
        ["editor", "critic", 0.7], ["critic", "planner", 0.5], ["critic", "critic", 0.2],
    ],
    "start": ["planner"],
}  # fmt: skip
NASTY = "<img src=x onerror=\"document.title='broken'\"><script>alert(1)</script>"


def chat(agent: str, answer: str, tokens: int, **more: Any) -> dict[str, Any]:
    system = f"You are the {agent} of a small team. Do your part of the report, step by step, and hand it on."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": answer}]
    return {"model": "tiny", "messages": messages, "max_tokens": tokens, "ignore_eos": True} | more


def headers_of(agent: str, workflow: str | None = "report", key: str | None = None) -> dict[str, str]:
    headers = {"X-Tenure-Agent": agent} | ({} if workflow is None else {"X-Tenure-Workflow": workflow})
    return headers | ({} if key is None else {"Authorization": f"Bearer {key}"})


@contextmanager
def traffic(served: Served, key: str | None = None, live: int = 4, tokens: int = 1500) -> Iterator[None]:
    """Past calls of all agents, then `live` long ones in progress until the block is left, with slow steps."""
    auth = {} if key is None else {"Authorization": f"Bearer {key}"}
    httpx.post(f"{served.url}/workflows", json=WORKFLOW, headers=auth).raise_for_status()
    for number in range(2):
        for agent in AGENTS:
            done = served.post(
                "/chat/completions", chat(agent, f"Part {number}.", 4), headers=headers_of(agent, key=key)
            )
            assert done.status_code == 200, done.text
    served.post("/chat/completions", chat(NASTY, "Now.", 2), headers=headers_of(NASTY, None, key))
    served.engine.between = lambda: time.sleep(0.02)

    def call(number: int) -> None:
        agent = AGENTS[number % len(AGENTS)]
        body = chat(agent, f"Write part {number} now.", tokens, stream=True)
        try:
            with httpx.stream(
                "POST", f"{served.url}/chat/completions", json=body, headers=headers_of(agent, key=key), timeout=60
            ) as answer:
                for _ in answer.iter_lines():
                    if stop.is_set():
                        return
        except httpx.HTTPError:
            assert stop.is_set() or not served.client.health().accepting, "a call ends by itself, or with the server"

    stop = threading.Event()
    callers = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(live)]
    for caller in callers:
        caller.start()
    served.until(lambda: served.client.health().num_running == live)
    try:
        yield
    finally:
        stop.set()
        for caller in callers:
            caller.join(30)
