"""The needle grid: means by depth and length, its score, and what stays out of it."""

from __future__ import annotations

from tenure.eval.report.markdown import _grid
from tenure.eval.report.needle_grid import needle_grids
from tenure.eval.report.page import needle_grid_table

from ..made import made


def records():
    needle = {"task": "niah_single_2", "policy": "snapkv"}
    return [
        made(**needle, length=512, depth=0.05, score=1.0, index=0),
        made(**needle, length=512, depth=0.08, score=0.0, index=1),
        made(**needle, length=512, depth=0.99, score=1.0, index=2),
        made(**needle, length=1024, depth=1.0, score=0.0),
        made(**needle, length=1024, depth=0.5, score=1.0, aware=True),
        made(task="vt", length=1024, depth=0.5, score=1.0),
        made(task="niah_single_2", policy="full", scope="none", budget=1.0, length=512, depth=0.5, score=1.0),
        made(task="niah_multikey_1", length=512, depth=0.5, score=1.0),
    ]


def test_cells_are_means_and_the_score_is_the_mean_of_the_cells():
    full, grid = needle_grids(records())
    assert (full.method, full.score) == (("full", "none"), 1.0)
    assert grid.cells == {(0, 512): 0.5, (9, 512): 1.0, (9, 1024): 0.0} and grid.cases == 4
    assert grid.score == 0.5 and grid.kind == "single needle", "several needles have one length only"


def test_it_is_written_as_a_heat_map_and_as_markdown():
    grid = needle_grids(records())[1]
    html, text = needle_grid_table(grid), _grid(grid)
    assert "SnapKV, 20% kept: score 0.500, 4 cases" in html and html.count("<tr>") == 11
    assert html.count('class="none"') == 17 and "#084081" in html
    assert text.splitlines()[0] == "| single needle: SnapKV, 20% kept | 512 | 1024 |"
    assert text.splitlines()[2] == "| 0–10 % | 0.50 | – |" and text.splitlines()[11] == "| 90–100 % | 1.00 | 0.00 |"
