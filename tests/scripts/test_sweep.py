"""`tenure sweep` and `tenure report` from end to end on a tiny model."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tenure.eval.report import load_run
from tenure.eval.sweep import Failure
from tenure.eviction import Knorm
from tenure.retention import RetentionGates
from tenure.scripts import cli, report, sweep

from ..eval.conftest import CHAT_TEMPLATE, TEXTS, build_tokenizer

SWEEP = """
model: {folder}/model
gates: {folder}/gates
data: {folder}/text.txt
policies: [full, retention, knorm]
budgets: [0.5, 0.2]
tasks: [needle, phrase]
lengths: [370, 380]
cases: 2
threads: 1
together: 2
output: {folder}/out
"""
TIMES = ("seconds", "compress_seconds", "read_seconds")


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A model, gates for it, a text, and a sweep that names them."""
    model = tiny_model("llama", vocab_size=512, max_position_embeddings=1024)
    model.save_pretrained(tmp_path / "model")
    build_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "model")
    RetentionGates.for_model(model, gate_width=8, initial_bias=3.0).save_pretrained(tmp_path / "gates")
    (tmp_path / "text.txt").write_text(" ".join(TEXTS))
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(folder=tmp_path))
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    return cli.main(["sweep", str(folder / "sweep.yaml"), *arguments])


def change(folder: Path, **values: Any) -> None:
    """Replaces lines of the YAML file."""
    path = folder / "sweep.yaml"
    lines = [line for line in path.read_text().splitlines() if line.split(":")[0] not in values]
    path.write_text("\n".join([*lines, *(f"{name}: {json.dumps(value)}" for name, value in values.items())]))


def results(folder: Path) -> list[dict[str, Any]]:
    """The measured values, without the times."""
    lines = [record.to_dict() for record in load_run(folder).records]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def test_a_sweep_goes_on_where_it_was_stopped_and_is_reported(folder, capsys):
    assert run(folder) == 0
    out = folder / "out"
    shown = capsys.readouterr()
    assert "finished, 40 results wanted, 0 failures" in shown.out
    assert "0 of 8 cases are there, 8 to do on cpu" in shown.err
    assert re.search(r"8 of 8 cases, 0 failures, about 0 s left; phrase, 380 tokens, seed 0, case 1 took", shown.err)
    whole, raw = results(out), (out / "part-0.jsonl").read_bytes()
    assert len(whole) == 40 and {line["budget"] for line in whole} == {1.0, 0.5, 0.2}
    settings = json.loads((out / "settings.json").read_text())
    assert set(settings["versions"]) == {"tenure", "torch", "transformers"} and settings["dtype"] == "float32"
    assert re.fullmatch(r"[0-9a-f]{64}", settings["gates"]["sha256"]) and settings["sweep"]["seeds"] == [0]
    assert (settings["sessions"][0]["threads"], settings["sessions"][0]["together"]) == (1, 2)

    lines = raw.splitlines(keepends=True)
    (out / "part-0.jsonl").write_bytes(b"".join(lines[:17]) + lines[17][:40])  # killed in the fourth case
    change(folder, together=1)  # as one does who was short of memory
    assert run(folder) == 0
    assert "3 of 8 cases are there, 5 to do" in capsys.readouterr().err
    again = results(out)
    assert len(again) == len(whole) and (out / "part-0.jsonl").read_bytes()[:100] == raw[:100]
    assert all(one == pytest.approx(other, abs=1e-5) for one, other in zip(again, whole, strict=True))
    assert run(folder) == 0
    assert "8 of 8 cases are there, 0 to do" in capsys.readouterr().err

    assert run(folder, "--cases", "3") == 1
    said = capsys.readouterr().err
    assert said == (
        f"tenure sweep: {out} was begun with other settings, sweep.cases was 2 and is now 3: give another --output\n"
    )
    assert (out / "part-0.jsonl").read_bytes()[:100] == raw[:100]

    assert cli.main(["report", str(out)]) == 0
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "370 tokens, question asked after the compression" in page and 'href="part-0.jsonl"' in page
    assert not re.search(r"https?://|<script|<img|url\(|@import", page)
    means = [line["score"] for line in whole if (line["policy"], line["length"], line["budget"]) == ("knorm", 380, 0.2)]
    row = next(line for line in text.split("380 tokens")[1].splitlines() if line.startswith("| Knorm |"))
    assert f"{sum(means) / 4:.2f} [" in row.split("|")[3]


def test_processes_share_the_work_and_write_the_same(folder, capsys):
    change(folder, cases=1)
    assert run(folder) == 0
    assert run(folder, "--processes", "2", "--output", str(folder / "two")) == 0
    parts = [path.read_text().splitlines() for path in sorted((folder / "two").glob("part-*.jsonl"))]
    # Of two processes one may have done everything before the other has loaded its model.
    assert len(parts) in (1, 2) and all(len(part) % 5 == 0 for part in parts) and sum(map(len, parts)) == 20
    assert results(folder / "two") == results(folder / "out")
    capsys.readouterr()
    assert cli.main(["report", str(folder / "out"), str(folder / "two"), "--output", str(folder / "both.html")]) == 0
    assert "No accuracy differs significantly: all 5 intervals hold 0." in (folder / "both.html").read_text()


def test_a_killed_sweep_keeps_all_but_the_case_it_was_at(folder):
    change(folder, cases=5)
    command = [sys.executable, "-m", "tenure.scripts.cli", "sweep", str(folder / "sweep.yaml")]
    part = folder / "out" / "part-0.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (part.is_file() and part.read_text().count("\n") >= 5):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = results(folder / "out")
    assert 5 <= len(before) < 100 and len(before) % 5 == 0
    assert run(folder) == 0, "the lock of the killed process is free again"
    after = results(folder / "out")
    assert len(after) == 100 and all(line in after for line in before)


def test_cases_are_exported_without_measuring(folder, capsys):
    assert run(folder, "--export-cases", str(folder / "cases.jsonl")) == 0
    assert capsys.readouterr().out == f"8 cases written to {folder}/cases.jsonl\n"
    lines = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    assert [(line["index"], line["length"], line["task"]) for line in lines[:3]] == [
        (0, 370, "needle"), (0, 370, "phrase"), (1, 370, "needle")
    ]  # fmt: skip
    assert all(len(line["context_ids"]) == line["length"] for line in lines)
    assert not (folder / "out").exists()


def test_failures_are_named_and_do_not_stop_the_rest(folder, monkeypatch, capsys):
    def score(self, view):
        raise RuntimeError("odd scores")

    change(folder, policies=["full", "knorm"], budgets=[0.5], lengths=[380])
    with monkeypatch.context() as patch:
        patch.setattr(Knorm, "score", score)
        assert run(folder) == 1
    shown = capsys.readouterr()
    assert "failed: needle, 380 tokens, seed 0, case 0, knorm:head at 0.5: RuntimeError: odd scores" in shown.err
    assert "4 failed; add --retry-failed" in shown.err and "finished, 8 results wanted, 4 failures" in shown.out
    found = load_run(folder / "out")
    assert {record.policy for record in found.records} == {"full"} and len(found.records) == 4
    assert all(isinstance(one, Failure) and one.policy == "knorm" for one in found.failures)
    cli.main(["report", str(folder / "out")])
    page = (folder / "out" / "report.html").read_text()
    assert "4 failures; what failed is left out of the means." in page and "RuntimeError: odd scores" in page
    capsys.readouterr()
    assert run(folder) == 1, "what failed before still counts"
    assert "4 of 4 cases are there, 0 to do" in capsys.readouterr().err
    assert run(folder, "--retry-failed") == 0
    assert len(results(folder / "out")) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ["snapkw"]}, "unknown policy 'snapkw'; known: "),
        ({"policies": ["knorm:heads"]}, "unknown scope 'heads'; known: "),
        ({"budgets": [1.5]}, "budget 1.5 is out of range: "),
        ({"tasks": ["needles"]}, "unknown task 'needles'; known tasks: needle, phrase"),
        ({"lengths": [2000]}, "contexts of 2000 tokens and 256 for the question exceed the model's 1024 positions"),
        ({"lengths": [370, 60]}, "a context of 60 tokens is too short for task 'needle'"),
        ({"gates": None}, "the shipped gates fit the demo model only: give --gates"),
        ({"gates": "no/such/gates"}, "no gates at 'no/such/gates'"),
        ({"gates": "OTHER"}, "the gates, of .*, do not fit this model: hidden_size 16 against 32"),
        ({"gates": "SHAPE"}, "the gates were trained on .*same shape, other weights"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"data": "no/such/text"}, "no file or folder 'no/such/text'"),
        ({"foo": 1}, "got unknown fields foo; accepted: policies, budgets, tasks"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_any_work(changes, message, folder, tiny_model, capsys):
    import torch

    name = changes.get("gates")
    if name in ("OTHER", "SHAPE"):
        model = tiny_model("llama", vocab_size=512, **({"hidden_size": 16} if name == "OTHER" else {}))
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1.0)
        RetentionGates.for_model(model, gate_width=8).save_pretrained(folder / name)
        changes = {"gates": str(folder / name)}
    change(folder, **changes)
    assert run(folder) == 1
    lines = capsys.readouterr().err.splitlines()
    assert re.search(message, lines[-1]) and lines[-1].startswith("tenure sweep: ")
    assert not (folder / "out" / "part-0.jsonl").exists()


def test_a_flag_names_other_gates(folder, capsys):
    assert run(folder, "--gates", "no/such/gates") == 1
    assert "tenure sweep: no gates at 'no/such/gates'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2", "--devices", "cpu"], "--devices and --processes exclude each other"),
        (["--devices", "gpu"], "--devices has 'gpu'; cpu, cuda, cuda:1 and so on are accepted"),
        (["--devices", "cuda:99"], "--devices has 'cuda:99'; this machine has [0-9]+ CUDA devices"),
    ],
)
def test_devices_that_are_not_there_are_refused(arguments, message, folder, capsys):
    assert run(folder, *arguments) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_report_of_nothing_is_refused(folder, capsys):
    assert cli.main(["report", str(folder)]) == 1
    assert "has neither settings.json" in capsys.readouterr().err


def test_numbers_and_names_out_of_range_are_refused(capsys):
    with pytest.raises(ValueError, match="--processes is 0; 1 or more is accepted"):
        sweep.SweepCommand(Path("a.yaml"), processes=0)
    with pytest.raises(ValueError, match="3 runs are named; one, or two to compare, are accepted"):
        report.ReportConfig([Path("a"), Path("b"), Path("c")])
    assert cli.main(["report", "a", "--output", "page.txt"]) == 1
    assert "--output is 'page.txt'; accepted: a name that ends with .html, .htm" in capsys.readouterr().err
