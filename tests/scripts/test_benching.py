"""Benchmark rows: turns are taken, ratios are paired, JSON is JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tenure.scripts.bench.bench_train import attention_rows
from tenure.scripts.bench.benching import BenchRow, alternate, cpu_name, median_ratio, show
from tenure.scripts.output import write_rows


def test_sides_take_turns_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_the_ratio_is_the_median_of_pairs() -> None:
    assert median_ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == 3.0
    with pytest.raises(ValueError):
        median_ratio([1.0], [1.0, 2.0])


def test_rows_are_written_as_strict_json_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [BenchRow("x/T1", 1.0, None, 1.0, "MiB", 1), BenchRow("y", 2.0, 4.0, 2.0, "s", 3, "faster")]
    write_rows(rows, str(tmp_path / "new" / "rows.json"))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads((tmp_path / "new" / "rows.json").read_text(), parse_constant=refuse)
    assert [(row["name"], row["peer"], row["ratio"], row["unit"], row["n"]) for row in read] == [
        ("x/T1", None, 1.0, "MiB", 1),
        ("y", 4.0, 2.0, "s", 3),
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.json"]
    show(rows, "title")
    shown = capsys.readouterr().out
    assert "x/T1" in shown and cpu_name().split("(")[0].split()[0] in shown


def test_the_cpu_is_named_with_its_features() -> None:
    x86 = "processor\t: 0\nmodel name\t: Xeon 8480+\nflags\t\t: fpu avx2 amx_bf16 avx512f\n\nprocessor\t: 1\n"
    assert cpu_name(x86) == "Xeon 8480+ (avx2, avx512f, amx_bf16)"
    assert cpu_name("processor : 0\nFeatures : fp asimd bf16\n").endswith(" (asimd, bf16)")
    assert cpu_name("").endswith(" (features unknown)")


def test_attention_rows_have_the_names_others_read() -> None:
    rows = attention_rows(64, runs=1)
    assert [row.name for row in rows] == ["attention/T64/vs_naive", "attention/T64/vs_sdpa"]
    assert all(row.ours > 0 and row.peer and row.ratio > 0 for row in rows)
