"""`tenure simulate` from the command line, on a set-up of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tenure.scripts.cli import main

SETUP = """
title: a small ring
machine: {card: a10g, model: llama-3.1-8b, pool_tokens: 2200, link_gb_s: 2, host_gb: 8, scheduler: {max_num_seqs: 4}}
workload: {agents: 4, rounds: 2, fixed_tokens: 1024, dynamic_tokens: 16, output_tokens: 8}
policies: [lru, lru_reactive, ste_prefetch]
repeats: 2
cells:
- {name: one, paper: {lru_reactive: 1.5}, why: It is small.}
- {name: two, workload: {branches: 2}}
"""
FIELDS = {"name", "policy", "makespan_s", "ratio", "hit_rate", "stall_s", "bytes_moved", "bytes_wasted", "ttft_p50_s",
          "ttft_p99_s", "paper_ratio"}  # fmt: skip


@pytest.fixture
def setup(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SETUP)
    return path


def test_cells_are_compared_with_every_baseline(setup: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows_path, plot, trace = tmp_path / "rows.json", tmp_path / "plot.png", tmp_path / "trace.jsonl"
    pictures = ["--plot", str(plot), "--timeline", str(tmp_path / "time.png"), "--record", str(trace)]
    assert main(["simulate", str(setup), "--json", str(rows_path), *pictures]) == 0
    shown = capsys.readouterr().out
    assert "It is small." in shown and "vs lru_reactive (paper)" in shown and "events in" in shown
    rows = json.loads(rows_path.read_text())
    assert len(rows) == 2 * 2 * 3 and all(row.keys() == FIELDS for row in rows)
    papers = [row for row in rows if row["paper_ratio"] is not None]
    assert [(row["name"], row["policy"]) for row in papers] == [("small/one/vs_lru_reactive", "ste_prefetch")]
    assert papers[0]["ratio"] > 1.05 and f"{papers[0]['ratio']:.2f}" in shown and "(1.50)" in shown
    assert all(row["ratio"] == 1.0 for row in rows if row["name"].endswith(f"vs_{row['policy']}"))
    assert plot.stat().st_size > 5000 and (tmp_path / "time.png").stat().st_size > 5000

    assert main(["simulate", str(setup), "--trace", str(trace), "--policies", "ste_prefetch"]) == 0
    assert "recorded makespan" in capsys.readouterr().out


def test_processes_change_the_time_it_takes_and_nothing_else(
    setup: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = []
    for jobs in ("1", "2"):
        assert main(["simulate", str(setup), "--jobs", jobs, "--json", str(tmp_path / jobs)]) == 0
        found.append((json.loads((tmp_path / jobs).read_text()), capsys.readouterr().out))
    (alone, shown), (together, by_two) = found
    assert alone == together
    assert "by 2 processes" in " ".join(by_two.split()) and "processes" not in shown


def test_cells_that_differ_by_a_number_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(SETUP.replace("name: one", "name: draw 1").replace("name: two", "name: draw 2"))
    rows_path = tmp_path / "rows.json"
    assert main(["simulate", str(path), "--repeats", "1", "--json", str(rows_path)]) == 0
    shown = capsys.readouterr().out
    rows = [row for row in json.loads(rows_path.read_text()) if row["name"].endswith("vs_lru_reactive")]
    mine = [row for row in rows if row["policy"] == "ste_prefetch"]
    assert "draw, all" in shown and "1 branches" in shown and "mispredicted" not in shown
    line = next(line for line in shown.splitlines() if "ste_prefetch" in line and "2 all" in line)
    assert f"{(mine[0]['ratio'] * mine[1]['ratio']) ** 0.5:.4f}" in line
    assert f" {sum(row['bytes_moved'] for row in mine) / 1e9:.0f} " in line


def test_a_change_is_made_to_all_cells(setup: Path, tmp_path: Path) -> None:
    seconds = {}
    for change in ("machine.link_gb_s=2", "machine.link_gb_s=1", "workload.branches=1"):
        arguments = ["--policies", "lru_reactive", "--repeats", "1", "--json", str(tmp_path / "rows.json")]
        assert main(["simulate", str(setup), "--set", change, *arguments]) == 0
        rows = [row for row in json.loads((tmp_path / "rows.json").read_text()) if row["policy"] == "lru_reactive"]
        seconds[change] = [row["makespan_s"] for row in rows]
    fast, slow, plain = seconds.values()
    assert slow[0] > 1.1 * fast[0] and slow[-1] > 1.1 * fast[-1]
    assert plain[0] == plain[-1] == fast[0] != fast[-1]


def test_the_study_is_shown_and_written(setup: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [
        "--study",
        "--workflows",
        "2",
        "3",
        "--repeats",
        "1",
        "--cells",
        "one",
        "--json",
        str(tmp_path / "s.json"),
    ]
    assert main(["simulate", str(setup), *arguments, "--plot", str(tmp_path / "s.png")]) == 0
    shown = capsys.readouterr().out
    assert "mispredicted next agents" in shown and "clients that mark all urgent" in shown
    rows = json.loads((tmp_path / "s.json").read_text())
    assert len(rows) == 3 * (5 + 4 + 3 + 4 + 2 + 3) and all(row.keys() == FIELDS for row in rows)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no set-up is named"),
        (["SETUP", "--repeats", "0"], 2, "--repeats accepts 1 or more, not 0"),
        (["SETUP", "--jobs", "0"], 2, "--jobs accepts 1 or more, not 0"),
        (["SETUP", "SETUP", "--study"], 2, "--study and --trace accept one set-up, not 2"),
        (["SETUP", "--cells", "nine"], 1, "no cell of small has 'nine' in its name: one, two"),
        (["SETUP", "--policies", "best"], 1, "unknown policy 'best'"),
        (["absent.yaml"], 1, "absent.yaml"),
        (["SETUP", "--set", "link=2"], 1, "got the change 'link=2'; accepted: machine.KEY=VALUE or workload.KEY=VALUE"),
        (["SETUP", "--set", "workload.tool_s={"], 1, "the change 'workload.tool_s={' is not YAML"),
        (["SETUP", "--set", "machine.scheduler=3"], 1, "as machine.scheduler; accepted: a mapping of max_num_b"),
        (["SETUP", "--set", "machine.scheduler={run: 3}"], 1, "got unknown fields run in machine.scheduler; accepted:"),
        (["SETUP", "--set", "machine.link=2"], 1, "small.yaml: cells[0]: got unknown fields link"),
    ],
)
def test_wrong_flags_are_told(
    setup: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture
) -> None:
    filled = [str(setup) if each == "SETUP" else each for each in arguments]
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            main(["simulate", *filled])
    else:
        assert main(["simulate", *filled]) == code
    assert message in capsys.readouterr().err
