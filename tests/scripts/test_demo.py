"""The demo from end to end on a tiny model: numbers, files, and one sentence for what cannot work."""

from __future__ import annotations

import html.parser
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tenure.retention import RetentionGates
from tenure.scripts import demo
from tenure.scripts.demo import DemoConfig, DemoPlan, main

NASTY = 'He wrote </script><img src=x onerror="alert(1)"> & left it there. '
TEXT = NASTY + " ".join(f"On day {day} the crew wrote down what the weather was like." for day in range(150))
ROW = {
    "task", "length", "policy", "scope", "budget", "aware", "accuracy", "ci_low", "ci_high", "n", "kl", "entries",
    "bytes", "seconds",
}  # fmt: skip


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
def config(tiny_model, tokenizer, tmp_path) -> DemoConfig:
    """A folder with a model, gates for it and a text, and a configuration that names them."""
    model = tiny_model("llama", vocab_size=512, max_position_embeddings=1024)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    RetentionGates.for_model(model, gate_width=8, initial_bias=3.0).save_pretrained(tmp_path / "gates")
    (tmp_path / "text.txt").write_text(TEXT)
    return DemoConfig(
        model=str(tmp_path / "model"), gates=str(tmp_path / "gates"), data=str(tmp_path / "text.txt"), length=450,
        cases=2, train_steps=0, out=tmp_path / "out",
    )  # fmt: skip


def change(config: DemoConfig, **changes: Any) -> DemoConfig:
    return replace(config, **changes)


class Page(html.parser.HTMLParser):
    """Collects what a browser would load and what it would run or show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str | None] = []
        self.data = ""
        self._json = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self._json = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag):
        self._json = False

    def handle_data(self, data):
        if self._json:
            self.data += data


def test_the_demo_writes_its_numbers_its_pictures_and_trains(config, capsys):
    assert main(change(config, train_steps=1)) == 0
    shown = capsys.readouterr().out
    assert "20% of the cache kept" in shown and "AdaKV" in shown and "retention answers" in shown

    results = json.loads((config.out / "results.json").read_text())
    rows = results["rows"]
    assert all(set(row) == ROW for row in rows)
    assert len(rows) == 3 * 9 and {row["n"] for row in rows} == {2}
    assert {(row["policy"], row["scope"]) for row in rows} >= {("full", "none"), ("retention", "global")}
    assert len(results["records"]) == 2 * len(rows)
    full = [row for row in rows if row["policy"] == "full"]
    assert all(row["kl"] < 1e-9 and row["entries"] == 6 * 450 for row in full)
    assert all(row["entries"] == 6 * 90 for row in rows if row["policy"] != "full")
    settings = results["settings"]
    assert settings["config"]["seed"] == 0 and settings["plan"]["cases"] == 2
    assert set(settings["versions"]) == {"tenure", "torch", "transformers", "python"}

    assert (config.out / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert (config.out / "training" / "gates" / "gates.safetensors").is_file()
    assert sorted(path.name for path in config.out.iterdir()) == ["kept.html", "kept.png", "results.json", "training"]


def test_the_page_is_self_contained_and_escaped(config, tokenizer):
    main(change(config, tasks=("needle",), data=_nasty(config)))
    text = (config.out / "kept.html").read_text()
    page = Page(text)
    assert page.addresses == ["data:,"]
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    data = json.loads(page.data)
    assert "</script><img src=x onerror=" in "".join(data["texts"])  # shown as text, never as markup
    assert len(data["texts"]) == 450
    labels = [policy["label"] for policy in data["policies"]]
    assert labels == ["retention (global)", "AdaKV (no floor)", "SnapKV"]
    start, end = data["facts"][0]
    assert data["answer"] in "".join(data["texts"][start:end])
    for policy in data["policies"]:
        kept = sum(bin(int(mask, 16)).count("1") for mask in policy["masks"])
        assert len(policy["masks"]) == 450 and kept == 540
        assert policy["share"] == pytest.approx(0.2)


def _nasty(config: DemoConfig) -> str:
    path = Path(config.data).with_name("nasty.txt")
    path.write_text(NASTY * 60)
    return str(path)


def test_runs_with_the_same_seed_agree(config):
    small = change(config, tasks=("needle",), policies=("full", "retention", "random"))
    runs = []
    for out in ("a", "b"):
        main(change(small, out=config.out / out))
        rows = json.loads((config.out / out / "results.json").read_text())["rows"]
        runs.append([{name: value for name, value in row.items() if name != "seconds"} for row in rows])
    assert runs[0] == runs[1]


def test_full_adds_lengths_budgets_a_task_and_markdown(config, monkeypatch):
    monkeypatch.setattr(demo, "FULL_LENGTHS", (450, 500))
    main(change(config, full=True, cases=1, tasks=("needle",), policies=("full", "retention", "knorm")))
    rows = json.loads((config.out / "results.json").read_text())["rows"]
    assert {row["length"] for row in rows} == {450, 500}
    assert {row["task"] for row in rows} == {"needle", "date"}
    assert {row["budget"] for row in rows} == {1.0, 0.5, 0.2, 0.1}
    text = (config.out / "results.md").read_text()
    assert text.count("| retention (global) |") == 6


def test_quick_only_lowers():
    assert DemoPlan.of(DemoConfig(quick=True)).cases == 5
    assert DemoPlan.of(DemoConfig(quick=True, cases=3, train_steps=0)).cases == 3
    assert DemoPlan.of(DemoConfig(quick=True, train_steps=0)).train_steps == 0
    assert DemoPlan.of(DemoConfig(full=True)).lengths == (1024, 2048)
    assert DemoPlan.of(DemoConfig()).tasks == ("needle", "phrase", "multikey")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ("snapkw",)}, "unknown policy 'snapkw'; known: "),
        ({"policies": ("snapkv:heads",)}, "unknown scope 'heads'"),
        ({"tasks": ("needles",)}, "unknown task 'needles'; known tasks: "),
        ({"budgets": (1.5,)}, r"budget 1.5 is out of range"),
        ({"length": 2000}, r"contexts of 2000 tokens .* exceed the model's 1024 positions"),
        ({"length": 60}, r"a context of 60 tokens is too short"),
        ({"gates": None}, "the shipped gates fit the demo model only: give --gates"),
        ({"gates": "no/such/gates/here"}, "no/such/gates"),
        ({"model": "no/such/model/here"}, "no/such/model"),
        ({"data": "no/such/text"}, "no/such/text"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_any_work(changes, message, config, monkeypatch):
    monkeypatch.setattr("tenure.eval.runner.CaseRunner", None)  # nothing may get as far as running a case
    with pytest.raises(ValueError, match=message):
        main(change(config, **changes))
    assert not (config.out / "results.json").exists()


def test_gates_of_another_model_are_refused(config, tiny_model, tmp_path):
    other = tiny_model("llama", vocab_size=512, num_hidden_layers=2)
    RetentionGates.for_model(other, gate_width=8).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the gates do not fit"):
        main(change(config, gates=str(tmp_path / "other")))


def test_settings_that_exclude_each_other():
    with pytest.raises(ValueError, match="--quick and --full exclude each other"):
        DemoConfig(quick=True, full=True)
    with pytest.raises(ValueError, match="--cases takes 1 or more"):
        DemoConfig(cases=0)
    with pytest.raises(ValueError, match="--threads is 0"):
        DemoConfig(threads=0)
