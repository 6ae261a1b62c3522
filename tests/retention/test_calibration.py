"""calibration.json beside the gates: what comes back, what is refused, and that it never belongs to other gates."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tenure.retention import Calibration, CheckpointError, RetentionGates, TriedBudget
from tenure.retention.calibration import weights_digest
from tenure.retention.checkpoint import CALIBRATION_FILE, CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture
def gates(tiny_llama: PreTrainedModel) -> RetentionGates:
    torch.manual_seed(0)
    gates = RetentionGates.for_model(tiny_llama, gate_width=16)
    table = (TriedBudget(0.5, 0.01, 1e-4, True), TriedBudget(0.2, 0.2, 0.5, False))
    gates.calibration = Calibration(
        budget=0.5, loss="kl", bound=0.2, max_loss=1.0, confidence=0.9, method="ltt", policy="retention",
        scope="global", floor=0.0, sinks=4, recent=32, model="tiny", dtype="float32", tasks=("needle",),
        lengths=(300, 400), cases=60, documents=5, data="demo: a, b", seed=0,
        weights=weights_digest(gates.state_dict()), table=table,
    )  # fmt: skip
    return gates


@pytest.fixture
def folder(gates: RetentionGates, tmp_path: Path) -> Path:
    gates.save_pretrained(tmp_path / "gates")
    return tmp_path / "gates"


def rewrite(folder: Path, **values: Any) -> None:
    path = folder / CALIBRATION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_round_trip(gates: RetentionGates, folder: Path) -> None:
    assert sorted(os.listdir(folder)) == [CALIBRATION_FILE, WEIGHTS_FILE, CONFIG_FILE]
    loaded = RetentionGates.from_pretrained(folder)
    assert loaded.calibration == gates.calibration
    assert loaded.calibration is not None and loaded.calibration.promise == (
        "mean KL to the full cache (at most 1 nats a case) at most 0.2 with confidence 0.9, for documents of 300 to "
        "400 tokens"
    )
    (folder / CALIBRATION_FILE).unlink()
    assert RetentionGates.from_pretrained(folder).calibration is None


def test_entries_and_conformal_risk_control_come_back_as_they_were(gates: RetentionGates, tmp_path: Path) -> None:
    assert gates.calibration is not None
    rows = (TriedBudget(256, 0.0, 0.05, True),)
    given = replace(gates.calibration, budget=256, table=rows, method="crc", confidence=None, loss="answers", bound=0.1)
    gates.calibration = given
    gates.save_pretrained(tmp_path)
    found = RetentionGates.from_pretrained(tmp_path).calibration
    assert found is not None and found == given and type(found.budget) is int
    assert found.promise == "share of answers lost (needle) at most 0.1 on average, for documents of 300 to 400 tokens"


def test_it_goes_along_in_bf16(gates: RetentionGates, tmp_path: Path) -> None:
    gates.save_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = RetentionGates.from_pretrained(tmp_path)
    assert loaded.calibration == gates.calibration and not torch.equal(loaded.weight, gates.weight)


def test_gates_trained_on_do_not_take_it_along(gates: RetentionGates, folder: Path, caplog) -> None:
    with torch.no_grad():
        gates.bias.add_(1.0)
    gates.save_pretrained(folder)  # over the calibrated ones, whose calibration goes too
    assert "calibration was measured on other weights and is not saved" in caplog.text
    assert sorted(os.listdir(folder)) == [WEIGHTS_FILE, CONFIG_FILE]
    assert RetentionGates.from_pretrained(folder).calibration is None


def test_gates_without_one_remove_an_older_one(gates: RetentionGates, folder: Path) -> None:
    gates.calibration = None
    gates.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == [WEIGHTS_FILE, CONFIG_FILE]


def test_a_calibration_of_other_gates_is_refused(gates: RetentionGates, folder: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        gates.weight.mul_(2.0)
    gates.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / CALIBRATION_FILE).write_bytes((folder / CALIBRATION_FILE).read_bytes())
    with pytest.raises(CheckpointError, match=r"calibration.json was measured on other gates .* remove the file"):
        RetentionGates.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[" * 5000, "nested too deeply|Expecting value"),
        ("[]", "got a list as the document; accepted: a mapping"),
        ("{}", "the document lacks schema_version"),
        ('{"schema_version": "1"}', "got '1' as schema_version; accepted: a whole number of 1 or more"),
        ('{"schema_version": 99}', "schema version 99; this version of tenure reads up to 1"),
        ('{"schema_version": 1, "shade": 3}', "got unknown fields shade; accepted: budget, loss, bound"),
    ],
)
def test_a_broken_file_is_one_clear_error(folder: Path, text: str, message: str) -> None:
    (folder / CALIBRATION_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=f"calibration.json cannot be used: .*({message}).*; remove the file"):
        RetentionGates.from_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 0.2}, "got 0.2 as budget; accepted: one that the table has as accepted"),  # tried and refused
        ({"budget": 1.5}, "got 1.5 as budget"),
        ({"budget": True}, "got True as budget"),
        ({"bound": 1.0}, "got 1.0 as bound; accepted: a number below max_loss"),
        ({"bound": "low"}, "got 'low' as bound; accepted: a number above 0"),
        ({"max_loss": float("nan")}, "got NaN; accepted: a finite number"),
        ({"confidence": 1.0}, "got 1.0 as confidence; accepted: a number above 0 and below 1"),
        ({"confidence": None}, "got nothing as confidence of method 'ltt'"),
        ({"method": "guess"}, "got 'guess' as method; accepted: ltt, crc"),
        ({"policy": 3}, "got 3 as policy; accepted: text"),
        ({"sinks": -1}, "got -1 as sinks; accepted: a whole number of 0 or more"),
        ({"cases": 0}, "got 0 as cases"),
        ({"lengths": [512]}, "got a list of 1 as lengths; accepted: a list of 2"),
        ({"lengths": 512}, "got 512 as lengths; accepted: a list of 2"),
        ({"table": [{"budget": 0.5}]}, r"table\[0\] lacks mean_loss, statistic, accepted; accepted fields: budget"),
        ({"table": [3]}, r"got 3 as table\[0\]; accepted: a mapping of budget"),
        ({"table": []}, "got 0.5 as budget; accepted: one that the table has as accepted"),
    ],
)
def test_nonsense_in_it_is_named(folder: Path, values: dict[str, Any], message: str) -> None:
    rewrite(folder, **values)
    with pytest.raises(CheckpointError, match=f"calibration.json cannot be used: .*{message}"):
        RetentionGates.from_pretrained(folder)
