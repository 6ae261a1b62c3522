"""The report's page in a real browser: silent, alone with its file, and readable on a desktop and on a phone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tenure.eval import Record
from tenure.eval.report import compare_runs, load_run, report_page
from tenure.eval.sweep import Failure

from ...browser import find_chromium, open_browser
from ..made import made

NASTY = '</title><script>alert(1)</script><img src="https://example.org/x.png" onerror="alert(2)">'
POLICIES = (
    "retention", "layer_defensive", "expected_attention", "retention_defensive", "snapkv", "tova", "h2o", "knorm",
    "keydiff", "random",
)  # fmt: skip
TASKS = ("niah_multivalue", "repetition", "vt")

# Texts of a chart that lie on one another, or that the chart's edge cuts off.
OVERLAPS = """
[...document.querySelectorAll('.charts svg')].flatMap(svg => {
  const edge = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([name, a], i) => [
    ...(a.left < edge.left - 1 || a.right > edge.right + 1 || a.top < edge.top - 1 || a.bottom > edge.bottom + 1
      ? [name + ' is cut off'] : []),
    ...boxes.slice(i + 1)
      .filter(([, b]) => a.left < b.right && b.left < a.right && a.top < b.bottom - 3 && b.top < a.bottom - 3)
      .map(([other]) => name + ' lies on ' + other)]);
})
"""
# Words of table cells that stick out of their cell.
SPILLED = """
[...document.querySelectorAll('th, td')].filter(cell => cell.scrollWidth > cell.clientWidth + 1)
  .map(cell => cell.textContent)
"""


def records(better: float = 0.0) -> list[Record]:
    found = []
    for place, policy in enumerate(("full", *POLICIES)):
        for budget in (1.0,) if policy == "full" else (0.5, 0.2):
            for task in TASKS:
                for index in range(4):
                    right = (place * 7 + index * 3) % 10 / 10 < budget + better
                    size = int(12_000_000 * budget * (1.05 if "retention" in policy else 1))
                    kl = 0.0 if policy == "full" else 0.02 * (place + 1) / budget
                    found.append(made(task=task, index=index, policy=policy, budget=budget, score=float(right), kl=kl,
                                      scope="none" if policy == "full" else "global", bytes=size))  # fmt: skip
    return found


def write_run(folder: Path, made_records: list[Record]) -> Path:
    folder.mkdir(parents=True)
    cells = list(dict.fromkeys((one.policy, one.scope, one.budget, one.aware) for one in made_records))
    settings = {"cells": cells, "units": 14, "model": {"id": NASTY}, "sweep": {"tasks": TASKS}}
    (folder / "settings.json").write_text(json.dumps(settings))
    lines = sorted((one.to_dict() for one in made_records), key=lambda line: (line["task"], line["index"]))
    lines.append(Failure("vt", 256, 0, 99, f"ValueError: {NASTY}", f"Traceback {NASTY}").to_dict())
    (folder / "part-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = [load_run(write_run(folder / "a b", records())), load_run(write_run(folder / "b#1", records(0.3)))]
    path = folder / "report.html"
    path.write_text(report_page(runs, compare_runs(*runs), folder))
    return path


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed: apt-get install chromium")
def test_the_page_loads_alone_and_is_readable(page, tmp_path):
    with open_browser(tmp_path / "profile") as browser:
        for width in (1280, 400):
            browser.load(page, width)
            assert [url for url in browser.requests() if not url.startswith("data:")] == [page.as_uri()]
            assert browser.complaints() == []
            assert browser.evaluate("document.scripts.length + document.images.length") == 0
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate(OVERLAPS) == []
            assert browser.evaluate(SPILLED) == []
            assert browser.evaluate("document.querySelectorAll('.charts svg').length") == 4
            browser.screenshot(tmp_path / f"{width}.png")
            assert (tmp_path / f"{width}.png").read_bytes().startswith(b"\x89PNG")
        links = browser.evaluate("[...document.querySelectorAll('section[id$=raw] a')].map(a => a.href)")
        assert links[0] == Path(page.parent, "a b", "settings.json").as_uri()
        assert links[-1] == Path(page.parent, "b#1", "part-0.jsonl").as_uri()
        anchors = "[...document.querySelectorAll('nav a')].map(a => document.querySelector(a.hash) !== null)"
        assert browser.evaluate(anchors) == [True] * 15


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed: apt-get install chromium")
def test_the_browser_would_see_a_request_and_an_error(tmp_path):
    """What the test above relies on."""
    path = tmp_path / "bad.html"
    path.write_text('<script src="http://127.0.0.1:9/x.js"></script><script>oh no</script>')
    with open_browser(tmp_path / "profile") as browser:
        browser.load(path, 800)
        assert "http://127.0.0.1:9/x.js" in browser.requests()
        methods = {event["method"] for event in browser.complaints()}
        assert {"Runtime.exceptionThrown", "Network.loadingFailed"} <= methods
