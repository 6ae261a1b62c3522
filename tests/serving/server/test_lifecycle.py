"""Streams that wait, clients that go, and servers that stop."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tenure.scripts import cli
from tenure.scripts.serve import read_bytes
from tenure.serving.server import ServerConfig, bind

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
LONG = CHAT | {"max_tokens": 1500, "ignore_eos": True}


def slow(served, seconds: float = 0.02) -> None:
    """Each step of the engine takes so long from now on."""
    served.engine.between = lambda: time.sleep(seconds)


def test_a_stream_gets_pings_while_nothing_else_is_there(serve):
    served = serve(config=ServerConfig(ping_s=0.05, drain_s=5.0))
    held = threading.Event()
    served.engine.between = held.wait
    with httpx.stream("POST", f"{served.url}/chat/completions", json=CHAT | {"stream": True}, timeout=30) as stream:
        assert stream.status_code == 200 and stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]
        held.set()
        rest = [line for line in lines if line and line != ": ping"]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[0].removeprefix("data: "))["choices"][0]["delta"]["role"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_goes_ends_its_request(served, stream, begun):
    held = threading.Event()
    served.engine.between = (lambda: time.sleep(0.01)) if begun else held.wait
    body = json.dumps(LONG | {"stream": stream, "n": 2}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(served.root.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        served.until(lambda: served.client.health().num_running == 2 if begun else served.unfinished() == 2)
    if not begun:
        time.sleep(0.2)  # the server has seen that the client has gone
        held.set()
    served.until(lambda: served.unfinished() == 0)
    cancelled = [n for reason, n in served.system.scheduler.metrics.finished.items() if reason.name == "CANCELLED"]
    assert cancelled == [2]
    served.engine.between = lambda: None
    assert served.post("/chat/completions", CHAT).status_code == 200


def test_a_reader_that_takes_nothing_is_given_up(serve):
    served = serve(config=ServerConfig(send_timeout_s=0.3, drain_s=5.0, max_choices=32))
    body = json.dumps(LONG | {"stream": True, "n": 16, "logprobs": True, "top_logprobs": 20}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", int(served.root.rpartition(":")[2])))
        reader.sendall(head.encode() + body)
        served.until(lambda: served.unfinished() > 0)
        served.until(lambda: served.unfinished() == 0, 60)
    finished = served.system.scheduler.metrics.finished
    assert sum(n for reason, n in finished.items() if reason.name == "CANCELLED") > 0


def test_a_flush_ends_a_stream_with_an_error_event(served):
    slow(served)
    with httpx.stream("POST", f"{served.url}/chat/completions", json=LONG | {"stream": True}, timeout=30) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        assert httpx.post(f"{served.root}/admin/flush").json() == {"status": "flushed"}
        last = [*lines][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"
    served.engine.between = lambda: None
    assert served.post("/chat/completions", CHAT).status_code == 200


def test_a_stop_waits_for_what_runs(serve):
    served = serve(config=ServerConfig(drain_s=30.0))
    slow(served)
    answers: list[httpx.Response] = []
    body = CHAT | {"max_tokens": 30, "ignore_eos": True}
    asking = threading.Thread(target=lambda: answers.append(served.post("/chat/completions", body)))
    asking.start()
    served.until(lambda: served.client.health().num_running == 1)
    served.stop()
    asking.join()
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 30
    with pytest.raises(httpx.ConnectError):
        served.post("/chat/completions", CHAT)


def test_a_stop_cuts_short_what_takes_too_long(serve):
    served = serve(config=ServerConfig(drain_s=0.3))
    slow(served)
    stopping = threading.Thread(target=served.stop)
    with httpx.stream("POST", f"{served.url}/chat/completions", json=LONG | {"stream": True}, timeout=30) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        stopping.start()
        last = [*lines][-1]
    stopping.join()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"


def test_an_address_in_use_and_a_host_that_is_not_ours():
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OSError, match="give another --host or --port"):
            bind("127.0.0.1", first.getsockname()[1])
    with pytest.raises(OSError, match="accepted: a name or address of this machine"):
        bind("no.such.host.invalid", 0)


# `tenure serve` on a tiny model in a folder, as a process of its own.


@pytest.fixture
def folder(model, tokenizer, tmp_path: Path) -> Path:
    from tenure.retention import RetentionGates

    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    RetentionGates.for_model(model, gate_width=8).save_pretrained(tmp_path / "gates")
    return tmp_path


def start(folder: Path, *flags: str) -> tuple[subprocess.Popen[str], list[str]]:
    """The process, and the lines it prints until it is ready."""
    command = [
        sys.executable,
        "-m",
        "tenure",
        "serve",
        "--model",
        str(folder / "tiny"),
        "--port",
        "0",
        "--threads",
        "1",
    ]
    small = ["--device-memory", "32MiB", "--host-memory", "32MiB"]
    process = subprocess.Popen(
        [*command, *small, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    assert process.stdout is not None
    lines: list[str] = []
    while not any(line.startswith("curl") for line in lines):
        line = process.stdout.readline()
        assert line, process.communicate()[1][-2000:]
        lines.append(line)
    return process, lines


def finish(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.splitlines()[-1] == "stopped" and not err, (out, err)


def test_the_command_prints_a_curl_line_that_works_and_ends_on_ctrl_c(folder):
    process, lines = start(folder, "--gates", str(folder / "gates"))
    answer = subprocess.run(["bash", "-c", lines[-1]], capture_output=True, text=True, timeout=60)
    assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant"
    process.send_signal(signal.SIGINT)
    finish(process)


def test_the_command_drains_on_sigterm_and_takes_every_flag(folder):
    (folder / "keys").write_text("# client key\nteam-a key-of-team-a-0123456789\nboss key-of-the-boss-0123 admin\n")
    process, lines = start(
        folder, "--compress", "none", "--system", "lru_reactive", "--disk", f"{folder / 'disk'}:32MiB", "--name",
        "little", "--api-keys", str(folder / "keys"), "--host", "127.0.0.1", "--drain-s", "20", "--device", "cpu",
        "--dtype", "float32",
    )  # fmt: skip
    assert "Authorization: Bearer KEY" in lines[-1]
    url = lines[-1].split()[1]
    headers = {"Authorization": "Bearer key-of-team-a-0123456789"}
    assert httpx.post(url, json=CHAT).status_code == 401
    assert process.stdout is not None
    (folder / "keys").write_text("team-a key-of-team-a-0123456789 tokens_per_min=100000\n")
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "the file of keys was read again\n"
    body = CHAT | {"model": "little", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as stream:
        assert stream.headers["x-ratelimit-limit-tokens"] == "100000"
        events = (line for line in stream.iter_lines() if line)
        next(events)
        process.send_signal(signal.SIGTERM)
        rest = [*events]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
    finish(process)
    assert (folder / "disk").is_dir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compress", "1.5"], "got 1.5 for --compress; accepted: a share between 0 and 1, or none"),
        (["--device-memory", "lots"], "got 'lots' for --device-memory; accepted: bytes, as 2GiB"),
        (["--device-memory", "0"], "accepted: more than 0"),
        (["--host-memory", "2XB"], "got '2XB' for --host-memory"),
        (["--disk", "50GiB"], "accepted: a folder and a size, as /var/cache/tenure:50GiB"),
        (["--disk", "/tmp/x:many"], "got 'many' for --disk"),
        (["--port", "70000"], "accepted: 0 to 65535"),
        (["--drain-s", "0"], "--drain-s takes seconds above 0"),
        (["--threads", "0"], "--threads 1 or more"),
        (["--system", "belady"], "belady"),
        (["--gates", "x", "--compress", "none"], "got --gates with --compress none"),
        (["--disk", "/tmp/x:1GiB", "--system", "lru"], "got --disk with --system lru"),
    ],
)
def test_wrong_flags_are_refused(flags, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", *flags])
    assert end.value.code == 2 and message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "other"], "the shipped gates fit the demo model only"),
        (["--api-keys", "/no/such/file"], "/no/such/file"),
        (["--compress", "none", "--host", "no.such.host.invalid"], "accepted: a name or address of this machine"),
    ],
)
def test_mistakes_are_one_sentence_before_the_model_is_loaded(flags, message, capsys):
    assert cli.main(["serve", *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_sizes_of_memory():
    assert [read_bytes(text, "--x") for text in ("7", "2GiB", "1.5 KiB", "3mb")] == [7, 2 << 30, 1536, 3_000_000]


def test_the_event_loop_never_waits_for_the_engine(served):
    held = threading.Event()
    served.engine.between = held.wait
    try:
        waiting = threading.Thread(target=served.post, args=("/chat/completions", CHAT))
        waiting.start()
        served.until(lambda: served.unfinished() == 1)
        begun = time.monotonic()
        assert httpx.get(f"{served.root}/health").json() == {"status": "ok"}
        assert httpx.get(f"{served.url}/models").status_code == 200
        assert "tenure_requests_waiting 1.0" in httpx.get(f"{served.root}/metrics").text
        assert served.post("/chat/completions", CHAT | {"temperature": -1}).status_code == 400
        assert time.monotonic() - begun < 5
    finally:
        held.set()
    waiting.join()


def test_a_server_that_stops_refuses_new_requests_with_503(serve):
    served = serve(config=ServerConfig(drain_s=20.0))
    slow(served)
    body = LONG | {"max_tokens": 60, "stream": True}
    with httpx.stream("POST", f"{served.url}/chat/completions", json=body, timeout=30) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        draining = threading.Thread(target=served.client.drain, args=(20.0,))
        draining.start()
        served.until(lambda: not served.client.health().accepting)
        refused = served.post("/chat/completions", CHAT)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_draining"
        assert refused.headers["Retry-After"] == "1"
        health = httpx.get(f"{served.root}/health")
        assert health.status_code == 503 and health.json() == {"status": "draining"}
        assert [*lines][-1] == "data: [DONE]"
    draining.join()
