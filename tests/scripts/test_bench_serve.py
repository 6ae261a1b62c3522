"""`tenure bench serve` on a tiny random model: servers in processes of their own, rows, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from tenure.eviction import evict
from tenure.scripts import cli
from tenure.scripts.bench import bench_serve
from tenure.scripts.bench.bench_serve import ServeBench, ServeBenchConfig, in_turn, makespan_row, own_rows, peer_rows
from tenure.scripts.bench.http_agents import ChatCall, ChatWorkload, HttpRun
from tenure.scripts.bench.server_process import ServerProcess
from tenure.scripts.soak.tiny_served import character_tokenizer, make_tiny_served

SIZES = {"fixed": 64, "suffix": 8, "answer": 3, "rounds": 1, "runs": 1, "stream_tokens": 5}


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator:
    """Benches on the tiny model, with random text."""
    from transformers import AutoModelForCausalLM

    served = make_tiny_served(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(served.model).eval()
    text = torch.randint(10, 90, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    with evict(model, "full") as session:

        def make(**options) -> ServeBench:
            config = ServeBenchConfig(model=str(served.model), gates=str(served.gates), **{**SIZES, **options})
            return ServeBench(config, session, character_tokenizer(), tmp_path, text)

        yield make


def test_rows_of_compressed_prompts_and_of_the_overhead(make_bench):
    rows = {row.name: row for row in own_rows(make_bench(only=("compressed", "overhead")))}
    ring = "serve/ring/p05/compressed"
    assert list(rows) == [f"{ring}/vs_plain", f"{ring}/waited_tokens/vs_plain", "serve/overhead", "serve/overhead/cpu"]
    assert all(row.ours > 0 and row.peer and row.ratio > 0 and row.n == 1 for row in rows.values())
    # Each call waits at least for the user's message.
    assert rows[f"{ring}/waited_tokens/vs_plain"].ours >= 10 * SIZES["suffix"]


def test_a_server_that_is_killed_takes_its_processes_along(tmp_path):
    """As vLLM's, whose engine is a process of its own."""
    child = "import http.server as h; h.test(h.BaseHTTPRequestHandler, port=int(sys.argv[-1]), bind='127.0.0.1')"
    health = "h.BaseHTTPRequestHandler.do_GET = lambda s: (s.send_response(200), s.end_headers())"
    child = f"import sys, http.server as h; {health}; {child}"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, *sys.argv])"
    server = ServerProcess([sys.executable, "-c", code], tmp_path / "log")
    server.start()
    assert httpx.get(f"{server.root}/health").status_code == 200
    server.kill()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.root}/health")
    server.kill()  # no effect


class FakeServer:
    """Notes what it is asked; each call takes a second more than the one before."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def declare(self, workload: ChatWorkload) -> None:
        self.asked.append(f"declare {workload.name}")

    def warm_up(self, workload: ChatWorkload) -> None:
        self.asked.append("warm up")

    def run(self, workload: ChatWorkload) -> HttpRun:
        self.asked.append(workload.calls[0].text)
        answers = [call.text.upper() for call in workload.calls]
        return HttpRun(float(len(self.asked)), [0.1] * len(answers), [0] * len(answers), answers)

    def close(self) -> None:
        self.asked.append("close")


def chats(text: str) -> ChatWorkload:
    return ChatWorkload("ring", {"workflow": "ring"}, {"a": "A."}, [ChatCall("a", text)], 2)


def test_sides_take_turns_on_the_same_calls_after_a_warm_up():
    servers = {"ours": FakeServer(), "peer": FakeServer()}
    runs = in_turn(servers, [chats("first"), chats("second"), chats("third")])  # pyright: ignore[reportArgumentType]
    for side, server in servers.items():
        assert server.asked == ["warm up", "first", "second", "third"]
        assert [run.answers for run in runs[side]] == [["SECOND"], ["THIRD"]], "the first run is not counted"


def test_the_ratio_is_that_of_the_turns():
    def runs(*seconds: float) -> list[HttpRun]:
        return [HttpRun(each, [], [], []) for each in seconds]

    row = makespan_row("x", runs(1, 2, 4), runs(2, 10, 4), "≥ 1.5")
    assert (row.ours, row.peer, row.ratio, row.n) == (2, 4, 2.0, 3)


def test_rows_beside_another_server(make_bench, monkeypatch):
    made: list[FakeServer] = []

    @contextmanager
    def server(self, system: str, device_bytes: int, compress: float | None = None) -> Iterator[FakeServer]:
        made.append(FakeServer())
        yield made[-1]

    def peer_of(url: str, model: str) -> FakeServer:
        assert (url, model) == ("http://127.0.0.1:1/v1", "theirs")
        made.append(FakeServer())
        return made[-1]

    monkeypatch.setattr(ServeBench, "server", server)
    monkeypatch.setattr(bench_serve, "AgentServer", peer_of)
    bench = make_bench(peer_url="http://127.0.0.1:1/v1", peer_model="theirs")
    rows = {row.name: row for row in peer_rows(bench)}
    sides = [f"serve/ring/p50/{side}/{what}/vs_peer" for side in ("compressed", "plain", "device_only")
             for what in ("makespan", "first_token")]  # fmt: skip
    assert list(rows) == [*sides, "serve/ring/p50/same_answers/vs_peer"]
    assert rows["serve/ring/p50/same_answers/vs_peer"].ratio == 1.0
    assert "declare ring" in made[0].asked and "declare ring" not in made[-1].asked, "others know no workflows"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "star/p50"], "got --only star/p50; accepted: ring/p50"),
        (["--runs", "0"], "accept 1 or more"),
        (["--kept", "1.0"], "--kept accepts a share between 0 and 1"),
        (["--vllm-python", "/no/python"], "got --vllm-python /no/python; accepted: a Python interpreter"),
        (["--peer-url", "http://x/v1", "--vllm-python", "/bin/sh"], "accepted: one of them"),
    ],
)
def test_what_cannot_be_is_refused(flags, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "serve", *flags])
    assert end.value.code == 2 and message in " ".join(capsys.readouterr().err.replace("│", " ").split())
