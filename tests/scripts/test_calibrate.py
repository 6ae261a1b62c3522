"""`tenure calibrate` from end to end on a tiny model: what it stores, shows and refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tenure.retention import RetentionGates
from tenure.scripts import cli

TEXT = " ".join(f"On day {day} the crew of ship %d wrote down what the weather was like." for day in range(50))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture
def arguments(tiny_model, tokenizer, tmp_path: Path) -> list[str]:
    """A folder with a model, gates for it and four texts, and the flags that name them."""
    model = tiny_model("llama", vocab_size=512, max_position_embeddings=1024)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    RetentionGates.for_model(model, gate_width=8, initial_bias=3.0).save_pretrained(tmp_path / "gates")
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"ship{number}.txt").write_text(TEXT % ((number,) * 50))
    (tmp_path / "texts" / "short.txt").write_text("Too short.")
    folders = [f"--{name}={tmp_path / folder}" for name, folder in
               (("model", "model"), ("gates", "gates"), ("data", "texts"))]  # fmt: skip
    return [*folders, "--length=450", "--cases=4", "--device=cpu", "--confidence=0.5", "--budgets", "0.9", "0.1"]


def calibrate(arguments: list[str], *more: str) -> int:
    try:
        return cli.main(["calibrate", *arguments, *more])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def test_it_stores_what_it_found_and_generate_uses_it(arguments, tmp_path, capsys):
    # 4 answers of a random model, none of which the full cache gets right: nothing can be lost.
    assert calibrate(arguments, "--loss", "needle", "--bound", "0.5", f"--json={tmp_path / 'out' / 'run.json'}") == 0
    out = capsys.readouterr().out
    assert "retention (global): 4 documents of 450 tokens from 4 texts (ship0, ship1, ship2, ship3)" in " ".join(
        out.split()
    )
    assert "Several documents share a text" not in out
    assert "10% of the cache: share of answers lost (needle) at most 0.5 with confidence 0.5" in " ".join(out.split())
    found = RetentionGates.from_pretrained(tmp_path / "gates").calibration
    assert found is not None
    assert (found.budget, found.loss, found.bound, found.cases, found.documents) == (0.1, "needle", 0.5, 4, 4)
    assert (found.policy, found.scope, found.lengths, found.tasks) == ("retention", "global", (450, 450), ("needle",))
    assert found.data == "texts: ship0, ship1, ship2, ship3" and found.dtype == "float32"
    assert [row.statistic for row in found.table] == pytest.approx([0.5**4] * 2)
    document = json.loads((tmp_path / "out" / "run.json").read_text())
    assert document["calibration"]["budget"] == 0.1 and len(document["measured"]["records"]) == 12
    assert document["measured"]["losses"] == [[0.0, 0.0]] * 4

    prompt = " ".join(f"On day {day} the crew wrote." for day in range(50))
    flags = [arguments[0], arguments[1], "--prompt", prompt, "--device=cpu", "--max-new-tokens=2"]
    assert cli.main(["generate", *flags, "--budget", "calibrated"]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "KV cache: retention, budget 0.1, scope global" in shown and "share of answers lost (needle)" in shown
    assert cli.main(["generate", *flags, "--budget", "calibrated", "--policy", "snapkv"]) == 1
    assert "promises nothing with policy 'snapkv' (calibrated: 'retention')" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "gates")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Budget 0.1 keeps the expected loss (needle) below 0.5 with confidence 0.5: retention, global" in shown


def test_none_qualifies(arguments, tmp_path, capsys):
    """KL of a random model under a budget of a tenth is far beyond a bound that no loss at all would just meet."""
    json_file = tmp_path / "run.json"
    tight = ["--bound", "0.001", "--max-loss", "0.002", "--budgets", "0.1", "0.05", f"--json={json_file}"]
    assert calibrate(arguments, *tight) == 1
    out, err = capsys.readouterr()
    assert "│     5% │" in out
    start = "tenure calibrate: no budget qualifies and nothing is stored: 10%, the largest, has a mean loss"
    assert err.startswith(start)
    assert "with 4 cases it meets a bound of 0.002" in err and "no number of cases would do" in err
    assert len(err.splitlines()) == 1
    assert "calibration.json" not in os.listdir(tmp_path / "gates")
    assert json.loads(json_file.read_text())["calibration"] is None


def test_validation_measures_others_and_splits_them(arguments, tmp_path, capsys):
    assert calibrate(arguments, "--loss", "answers", "--bound", "0.5", "--validate", "4", "--tasks", "needle") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Held out, 4 documents of ship0, ship1, ship2, ship3: mean loss 0.0000 at 10%" in out
    assert "200 random halves of all 8 documents" in out
    assert "│ documents │ 0.0% │ ≤ 50% │ 0 │ 0.0000 │ 10% (200) │" in out
    assert "│ texts │ 0.0% │ ≤ 50% │ 0 │ 0.0000 │ 10% (200) │" in out


def test_conformal_risk_control_entries_and_another_folder(arguments, tmp_path, capsys):
    flags = ["--loss", "needle", "--bound", "0.25", "--method", "crc", "--budgets", "64", "128"]
    assert calibrate(arguments, *flags, "--out", str(tmp_path / "new")) == 0
    assert "64 entries of the cache" in capsys.readouterr().out
    assert "calibration.json" not in os.listdir(tmp_path / "gates")
    found = RetentionGates.from_pretrained(tmp_path / "new").calibration
    assert found is not None and (found.budget, found.method, found.confidence) == (64, "crc", None)
    assert [row.budget for row in found.table] == [128, 64]


def test_more_documents_than_texts_is_told(arguments, capsys):
    assert calibrate(arguments, "--loss", "needle", "--bound", "0.5", "--cases", "5") == 0
    assert "Several documents share a text: the promise is for further passages of these texts" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_run_over_a_broken_calibration_says_what_to_do(arguments, tmp_path, capsys):
    (tmp_path / "gates" / "calibration.json").write_text("{")
    assert calibrate(arguments) == 1
    assert "remove the file, then `tenure calibrate` makes a new one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--bound", "0.01"], 1, "--cases 4 cannot show a bound of 0.01 even if none loses anything: 69 or more can"),
        (["--bound", "2"], 1, "the bound must be between 0 and the largest loss, 1, got 2.0"),
        (["--loss", "rouge"], 1, "unknown loss 'rouge'; known: kl, answers, needle"),
        (["--tasks", "needles"], 1, "unknown task 'needles'"),
        (["--budgets", "1.5"], 1, "budget 1.5 is out of range"),
        (["--budgets", "0.5", "64"], 2, "takes shares (0.2) or numbers of entries (256), not both"),
        (["--policy", "full"], 1, "policy 'full' evicts nothing"),
        (["--policy", "snapkw"], 1, "unknown policy 'snapkw'"),
        (["--gates", "me/gates"], 1, "'me/gates' is not a folder here: give --out"),
        (["--length", "5000"], 1, "exceed the model's 1024 positions"),
        (["--length", "860"], 1, "none of the 5 texts in"),
        (["--data", "/no/such"], 1, "no file or folder '/no/such'"),
        (["--cases", "0"], 2, "--cases takes 1 or more"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_any_work(flags, code, sentence, arguments, capsys, monkeypatch):
    monkeypatch.setattr("tenure.eval.runner.CaseRunner", None)
    assert calibrate(arguments, "--bound", "0.5", *flags) == code
    _, err = capsys.readouterr()
    assert sentence in " ".join(err.split()).replace("│ ", "").replace(" │", "") and "Traceback" not in err
