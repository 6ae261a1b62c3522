"""A short soak of training: an interrupted run ends as one without interruptions, and other results are found."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from tenure.scripts.soak.run_train_soak import TrainSoak, fill, last_step, results, saved_step, small_disk


def write_run(folder: Path, step: int, loss: float) -> None:
    """Files of a finished run."""
    for name, content in {
        "gates/gates.safetensors": b"gates", f"checkpoints/step-{step:08d}/state.json": b"{}",
        "checkpoints/step-00000003/state.json": b"{}",
        "metrics.jsonl": json.dumps({"step": step, "loss": loss, "tokens_per_s": id(folder)}).encode() + b"\n",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_results_are_files_and_losses_without_times(tmp_path: Path) -> None:
    for name, step, loss in (("a", 6, 1.0), ("b", 6, 1.0), ("loss", 6, 2.0), ("step", 9, 1.0)):
        write_run(tmp_path / name, step, loss)
    expected = results(tmp_path / "a")
    assert results(tmp_path / "b") == expected
    assert {name for name, value in results(tmp_path / "loss").items() if expected[name] != value} == {"metrics.jsonl"}
    assert set(results(tmp_path / "step")) != set(expected)
    assert saved_step(tmp_path / "step") == last_step(tmp_path / "step") == 9
    assert saved_step(tmp_path / "none") == last_step(tmp_path / "none") == 0


def test_a_large_disk_is_not_filled(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).total <= 1 << 30:
        pytest.skip("temporary files are on a small disk here")
    with pytest.raises(ValueError, match="accepted: a folder on a file system of at most 1 GiB"), small_disk(tmp_path):
        pass


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """The disk is full at some moment; the next launch has space again."""
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(None))
        except ValueError as error:  # no file system can be mounted here
            pytest.skip(str(error))
        soak = TrainSoak("ddp", 20, disk, tmp_path / "logs", Random(3), faults=("full",))
        soak.reference()
        while not soak.run(1):
            pass
        assert soak.counts["ddp: full"] == 1 and soak.counts["ddp: launches"] >= 2
        fill(disk / "filler", 5000)
        assert shutil.disk_usage(disk).free <= 2 << 12
