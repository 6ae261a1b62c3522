"""Set-ups from YAML, the study, and pictures."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from tenure.serving import Tier
from tenure.serving.simulation.plots import draw_speedups, draw_study, draw_timelines
from tenure.serving.simulation.setup import load_setup, read_setup
from tenure.serving.simulation.simulator import simulate
from tenure.serving.simulation.study import questions_for, run_study
from tenure.serving.simulation.timeline import Timeline

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("kvflow_*.yaml")), ids=lambda path: path.stem)
def test_the_papers_set_ups_are_read(path: Path) -> None:
    setup = load_setup(path)
    others = ["vllm", "lru_reactive"] if path.stem == "kvflow_peer" else [setup.baselines[1]]
    assert list(setup.baselines) == ["lru", *others] and "expected_time" in setup.policies
    assert any(cell.paper for cell in setup.cells)
    assert all(cell.why for cell in setup.cells if cell.paper), "a difference is explained"
    for cell in setup.cells:
        assert cell.machine.bytes_per_token in (128 * 1024, 256 * 1024)


def test_the_slow_link_gives_what_its_parts_say() -> None:
    """A call takes 1.11 s and a load 0.54: hidden loads give 1.48; a third of the prompts kept gives 1.12."""
    setup = load_setup(EXAMPLES / "kvflow_slow_link.yaml")
    cell = setup.cells[0]
    workload = replace(cell.workload, rounds=4)
    seconds = {
        policy: simulate(cell.machine, workload, policy).makespan_s
        for policy in ("lru_reactive", "ste", "ste_prefetch")
    }
    assert seconds["lru_reactive"] / seconds["ste_prefetch"] == pytest.approx(1.48, abs=0.06)
    assert seconds["lru_reactive"] / seconds["ste"] == pytest.approx(1.12, abs=0.05)


def test_copies_pass_through_the_host_one_way_after_the_other() -> None:
    """1.07 GB at 2 GB/s and then at 3: 0.895 s for one load."""
    slow, through = (load_setup(EXAMPLES / f"kvflow_{name}.yaml").cells for name in ("slow_link", "hicache"))
    nbytes = 8192 * slow[0].machine.bytes_per_token
    assert slow[0].machine.links.reload_s(nbytes, Tier.DEVICE) == pytest.approx(nbytes / 2e9, rel=1e-3)
    cell = next(cell for cell in through if "A10G" in cell.name)
    assert cell.machine.links.reload_s(nbytes, Tier.DEVICE) == pytest.approx(nbytes / 2e9 + nbytes / 3e9, rel=1e-3)


def test_a_batch_that_waits_for_loads_can_be_slower_than_no_tier() -> None:
    """KVFlow saw HiCache at 0.57 of the server without it, where many workflows share a card."""
    cell = load_setup(EXAMPLES / "kvflow_hicache.yaml").cells[-1]
    workload = replace(cell.workload, rounds=1)
    seconds = {
        policy: simulate(cell.machine, workload, policy).makespan_s for policy in ("lru", "hicache", "lru_reactive")
    }
    assert seconds["hicache"] > 1.2 * seconds["lru"] > 1.2 * seconds["lru_reactive"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"machine": {"host_copy_gb_s": 0}}, "got 0 as machine.host_copy_gb_s; accepted: a number above 0 or nothing"),
        ({"machines": {}}, r"got unknown fields machines \(meant is perhaps machine\); accepted: title, source"),
        ({"machine": {"gpu": 1}}, "got unknown fields gpu in machine; accepted: card, model"),
        ({"machine": [1]}, "got a list as machine; accepted: a mapping or nothing"),
        ({"cells": 5}, "got 5 as cells; accepted: a list of items that are each a mapping of name, machine"),
        ({"cells": [{}, {"machine": {"card": "b1"}}]}, r"cells\[1\]: unknown card 'b1'; known: h100"),
        ({"machine": {"scheduler": {"seqs": 1}}}, "got unknown fields seqs in machine.scheduler; accepted: max_num_b"),
        ({"workload": {"tool_s": {"mean": -1}}}, "got -1 as workload.tool_s.mean; accepted: a number of 0 or more"),
        ({"workload": {"tool_s": "x"}}, "workload.tool_s: got 'x' for a distribution; accepted: a number, or mean"),
        ({"policies": ["lru", "best"]}, "unknown policy 'best'; known: lru"),
        ({"policies": ["lru"]}, "the baseline 'lru_reactive' is not among the policies lru"),
        ({"repeats": 0}, "got 0 as repeats; accepted: a whole number of 1 or more"),
        ([], "got a list as the document; accepted: a mapping of title, source, machine"),
        ({"machine": {"scheduler": {"max_num_seqs": 0}}}, "got 0 as machine.scheduler.max_num_seqs; accepted: "),
    ],
)
def test_wrong_set_ups_are_refused(given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_setup(given, "test")


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("cells: [")
    with pytest.raises(ValueError, match=r"bad\.yaml is not YAML"):
        load_setup(tmp_path / "bad.yaml")
    (tmp_path / "odd.yaml").write_text("cells:\n- size: 1\n")
    with pytest.raises(ValueError, match=r"odd\.yaml: got unknown fields size in cells\[0\]; accepted: name, "):
        load_setup(tmp_path / "odd.yaml")


def test_changes_replace_what_all_cells_have(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("cells:\n- {machine: {link_gb_s: 2}}\n- {workload: {rounds: 2}}\n")
    setup = load_setup(tmp_path / "two.yaml", ["machine.link_gb_s=4", "workload.rounds=1"])
    assert [cell.machine.links.host_bytes_per_s for cell in setup.cells] == [4e9, 4e9]
    assert [cell.workload.rounds for cell in setup.cells] == [1, 1]
    for change, message in (
        ("rounds=1", "got the change 'rounds=1'; accepted: machine.KEY=VALUE or workload.KEY=VALUE"),
        ("machine.link_gb_s=[", "two.yaml: the change 'machine.link_gb_s=.' is not YAML"),
        ("machine.link=1", r"two.yaml: cells.0.: got unknown fields link \(meant is perhaps link_gb_s\) in machine"),
    ):
        with pytest.raises(ValueError, match=message):
            load_setup(tmp_path / "two.yaml", [change])


def test_the_study_asks_its_questions(small, tmp_path: Path) -> None:
    workload = small.workload(agents=3, rounds=1, workflows=2)
    questions = questions_for(workload, (2, 3))
    assert [len(question.values) for question in questions] == [5, 4, 3, 4, 2, 3]
    few = [replace(question, values=dict(list(question.values.items())[-2:])) for question in questions]
    ended: list[None] = []
    policies = ("lru_reactive", "ste_prefetch")
    machine, count = small.machine(4), lambda: ended.append(None)
    points = run_study(machine, workload, few, policies, "lru_reactive", (0,), ended=count)
    assert len(points) == len(ended) == 2 * 2 * 6
    assert all(point.ratio == 1.0 for point in points if point.policy == "lru_reactive")
    assert {point.value for point in points if point.question == "workflows"} == {"2", "3"}
    draw_study(points, tmp_path / "study.png", "lru_reactive", "a set-up")
    assert (tmp_path / "study.png").stat().st_size > 10_000


@pytest.mark.parametrize("policy", ["ste_prefetch", "ste"])
def test_a_timeline_covers_every_moment(small, tmp_path: Path, policy: str) -> None:
    timeline = Timeline()
    outcome = simulate(small.machine(3), small.workload(agents=5, rounds=2), policy, timeline=timeline)
    last = max(each.end for each in timeline.intervals)
    assert last >= max(call.ended for call in timeline.calls)
    for agent in timeline.agents:
        mine = sorted((each.begin, each.end, each.place) for each in timeline.intervals if each.agent == agent)
        assert mine[0][0] == 0.0 and mine[-1][1] == last == pytest.approx(outcome.makespan_s, abs=0.2)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(mine))
    assert {each.place for each in timeline.intervals} >= {"gpu", "cpu", "loading"}
    assert len(timeline.calls) == outcome.calls
    for call in timeline.calls:
        at = (call.admitted + call.ended) / 2
        (place,) = [s.place for s in timeline.intervals if s.agent == call.agent and s.begin <= at < s.end]
        assert place == "gpu", "what is computed is on the device"
    draw_timelines({"ste_prefetch": timeline}, tmp_path / "timeline.png", "a set-up")
    draw_speedups({"one": {"ste": [1.2, 1.4]}}, tmp_path / "bars.png", "lru", "a set-up", {("one", "ste"): 1.5})
    assert min((tmp_path / name).stat().st_size for name in ("timeline.png", "bars.png")) > 5000
