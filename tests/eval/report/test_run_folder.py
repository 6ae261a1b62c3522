"""Runs from their folders: sweeps as far as they are, the demo's results, and other programs' records."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from tenure.eval.report import load_run, report_page, settings_of
from tenure.eval.sweep import Failure, SweepFolder
from tenure.eval.sweep.sweep_folder import append_unit, part_path

from ..made import made

CELLS = [["knorm", "head", 0.5, False], ["knorm", "head", 0.2, False]]
SETTINGS = {"cells": CELLS, "units": 4, "sweep": {"tasks": ["needle", "vt"]}}


def both(**values):
    return [made(budget=0.5, **values), made(budget=0.2, **values)]


def test_an_unfinished_sweep_is_read_as_far_as_it_is_whole(tmp_path):
    whole = Failure("vt", 256, 0, 2, "OSError: gone", "")
    with SweepFolder(tmp_path, SETTINGS, {"devices": ["cpu"]}):
        append_unit(part_path(tmp_path, 1), both(task="needle"))
        append_unit(part_path(tmp_path, 0), both(index=1))
        append_unit(part_path(tmp_path, 0), both(index=0))
        append_unit(part_path(tmp_path, 0), [whole])
        with part_path(tmp_path, 0).open("a") as file:
            file.write(json.dumps(made(index=3).to_dict()) + '\n{"task": "v')
    before = part_path(tmp_path, 0).read_bytes()
    run = load_run(tmp_path)
    assert run.records == [*both(task="needle"), *both(index=0), *both(index=1)], "in the order of the settings"
    assert run.failures == [whole] and (run.done, run.units) == (4, 4)
    assert [path.name for path in run.files] == ["settings.json", "part-0.jsonl", "part-1.jsonl"]
    assert run.sessions == [{"devices": ["cpu"]}] and "sessions" not in run.settings
    assert part_path(tmp_path, 0).read_bytes() == before, "reading changes nothing"
    (tmp_path / "part-0.jsonl.gz").write_bytes(gzip.compress(before))
    part_path(tmp_path, 0).unlink()
    assert load_run(tmp_path).records == run.records


def test_the_demos_results_are_a_run(tmp_path):
    document = {"records": [one.to_dict() for one in both()], "settings": {"model": "tiny"}, "rows": []}
    (tmp_path / "results.json").write_text(json.dumps(document))
    run = load_run(tmp_path)
    assert run.records == both() and run.units is None and run.done == 1


def test_other_programs_need_not_measure_everything(tmp_path):
    line = {"task": "vt", "length": 256, "seed": 0, "index": 0, "policy": "knorm", "scope": "head", "budget": 0.2}
    (tmp_path / "theirs.jsonl").write_text(json.dumps(line | {"score": 1.0, "extra": 1}) + "\n\n")
    run = load_run(tmp_path)
    (record,) = run.records
    assert record.score == 1.0 and record.correct and math.isnan(record.kl)
    (setting,) = settings_of(run.records)
    assert setting.points[("knorm", "head"), 0.2].kl is None
    assert "No KL was measured." in report_page([run], [], tmp_path)
    (tmp_path / "theirs.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"theirs.jsonl: record 1: the document lacks score"):
        load_run(tmp_path)
    (tmp_path / "theirs.jsonl").write_text(json.dumps(line | {"length": "long", "score": "good"}) + "\n")
    with pytest.raises(ValueError, match=r"theirs.jsonl: record 1: got 'long' as length; accepted: a whole number"):
        load_run(tmp_path)
    (tmp_path / "theirs.jsonl").write_text(json.dumps(line | {"score": 1.0}) + "\n")
    refused = {
        "{": "settings.json is not JSON: ",
        "[]": "got a list in .*settings.json; accepted: a ",
        '{"model": {"id": 0.5}}': r"the settings in .* cannot be used: got 0.5 as model.id; accepted: text",
        '{"model": 7}': r"the settings in .* cannot be used: got 7 as model; accepted: ",
    }
    for text, message in refused.items():
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_run(tmp_path)


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no folder 'no/such'; give one that `tenure sweep`"):
        load_run(Path("no/such"))
    with pytest.raises(ValueError, match=r"has neither settings.json with part-\*.jsonl nor results.json"):
        load_run(tmp_path)
    with SweepFolder(tmp_path, SETTINGS):
        part_path(tmp_path, 0).write_text("")
    with pytest.raises(ValueError, match="has no complete case yet"):
        load_run(tmp_path)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "part-0.jsonl").unlink()
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"results.json does not hold the demo's results"):
        load_run(tmp_path)
