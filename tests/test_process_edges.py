"""The command where it meets its process: closed and full streams, encodings, colours, `~`, outputs tried first."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tenure.scripts import cli
from tenure.scripts.output import OutputFile, OutputFolder, Python, prepare_paths

TENURE = [sys.executable, "-m", "tenure"]
SETUP = "examples/kvflow_single.yaml"
ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`tenure ARGUMENTS` with what a shell adds to it."""
    line = " ".join([*TENURE, *arguments, shell])
    surroundings = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "PYTHONUTF8")}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, env=surroundings | environment, timeout=120
    )


@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--help"]])
def test_a_reader_that_leaves(arguments: list[str]):
    result = run(*arguments, shell="| head -n 1")
    assert result.stdout.startswith("usage: tenure") and result.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(("arguments", "who"), [(["--help"], "tenure"), (["inspect", "demo"], "tenure inspect")])
def test_a_full_device(arguments: list[str], who: str):
    result = run(*arguments, shell="> /dev/full")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"{who}: [Errno 28] No space left on device"
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


def test_closed_streams():
    result = run("generate", "--prompt-file", "-", shell="<&-")
    sentence = "tenure generate: the prompt is empty: there is no text in standard input\n"
    assert (result.returncode, result.stderr) == (1, sentence)
    assert run("--help", shell=">&-").returncode == 0
    assert run("simulate", SETUP, "--cells", "nothing", shell="2>&-").returncode == 1


def test_an_output_that_has_ascii_only():
    result = run("simulate", "--help", PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and result.stdout.isascii() and "?" not in result.stdout
    result = run("--help", PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "policies x budgets" in " ".join(result.stdout.split())
    code = f"import sys; from tenure.scripts import cli; cli.prepare_streams(); print({''.join(cli.ASCII)!r}, 'é')"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert shown.stdout == "".join(cli.ASCII.values()) + " ?\n", shown.stderr


@pytest.mark.parametrize("plain", [False, True])
def test_no_color_leaves_no_style(plain: bool):
    ours, theirs = pty.openpty()
    code = "from tenure.scripts.output import make_console; make_console().print('[bold red]word[/bold red]')"
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm-256color"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=theirs, env=environment | ({"NO_COLOR": "1"} if plain else {})
    ) as process:
        assert process.wait(60) == 0
    written = os.read(ours, 1000).decode()
    os.close(ours)
    os.close(theirs)
    assert "word" in written and ("\x1b" not in written) == plain


def test_an_interrupt_ends_the_other_processes_at_once(tmp_path: Path):
    """Ctrl-C reaches the whole group; the processes' tasks would take minutes each."""
    rounds = "workload.rounds=100000"
    process = subprocess.Popen(
        [*TENURE, "simulate", SETUP, "--jobs", "2", "--set", rounds], cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    group = process.pid
    while sum(_group(each) == group for each in _processes()) < 4:  # with the resource tracker
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(group, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (cli.INTERRUPTED, "interrupted\n")
    for _ in range(100):  # the resource tracker ends by itself when the others have
        if not [each for each in _processes() if _group(each) == group]:
            break
        time.sleep(0.1)
    assert not [each for each in _processes() if _group(each) == group]


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _group(process: int) -> int:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["simulate", SETUP, "--json", "/proc/x.json"], "--json is '/proc/x.json', and '/proc' cannot be written: "),
        (["simulate", SETUP, "--json", "."], "--json is '.', which is a folder; accepted: a file's path"),
        (["simulate", SETUP, "--json", "/dev/null"], "which is a device or the like; accepted: a file's path"),
        (["simulate", SETUP, "--plot", "x.gif"], "accepted: a name that ends with .png, .svg, .pdf"),
        (["simulate", SETUP, "--timeline", "README.md/x.png"], "and 'README.md' cannot be written: Not a directory"),
        (["simulate", "--trace", "x", "--plot", "x.png"], "--trace goes with --json; --study, --plot, "),
        (["simulate", SETUP, "--set", "workload.agents=1000000000"], "accepted: 100,000 agents and 10,000,000 calls"),
        (["demo", "--out", "README.md"], "--out is 'README.md', which is a file; accepted: a folder's path"),
        (["fidelity", "--out", "/proc/x"], "--out is '/proc/x', and '/proc' cannot be written: "),
        (["calibrate", "--json", "docs"], "--json is 'docs', which is a folder; accepted: a file's path"),
        (["report", "docs", "--output", "x.md"], "--output is 'x.md'; accepted: a name that ends with .html, .htm"),
        (["sweep", "x.yaml", "--kvpress", "/no/python"], "--kvpress is '/no/python'; accepted: an environment's Pyth"),
        (["sweep", "x.yaml", "--export-cases", "/proc/x"], "--export-cases is '/proc/x', and '/proc' cannot be wri"),
    ],
)  # fmt: skip
def test_outputs_are_tried_before_any_work(arguments, sentence, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # of tyro, which shows it in a box
        code = stop.code
    out, err = capsys.readouterr()
    assert code in (1, 2) and out == ""
    assert sentence in " ".join(err.replace("│", " ").split())


def test_a_missing_library_is_told_first(monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("tenure.scripts.output.find_spec", lambda name: None)
    monkeypatch.chdir(ROOT)
    assert cli.main(["simulate", SETUP, "--plot", "x.png"]) == 1
    assert "the pictures of --plot need matplotlib: pip install 'tenure[simulate]'" in capsys.readouterr().err
    assert cli.main(["demo"]) == 1
    assert "the pictures of --out need matplotlib: pip install 'tenure[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_path_that_is_written_is_tried(name: str):
    """A command's flag for an output has one of the annotations that `prepare_paths` checks."""
    from typing import get_type_hints

    from tenure.scripts.output import _rules

    hints = get_type_hints(cli.COMMANDS[name].config_class(), include_extras=True)
    written = {"json", "out", "output", "plot", "timeline", "record", "export_cases"}
    written |= {"kvpress", "kvpress_python", "vllm_python"}
    for field in written & set(hints):
        assert _rules(hints[field]), field


def test_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dataclasses import dataclass, field

    @dataclass
    class Given:
        out: OutputFolder = Path("~/new/out")
        json: OutputFile | None = None
        python: Python = Path(sys.executable)
        inputs: list[Path] = field(default_factory=lambda: [Path("~/a"), Path("b")])
        text: str = "~/text"

    monkeypatch.setenv("HOME", str(tmp_path))
    globals().update(Given=Given)
    found = prepare_paths(Given())
    assert found == Given(tmp_path / "new" / "out", None, Path(sys.executable), [tmp_path / "a", Path("b")])
    assert list(tmp_path.iterdir()) == []  # tried, and nothing left


def test_rows_are_written_where_the_folder_is_new(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    new = tmp_path / "new"
    arguments = ["simulate", SETUP, "--set", "workload.rounds=1", "workload.agents=4", "--repeats", "1", "--jobs", "1"]
    arguments += ["--json", str(new / "a" / "rows.json"), "--plot", str(new / "b" / "x.svg")]
    assert cli.main([*arguments, "--record", str(new / "c" / "x.jsonl")]) == 0
    assert json.loads((new / "a" / "rows.json").read_text())
    assert (new / "b" / "x.svg").stat().st_size and (new / "c" / "x.jsonl").stat().st_size
    capsys.readouterr()
    assert cli.main(["simulate", "--trace", str(new / "c" / "x.jsonl"), "--jobs", "1"]) == 0  # without a set-up
    assert "recorded makespan" in capsys.readouterr().out
