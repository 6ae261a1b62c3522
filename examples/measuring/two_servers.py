"""Measures an agents' program at two servers that differ in their system only: `expected_time` and `lru_reactive`.

Used by `run.py` of the examples in the folders beside this one. Both servers have the same memory, which holds a share
of the agents' fixed prompts; the counters are those of `/metrics`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Ask = Callable[[str], str]
SYSTEMS = ("lru_reactive", "expected_time")
FLOAT32_BYTES = 4
ROOM_TOKENS = 512  # of the requests in progress, beside their fixed prompts
START_S = 300.0  # a server is given up that has not started after these seconds
COUNTERS = {
    "computed_tokens": r"tenure_prefill_tokens_total",
    "cached_tokens": r"tenure_cached_tokens_total",
    "stalled_s": r"tenure_stalled_seconds_total",
    "moved_bytes": r"tenure_moved_bytes_total\{.*\}",
}


@dataclass(frozen=True)
class Measured:
    """A program's run at one server.

    Attributes:
        makespan_s: seconds from the first call to the last answer.
        computed_tokens, cached_tokens: prompt tokens that were computed, and that were found in memory.
        stalled_s: seconds that requests waited for copies.
        moved_bytes: copied between tiers of memory.
        answers: of the program.
    """

    system: str
    makespan_s: float
    computed_tokens: float
    cached_tokens: float
    stalled_s: float
    moved_bytes: float
    answers: list[str]


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all examples have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--base-url", help="run at this server only, without measuring: http://127.0.0.1:8000/v1")
    found.add_argument("--model", default="demo", help="name by which the server has its model")
    found.add_argument("--questions", type=int, default=4, help="questions that are measured, after a first one")
    found.add_argument("--characters", type=int, default=4000, help="of the document in each agent's prompt")
    found.add_argument("--tokens", type=int, default=24, help="tokens of an answer at most")
    found.add_argument("--share", type=float, default=0.5, help="of the fixed prompts that fits into the memory")
    found.add_argument("--host-memory", default="0", help="memory behind it, such as 1GiB")
    found.add_argument("--json", type=Path, help="also write the numbers to this file")
    return found


def pool_bytes(prompts: Sequence[str], share: float, room_tokens: int) -> int:
    """Bytes for a share of the prompts, and for the `room_tokens` tokens of the requests in progress."""
    from transformers import AutoConfig, AutoTokenizer

    from tenure.training.assets import demo_model

    config, tokenizer = AutoConfig.from_pretrained(demo_model()), AutoTokenizer.from_pretrained(demo_model())
    head_dim = config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * FLOAT32_BYTES
    fixed = sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    return int(token_bytes * (share * fixed + room_tokens))


@contextmanager
def server(system: str, nbytes: int, host_memory: str) -> Iterator[str]:
    """Runs `tenure serve` with the demo's model; gives its base URL."""
    command = [
        sys.executable, "-m", "tenure", "serve", "--port", "0", "--system", system, "--compress", "none",
        "--device", "cpu", "--device-memory", str(nbytes), "--host-memory", host_memory,
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        try:
            end, found = time.monotonic() + START_S, None
            while found is None:
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise SystemExit(f"the server has not started:\n{log.read()}")
                time.sleep(0.1)
                log.seek(0)
                found = re.search(r"^serving \S+ on (http://\S+/v1)", log.read(), re.MULTILINE)
            yield found[1]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def counters(base_url: str) -> dict[str, float]:
    """The sums of `COUNTERS` at this moment."""
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        name: sum(float(value) for value in re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE))
        for name, pattern in COUNTERS.items()
    }


def measure(ask: Ask, questions: Sequence[str], base_url: str, system: str) -> Measured:
    """Asks the first question, and measures the others."""
    ask(questions[0])
    before, begun = counters(base_url), time.perf_counter()
    answers = [ask(question) for question in questions[1:]]
    seconds, after = time.perf_counter() - begun, counters(base_url)
    return Measured(system, seconds, answers=answers, **{name: after[name] - before[name] for name in COUNTERS})


def run(prepare: Callable[[str], Ask], questions: Sequence[str], prompts: Sequence[str], options: Any) -> None:
    """Asks questions at the server of `--base-url`; or measures them at a server of each system, and prints a table.

    Args:
        prepare: makes the program for a base URL.
        questions: repeated if more are wanted.
        prompts: the fixed prompts of all agents.
    """
    questions = [questions[i % len(questions)] for i in range(options.questions + 1)]
    if options.base_url is not None:
        ask = prepare(options.base_url)
        for question in questions:
            print(f"{question}\n  {ask(question)}\n")
        return
    nbytes = pool_bytes(prompts, options.share, ROOM_TOKENS)
    found = []
    for system in SYSTEMS:
        with server(system, nbytes, options.host_memory) as base_url:
            found.append(measure(prepare(base_url), questions, base_url, system))
    print_table(found, nbytes, options)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n", encoding="utf-8")


def print_table(found: list[Measured], nbytes: int, options: Any) -> None:
    print(
        f"{options.questions} questions after a first one, memory of {nbytes / 2**20:.0f} MiB: room for "
        f"{options.share:.0%} of the agents' prompts and for the requests in progress"
    )
    print(f"{'system':15} {'makespan':>9} {'computed':>9} {'cached':>9} {'stalled':>8} {'moved':>10}")
    for each in found:
        print(
            f"{each.system:15} {each.makespan_s:7.1f} s {each.computed_tokens:9.0f} {each.cached_tokens:9.0f} "
            f"{each.stalled_s:6.2f} s {each.moved_bytes / 2**20:6.0f} MiB"
        )
    lru, aware = found
    same = "the same" if lru.answers == aware.answers else "DIFFERENT"
    print(
        f"workflow awareness: {lru.makespan_s / aware.makespan_s:.2f} times as fast, "
        f"{lru.computed_tokens - aware.computed_tokens:.0f} tokens less computed, {same} answers"
    )
