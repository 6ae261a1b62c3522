"""The step graph's page runs as printed, and shows what the code draws."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def texts(svg: str) -> list[str]:
    """Names and steps; expected times depend on how long the snippet takes."""
    found = ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    return sorted(text.split(" · ")[0] for text in found if not text.startswith("reuse"))


def test_the_snippet_of_the_step_graph_runs_and_draws_the_picture() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "concepts" / "step-graph.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(next(code for code in blocks if "StepGraph()" in code), names)  # our own documentation
    graph = names["graph"]
    assert [graph.next_steps(name) for name in ("search", "coder", "writer", "editor")] == [0, 0, 1, 3]
    assert texts(names["svg"]) == texts((DOCS / "images" / "steps.svg").read_text())
