"""A preset by its name, in cells, sweeps, lm-eval and `tenure generate`, keeps what `evict(preset=…)` keeps."""

from __future__ import annotations

import json

import pytest
import torch

from tenure.eval import CaseBuilder, evaluate, parse_cells
from tenure.eviction import evict
from tenure.retention import RetentionGates
from tenure.scripts import cli

from .harness_tools import instance, passage

NAMES = (
    ("trimkv", "retention", 40), ("dbtrimkv", "retention", 40), ("defensivekv", "layer_defensive", 0.45),
    ("defensivekv", "defensive", 0.45), ("defensivekv", "snapkv", 0.45), ("kvpress", "snapkv", 0.45),
    ("kvpress", "keydiff", 0.45),
)  # fmt: skip


@pytest.fixture
def gates(model):
    torch.manual_seed(3)
    return RetentionGates.for_model(model, gate_width=8, init_std=0.5, initial_bias=2.0)


def kept(cache, row=0):
    return [[head.tolist() for head in cache.kept(layer)[row]] for layer in range(len(cache.ragged))]


@torch.no_grad()
def by_evict(model, gates, ids, **options):
    with evict(model, gates=gates, **options) as session:
        cache = session.new_cache()
        session.extend(cache, ids)
        return kept(cache)


@pytest.mark.parametrize(("preset", "policy", "budget"), NAMES)
def test_cells_of_a_preset_keep_what_evict_keeps(model, gates, tokenizer, texts, preset, policy, budget):
    case, found = CaseBuilder(tokenizer, texts, 300).case("needle", 0), []
    cells = parse_cells([f"{policy}+{preset}"], [budget])
    (record,) = evaluate(
        model, tokenizer, [case], cells, gates, inspect=lambda case, cell, cache: found.append(kept(cache))
    )
    expected = by_evict(model, gates, case.context_ids, preset=preset, policy=policy, budget=budget, buffer=0)
    assert found == [expected]
    assert record.policy == cells[0].name and record.policy.endswith(f"+{preset}")
    ours = by_evict(model, gates, case.context_ids, policy=policy, budget=budget)
    assert expected != ours, "so that a preset that was not applied would be seen"


@pytest.mark.parametrize(("preset", "policy", "budget"), NAMES)
def test_lm_eval_keeps_what_evict_keeps_and_says_so(model, gates, tokenizer, preset, policy, budget):
    pytest.importorskip("lm_eval")
    from tenure.eval.harness.model import model_class

    found = []
    subject = model_class()(
        pretrained=model, tokenizer=tokenizer, batch_size=1, preset=preset, policy=policy, budget=budget,
        gates=gates if policy == "retention" else None, question="agnostic", question_pattern=r"\nWhat ", buffer=0,
    )  # fmt: skip
    compressed = subject.meter.compressed

    def noting(cache, lengths):
        found.append(kept(cache))
        compressed(cache, lengths)

    subject.meter.compressed = noting
    context, question = passage(1, 120), "\nWhat did the crew write?"
    request = instance("generate_until", (context + question, {"until": [], "max_gen_toks": 3, "do_sample": False}))
    subject.generate_until([request])
    ids = tokenizer(context + question)["input_ids"]
    shared = tokenizer(context)["input_ids"]
    assert ids[: len(shared)] == shared, "a plain boundary"
    assert found == [by_evict(model, gates, shared, preset=preset, policy=policy, budget=budget, buffer=0)]
    shown = subject.options.to_dict()
    assert shown["preset"] == preset and shown["scope"] != "none"


def run_generate(folder, capsys, *arguments):
    assert cli.main(["generate", "--model", str(folder), "--device", "cpu", "--raw", *arguments]) == 0
    shown = capsys.readouterr().err
    entries = shown.split("entries kept")[1].split("of")[0]
    evictions = shown.split(" in ")[1].split(" evictions")[0]
    return int("".join(filter(str.isdigit, entries))), int(evictions)


def test_generate_takes_presets_by_name(model, gates, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    gates.save_pretrained(tmp_path / "gates")
    (tmp_path / "prompt.txt").write_text(passage(1, 120))
    n, segments = len(tokenizer(passage(1, 120))["input_ids"]), 3 * 2
    plain = ["--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "4", "--gates", str(tmp_path / "gates")]
    folder = tmp_path / "model"
    written = run_generate(folder, capsys, *plain, "--policy", "full")[0] // segments - n
    for policy in ("layer_defensive", "defensive"):
        named = [*plain, "--preset", "defensivekv", "--policy", policy, "--budget", "0.45"]
        total = int(n * 0.45 * segments) if policy == "layer_defensive" else 3 * int(n * 0.45 * 2)
        assert run_generate(folder, capsys, *named) == (total + segments * written, 1), "once, rounded by the group"
    for buffer, entries, evictions in ((200, (n + written) * segments, 0), (8, None, 1)):
        named = [*plain, "--preset", "dbtrimkv", "--budget", str(n - 20), "--buffer", str(buffer)]
        found = run_generate(folder, capsys, *named)
        assert found[1] == evictions and found[0] == (entries or (n - 20 + written) * segments)
    assert cli.main(["generate", "--prompt", "x", "--preset", "trimkv", "--sinks", "4"]) == 1
    assert "preset 'trimkv' has sinks=0, got 4" in capsys.readouterr().err


def test_a_sweep_takes_presets_by_name(model, tokenizer, texts, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    (tmp_path / "sweep.yaml").write_text(
        f"model: {tmp_path / 'model'}\ndata: {tmp_path / 'text.txt'}\nbudgets: [0.45]\ntasks: [dialogue]\n"
        "policies: [full, layer_defensive, snapkv+kvpress]\npreset: defensivekv\nlengths: [600]\ncases: 1\n"
        f"output: {tmp_path / 'out'}\n"
    )
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--devices", "cpu"]) == 0
    (part,) = (tmp_path / "out").glob("part-*.jsonl")
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    assert [row["policy"] for row in rows] == ["full", "layer_defensive+defensivekv", "snapkv+kvpress"]
    assert rows[1]["entries"] == int(600 * 0.45 * 6) and rows[2]["entries"] == int(600 * 0.45) * 6
