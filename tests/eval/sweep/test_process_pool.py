"""Processes that end before their work does."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

from tenure.eval.sweep import Failure, Unit, process_pool
from tenure.eval.sweep.process_pool import _finish, _Pool

UNITS = [Unit("vt", 256, 0, index) for index in range(3)]


class Failing:
    def run(self, unit: Unit) -> list[Failure]:
        return [Failure.of(unit, None, ValueError("odd"))]


def never(finished) -> None:
    pytest.fail(f"nothing can be finished, but {finished} was")


def test_what_a_process_cannot_load_is_told(tmp_path):
    with pytest.raises(ValueError, match="cpu: invalid literal for int"):
        _Pool(int, ["cpu"], tmp_path).run(UNITS, never)  # type: ignore[arg-type]  # its loading is `int("cpu")`


def test_units_of_processes_that_died_are_returned(tmp_path, monkeypatch):
    modules, results = tmp_path / "modules", tmp_path / "results"
    modules.mkdir()
    results.mkdir()
    (modules / "dies_while_loading.py").write_text("import os\n\ndef prepare(device):\n    os._exit(3)\n")
    monkeypatch.syspath_prepend(modules)  # the new process gets the same path
    prepare = importlib.import_module("dies_while_loading").prepare
    assert _Pool(prepare, ["cpu"], results).run(UNITS, never) == UNITS
    assert list(results.iterdir()) == []


@pytest.mark.parametrize("alive", [True, False])
def test_a_process_that_outlives_its_parent_writes_nothing(tmp_path, monkeypatch, alive):
    """Its unit is run again by the sweep that goes on, perhaps at this moment and into the same file."""
    parent, path = SimpleNamespace(is_alive=lambda: alive), tmp_path / "part-0.jsonl"
    monkeypatch.setattr(process_pool.multiprocessing, "parent_process", lambda: parent)
    if alive:
        assert _finish(Failing(), UNITS[0], path).unit == UNITS[0] and path.is_file()
        return
    with pytest.raises(EOFError, match="the parent is gone"):
        _finish(Failing(), UNITS[0], path)
    assert not path.exists()
