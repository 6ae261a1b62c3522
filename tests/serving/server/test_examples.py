"""The agents' examples run as their READMEs say: at a tiny server, and measured with the demo's model."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_openai")
pytest.importorskip("agents")

ROOT = Path(__file__).parents[3]
TEAMS = {
    "langgraph_agents": ["planner", "experts", "experts", "writer", "critic", "writer", "critic"],
    "openai_agents": ["triage", "specialist", "specialist", "reviewer", "specialist"],
}
GROUPS = {
    **dict.fromkeys(["budgets", "tiers", "step_graph", "simulator"], "experts"),
    **dict.fromkeys(["compress", "train", "evaluate", "serve"], "specialist"),
}


def commands(example: str) -> list[list[str]]:
    """The Python commands of an example's README: the measurement first."""
    text = (ROOT / "examples" / example / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python ")]
    return sorted((shlex.split(line)[1:] for line in lines), key=len)


def run(arguments: list[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    command = [sys.executable, "-W", "error::UserWarning:tenure", *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


@pytest.mark.parametrize("example", TEAMS)
def test_an_example_runs_at_a_server(example, served, monkeypatch):
    calls: list[Any] = []
    submit = served.client.submit

    def record(request: Any, *rest: Any) -> Any:
        calls.append(request)
        return submit(request, *rest)

    monkeypatch.setattr(served.client, "submit", record)
    command = [served.url if word == "http://127.0.0.1:8000/v1" else word for word in commands(example)[-1]]
    shown = run([*command, "--questions", "1", "--model", "tiny", "--characters", "200", "--tokens", "2"])
    assert shown.count("?\n  ") == 2, "two questions with their answers"
    assert [GROUPS.get(call.agent, call.agent) for call in calls] == TEAMS[example] * 2
    (workflow,) = [each for each in served.system.graph if each.name != "learned"]
    assert {call.workflow for call in calls} == {workflow.name}
    assert workflow.accuracy > 0.9, "calls are those that the step graph expects; one may come before an end is counted"


@pytest.mark.real
@pytest.mark.timeout(900)  # two servers of the demo's model
@pytest.mark.parametrize("example", TEAMS)
def test_an_example_measures_what_the_step_graph_saves(example, tmp_path):
    command, found = commands(example)[0], tmp_path / "found.json"
    small = ["--questions", "1", "--characters", "800", "--tokens", "2"]
    shown = run([*command, *small, "--json", str(found)])
    lru, aware = json.loads(found.read_text())
    assert (lru["system"], aware["system"]) == ("lru_reactive", "expected_time")
    for each in (lru, aware):
        assert each["makespan_s"] > 0 and each["moved_bytes"] == 0
        assert each["computed_tokens"] + each["cached_tokens"] == pytest.approx(
            lru["computed_tokens"] + lru["cached_tokens"], rel=0.05
        )
    assert f"{lru['makespan_s'] / aware['makespan_s']:.2f} times as fast" in shown
    assert "room for 50% of the agents' prompts" in shown
