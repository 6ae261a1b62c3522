"""A sweep's folder after a kill at any byte, with other settings, and beside another process."""

from __future__ import annotations

import gzip
import json

import pytest

from tenure.eval.sweep import Failure, SweepFolder, Unit
from tenure.eval.sweep.sweep_folder import append_unit, part_path, read_settings, read_units

from ..made import made

CELLS = [["knorm", "head", 0.2, False], ["knorm", "head", 0.5, False]]
SETTINGS = {"cells": CELLS, "sweep": {"budgets": [0.2, 0.5], "cases": 3}, "versions": {"torch": "2"}}


def unit(index: int) -> Unit:
    return Unit("vt", 256, 0, index)


def lines_of(index: int) -> list:
    return [made(index=index, budget=0.2, prediction="naïve\n1"), made(index=index, budget=0.5, score=0.5)]


def test_a_kill_at_any_byte_loses_at_most_the_last_unit(tmp_path):
    part = part_path(tmp_path, 0)
    ends = []
    with SweepFolder(tmp_path, SETTINGS):
        for index in range(3):
            append_unit(part, lines_of(index))
            ends.append(part.stat().st_size)
    settings = (tmp_path / "settings.json").read_bytes()
    whole = part.read_bytes()
    near = {end + step for end in [0, *ends] for step in (-2, -1, 0, 1)}
    for cut in sorted({*range(0, len(whole), 97), *near} & set(range(len(whole) + 1))):
        part.write_bytes(whole[:cut])
        with SweepFolder(tmp_path, SETTINGS) as store:
            complete = sum(end <= cut for end in ends)
            assert store.done == {unit(index) for index in range(complete)}
            assert part.read_bytes() == whole[: [0, *ends][complete]], "nothing of a unit that was cut short is left"
            for index in range(complete, 3):
                append_unit(part, lines_of(index))
        assert part.read_bytes() == whole
        (tmp_path / "settings.json").write_bytes(settings)  # without the session


def test_other_settings_are_refused_and_named(tmp_path):
    with SweepFolder(tmp_path, SETTINGS, {"devices": ["cpu"]}):
        append_unit(part_path(tmp_path, 0), lines_of(0))
    with SweepFolder(tmp_path, SETTINGS, {"devices": ["cuda:0"]}) as store:  # where it runs may change
        assert store.done == {unit(0)}
    assert [one["devices"] for one in read_settings(tmp_path)["sessions"]] == [["cpu"], ["cuda:0"]]
    for changed, message in [
        (SETTINGS | {"sweep": {"budgets": [0.2, 0.5], "cases": 4}}, "sweep.cases was 3 and is now 4"),
        (SETTINGS | {"versions": {"torch": "3"}}, r'versions.torch was "2" and is now "3"'),
        (SETTINGS | {"gates": None, "sweep": {}}, "sweep.budgets was .* and is now null"),
    ]:
        with pytest.raises(ValueError, match=rf"was begun with other settings, {message}: give another --output"):
            SweepFolder(tmp_path, changed).__enter__()
    with SweepFolder(tmp_path, SETTINGS):
        pass  # a refusal leaves neither a lock nor anything else behind


def test_only_one_sweep_writes(tmp_path):
    with SweepFolder(tmp_path, SETTINGS), pytest.raises(ValueError, match="another sweep writes to"):
        SweepFolder(tmp_path, SETTINGS).__enter__()


def test_what_no_sweep_wrote_is_named(tmp_path):
    part_path(tmp_path, 0).write_text("{}\n")
    with pytest.raises(ValueError, match=r"has records but no settings.json"):
        SweepFolder(tmp_path, SETTINGS).__enter__()
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match=r"settings.json does not hold a sweep's settings"):
        SweepFolder(tmp_path, SETTINGS).__enter__()
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(ValueError, match=r"part-0.jsonl, line 1, is not a sweep's record"):
        SweepFolder(tmp_path, SETTINGS).__enter__()


def test_parts_are_read_together_and_no_unit_counts_twice(tmp_path):
    with SweepFolder(tmp_path, SETTINGS):
        append_unit(part_path(tmp_path, 0), lines_of(0))
        append_unit(part_path(tmp_path, 1), lines_of(1))
        append_unit(part_path(tmp_path, 10), lines_of(0))
    with SweepFolder(tmp_path, SETTINGS) as store:
        assert store.done == {unit(0), unit(1)}
    assert part_path(tmp_path, 10).read_bytes() == b""


def test_a_compressed_part_counts_and_is_read_to_its_end(tmp_path):
    with SweepFolder(tmp_path, SETTINGS):
        append_unit(part_path(tmp_path, 0), lines_of(0))
        append_unit(part_path(tmp_path, 0), lines_of(1))
    packed = tmp_path / "part-0.jsonl.gz"
    packed.write_bytes(gzip.compress(part_path(tmp_path, 0).read_bytes()))
    part_path(tmp_path, 0).unlink()
    kept = packed.read_bytes()
    with SweepFolder(tmp_path, SETTINGS) as store:
        assert store.done == {unit(0), unit(1)} and packed.read_bytes() == kept
        append_unit(part_path(tmp_path, 0), lines_of(1))
        append_unit(part_path(tmp_path, 0), lines_of(2))
    with SweepFolder(tmp_path, SETTINGS) as store:  # a unit that both have is kept in one
        assert store.done == {unit(0), unit(1), unit(2)}
    units, clean = read_units(packed, len(CELLS))
    assert list(units) == [unit(0)] and clean
    assert read_units(part_path(tmp_path, 0), len(CELLS))[0].keys() == {unit(1), unit(2)}
    for broken in (kept[:-9], b"no gzip", kept[:20] + b"xx" + kept[22:]):
        packed.write_bytes(broken)
        with pytest.raises(ValueError, match=r"part-0.jsonl.gz cannot be unpacked"):
            SweepFolder(tmp_path, SETTINGS).__enter__()
        assert packed.read_bytes() == broken, "what cannot be read is left alone"


def test_a_unit_that_stands_twice_in_a_part_counts_once(tmp_path):
    """Written by a process that outlived its parent, and by the one of the sweep that went on."""
    part = part_path(tmp_path, 0)
    with SweepFolder(tmp_path, SETTINGS):
        for index in (0, 1, 0):
            append_unit(part, lines_of(index))
    assert read_units(part, len(CELLS))[0].keys() == {unit(0), unit(1)}
    with SweepFolder(tmp_path, SETTINGS) as store:
        assert store.done == {unit(0), unit(1)}
    assert len(part.read_text().splitlines()) == 2 * len(CELLS)


def test_failures_complete_a_unit_and_can_be_retried(tmp_path):
    whole = Failure.of(unit(1), None, RuntimeError("no memory\nwith details"))
    cell = Failure("vt", 256, 0, 2, "ValueError: odd", "", "knorm", "head", 0.5, False)
    part = part_path(tmp_path, 0)
    with SweepFolder(tmp_path, SETTINGS):
        append_unit(part, lines_of(0))
        append_unit(part, [whole])
        append_unit(part, [lines_of(2)[0], cell])
    with SweepFolder(tmp_path, SETTINGS) as store:
        assert store.done == {unit(0), unit(1), unit(2)}
        assert store.failures() == [whole, cell]
        assert [one.name for one in store.failures()] == [
            "vt, 256 tokens, seed 0, case 1", "vt, 256 tokens, seed 0, case 2, knorm:head at 0.5"
        ]  # fmt: skip
        assert whole.error == "RuntimeError: no memory"
    with SweepFolder(tmp_path, SETTINGS, retry_failed=True) as store:
        assert store.done == {unit(0)} and store.failures() == []
    units, clean = read_units(part, 2)
    assert list(units) == [unit(0)] and clean
