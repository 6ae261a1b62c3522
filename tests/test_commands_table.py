"""Every command with every kind of bad input: one sentence, the right exit code, no traceback, nothing left behind."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tenure.scripts import cli
from tenure.scripts.soak.run_fuzz import limited

NO_MODEL = ["--model", "/no/model"]
SWEEP = "policies: [full]\nbudgets: [0.5]\ntasks: [needle]\nmodel: /no/model\n"
SETUP = "machine: {pool_tokens: 4000}\nworkload: {agents: 2, rounds: 1, fixed_tokens: 8}\nrepeats: 1\n"


@dataclass(frozen=True)
class Row:
    """How a command takes input that may be bad.

    Attributes:
        base: arguments with which the command is valid up to a model that is not there.
        inputs: arguments with a path to read, in place of {}; the base is left out.
        outputs: arguments with a path to write, after the base.
        numbers: flags with a number, after the base.
    """

    base: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


TABLE = {
    "demo": Row(
        tuple(NO_MODEL), ("--model /no/model --data {}", "--model /no/model --gates {}", "--model {}"), ("--out {}",),
        ("--budgets", "--length", "--cases", "--train-steps", "--threads"),
    ),
    "train": Row(
        (*NO_MODEL, "--steps", "1"),
        ("--config {}", "--model {}", "--model /no/model --data {}", "--model /no/model --chat-template {}"),
        ("--output-dir {}",),
        ("--steps", "--learning-rate", "--budget", "--warmup-steps", "--text-share", "--lengths"),
    ),
    "preview": Row(tuple(NO_MODEL), ("--config {}", "--model {}"), (), ("--min-length", "--group-share", "--seed")),
    "convert": Row(("/no/source", "/no/out", *NO_MODEL), ("{} /no/out --model /no/model",), (), ()),
    "fidelity": Row(
        (*NO_MODEL, "--policies", "knorm"), ("--model {}", "--model /no/model --gates {}"), ("--out {}",),
        ("--budgets", "--length", "--documents", "--chunk", "--cases"),
    ),
    "sweep": Row(
        ("{sweep}",), ("{}", "{sweep} --gates {}", "{sweep} --model {}"), ("--output {}",), ("--cases", "--processes"),
    ),
    "report": Row(("/no/run",), ("{}", "{} {}"), (), ()),
    "calibrate": Row(
        tuple(NO_MODEL), ("--model {}", "--model /no/model --gates {}"), ("--out {}", "--json {}"),
        ("--bound", "--max-loss", "--confidence", "--cases", "--length", "--validate", "--budgets"),
    ),
    "generate": Row(
        ("--prompt", "x", "--policy", "knorm", *NO_MODEL),
        ("--prompt-file {} --policy knorm --model /no/model", "--data {} --policy knorm --model /no/model",
         "--prompt x --gates {} --model /no/model", "--prompt x --policy full --model {}"),
        (), ("--temperature", "--budget", "--max-new-tokens", "--sinks", "--recent", "--buffer", "--prefill-chunk"),
    ),
    "inspect": Row(("/no/gates",), ("{}",), (), ("--tokens",)),
    "serve": Row(
        (*NO_MODEL, "--compress", "none"),
        ("--model /no/model --api-keys {}", "--model /no/model --gates {}", "--model {}"), (),
        ("--compress", "--device-memory", "--host-memory", "--port", "--drain-s", "--threads"),
    ),
    "simulate": Row(
        ("{setup}", "--jobs", "1"), ("{}", "--trace {}", "{setup} --trace {} --jobs 1"),
        ("--record {}", "--json {}", "--plot {}", "--timeline {}"),
        ("--repeats", "--jobs", "--timeline-s", "--workflows", "--set machine.link_gb_s", "--set workload.noise"),
    ),
    "turns": Row(
        ("kv", *NO_MODEL, "--policies", "knorm"), ("{} --format scbench --model /no/model", "kv --model {}"),
        ("--out {}",), ("--budgets", "--length", "--turns", "--conversations", "--seed"),
    ),
    "eval": Row(
        ("--tasks", "tenure_vt", "--model_args", "pretrained=/no/model,policy=knorm"),
        ("--config {}", "--tasks x --model_args pretrained={},policy=knorm",
         "--tasks x --model_args pretrained=/no/model,gates={}"),
        (), (),
    ),
}  # fmt: skip
NOT_INSTALLED = ("bench", "soak")


def test_every_installed_command_is_in_the_table():
    assert {name for name in cli.COMMANDS if name.split()[0] not in NOT_INSTALLED} == set(TABLE)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Bad inputs by kind, valid settings, an empty working folder, and 2 GB of memory to read them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    found = {
        kind: tmp_path / f"{kind}.yaml"
        for kind in ("missing", "directory", "binary", "empty", "sweep", "setup", "huge")
    }
    found["directory"].mkdir()
    found["folder"] = tmp_path / "folder"  # of a model, of gates and of a run, each of whose first files is empty
    found["folder"].mkdir()
    for name in ("config.json", "tenure_config.json", "gates.safetensors", "results.json"):
        found[name] = found["folder"] / name
        found[name].touch()
    found["binary"].write_bytes(bytes(range(256)) * 40)
    found["empty"].touch()
    found["sweep"].write_text(SWEEP)
    found["setup"].write_text(SETUP)
    with found["huge"].open("wb") as file:  # a terabyte, without a block on the disk
        file.truncate(1 << 40)
    with limited(2.0):
        yield found | {"device": Path("/dev/zero"), "unwritable": found["binary"] / "below"}


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> int:
    """The exit code, once what was printed is a sentence at the most."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        assert isinstance(stop.code, int), stop.code
        code = stop.code
    _, err = capsys.readouterr()
    assert "Traceback" not in err, err
    if code == 1:
        lines = [line for line in err.splitlines() if line.startswith("tenure ")]
        assert len(lines) == 1 and len(lines[0]) < 1500, err[-3000:]
    return code


def filled(text: str, places: dict[str, Path], path: Any) -> list[str]:
    """The words of a template."""
    words = text.replace("{sweep}", str(places["sweep"])).replace("{setup}", str(places["setup"])).split()
    return [word.replace("{}", str(path)) for word in words]


@pytest.mark.parametrize("name", list(TABLE))
@pytest.mark.parametrize("kind", ["missing", "directory", "binary", "empty", "device", "huge"])
def test_inputs(name: str, kind: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    for template in TABLE[name].inputs:
        code = outcome(capsys, *name.split(), *filled(template, places, places[kind]))
        assert code in (1, cli.USAGE_ERROR), f"{name} {template} with {kind}"
    assert not list(Path().iterdir()), "nothing is left behind"


@pytest.mark.parametrize("name", list(TABLE))
@pytest.mark.parametrize("number", ["nan", "-1", "-inf", "1e400", str(10**30), "1" + "0" * 5000])
def test_numbers(name: str, number: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    row = TABLE[name]
    for flag in row.numbers:
        value = [flag, number] if " " not in flag else [flag.split()[0], f"{flag.split()[1]}={number}"]
        base = [word for text in row.base for word in filled(text, places, "")]
        code = outcome(capsys, *name.split(), *base, *value)
        right = name == "simulate" and number == str(10**30)  # so many seconds of a plot, or bytes/s of a link
        assert code in (1, cli.USAGE_ERROR) or right, f"{name} {flag} {number:.20}"
    assert not list(Path().iterdir()), "nothing is left behind"


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.outputs])
def test_unwritable_outputs(name: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    row = TABLE[name]
    for flag in row.outputs:
        base = [word for text in row.base for word in filled(text, places, "")]
        code = outcome(capsys, *name.split(), *base, *filled(flag, places, places["unwritable"]))
        assert code in (1, cli.USAGE_ERROR), f"{name} {flag}"


IN_A_CHECKOUT = [name for name in cli.COMMANDS if name.split()[0] in NOT_INSTALLED]
OUTPUTS = {
    "json",
    "out",
    "output",
    "page",
    "python",
    "kvpress",
    "kvpress_python",
    "vllm_python",
}  # and side interpreters


def fields_of(name: str) -> Iterator[tuple[str, Any]]:
    """Flags of a command's config dataclass, with the plain types of their values."""
    for field, hint in get_type_hints(cli.COMMANDS[name].config_class()).items():
        yield field, {hint, *get_args(hint)} & {int, float, Path}


@pytest.mark.parametrize("name", IN_A_CHECKOUT)
def test_commands_of_a_checkout(
    name: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Their work takes minutes, so what is refused here is refused before it begins."""
    module = cli.COMMANDS[name].load()
    monkeypatch.setattr(module, "main", lambda config: pytest.fail(f"accepted: {config}"))
    tried = 0
    for field, types in fields_of(name):
        values: list[object] = []
        if {int, float} & types:
            values = ["nan", "-inf", "1e400", "1" + "0" * 5000]
        elif field in OUTPUTS:
            values = [places["unwritable"]] if field.endswith("python") else [places["unwritable"], places["device"]]
        for value in values:
            tried += 1
            code = outcome(capsys, *name.split(), f"--{field.replace('_', '-')}", str(value))
            assert code in (1, cli.USAGE_ERROR), f"{name} {field} {value:.20}"
    assert tried, "every one of them has a number or an output"
    assert not list(Path().iterdir()), "nothing is left behind"


@pytest.mark.parametrize("name", IN_A_CHECKOUT)
def test_commands_of_a_checkout_interrupted(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(config: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.COMMANDS[name].load(), "main", interrupted)
    required = ["--python", sys.executable] if name == "bench kvpress" else []
    assert outcome(capsys, *name.split(), *required) == cli.INTERRUPTED


_watched: list[str] = []  # while there is a path, opening it is interrupted
_installed: list[bool] = []


@contextlib.contextmanager
def interrupted_at(path: Path) -> Iterator[None]:
    """Within the block a Ctrl-C comes when that file is opened."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _watched and event == "open" and str(arguments[0]) == _watched[0]:
            raise KeyboardInterrupt

    if not _installed:  # an audit hook stays as long as the process
        sys.addaudithook(hook)
        _installed.append(True)
    _watched.append(str(path))
    try:
        yield
    finally:
        _watched.clear()


@pytest.mark.parametrize(
    ("name", "template", "file"),
    [
        ("train", "--config {}", "empty"), ("preview", "--config {}", "empty"), ("sweep", "{}", "sweep"),
        ("simulate", "{}", "setup"), ("simulate", "--trace {}", "empty"), ("eval", "--config {}", "empty"),
        ("generate", "--prompt-file {} --policy knorm", "binary"), ("generate", "--data {}", "binary"),
        ("serve", "--compress none --api-keys {}", "empty"), ("report", "{folder}", "results.json"),
        ("inspect", "{folder}", "tenure_config.json"), ("convert", "{folder} out --model {folder}", "config.json"),
        ("demo", "--model {folder} --policies knorm --data {binary}", "config.json"),
        ("fidelity", "--model {folder} --policies knorm", "config.json"),
        ("calibrate", "--gates {folder}", "tenure_config.json"),
        ("turns", "kv --model {folder} --policies knorm", "config.json"),
    ],
)  # fmt: skip
def test_interrupted(name: str, template: str, file: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    for kind in ("folder", "binary"):
        template = template.replace(f"{{{kind}}}", str(places[kind]))
    with interrupted_at(places[file]):
        assert outcome(capsys, *name.split(), *filled(template, places, places[file])) == cli.INTERRUPTED
    assert not list(Path().iterdir()), "nothing is left behind"
