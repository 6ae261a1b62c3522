"""Processes that end before their work does."""

from __future__ import annotations

import sys

import pytest

from tenure.eval.sweep import Unit
from tenure.eval.sweep.pool import _Pool

UNITS = [Unit("vt", 256, 0, index) for index in range(3)]


def never(finished) -> None:
    pytest.fail(f"nothing can be finished, but {finished} was")


def test_what_a_process_cannot_load_is_told(tmp_path):
    with pytest.raises(ValueError, match="cpu: invalid literal for int"):
        _Pool(int, ["cpu"], tmp_path).run(UNITS, never)  # type: ignore[arg-type]  # its loading is `int("cpu")`


def test_units_of_processes_that_died_are_returned(tmp_path):
    assert _Pool(sys.exit, ["cpu"], tmp_path).run(UNITS, never) == UNITS
    assert list(tmp_path.iterdir()) == []
