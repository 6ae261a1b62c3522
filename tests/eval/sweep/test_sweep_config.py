"""A sweep's file: what it may say, and one sentence for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenure.eval import TASKS
from tenure.eval.sweep import SweepConfig, all_units
from tenure.eviction import policy_names
from tenure.eviction.plan import Budget, EvictionPlan
from tenure.eviction.policies.policy import Protection
from tenure.eviction.policies.registry import get_policy

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SMALL = "policies: [full, knorm]\nbudgets: [0.5, 64]\ntasks: [vt]\n"


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> Path:
        (tmp_path / "sweep.yaml").write_text(text)
        return tmp_path / "sweep.yaml"

    return write


def test_a_file_and_changes_to_it(file):
    path = file(SMALL + "lengths: [256, 512]\nseeds: [0, 1]\ncases: 3\n")
    config = SweepConfig.from_yaml(path, cases=2, question="both")
    assert (config.policies, config.budgets, config.cases) == (("full", "knorm"), (0.5, 64), 2)
    assert [(*cell.key, cell.aware) for cell in config.cells()] == [
        ("full", "none", 1.0, False), ("full", "none", 1.0, True),
        ("knorm", "head", 0.5, False), ("knorm", "head", 0.5, True),
        ("knorm", "head", 64, False), ("knorm", "head", 64, True),
    ]  # fmt: skip
    units = all_units(config)
    assert len(units) == len(set(units)) == 1 * 2 * 2 * 2
    assert [(unit.length, unit.index) for unit in units[::2]] == [(256, 0), (256, 1), (512, 0), (512, 1)]


def test_a_preset_holds_for_all_policies_without_one(file):
    text = "policies: [full, snapkv, keydiff+kvpress]\nbudgets: [0.5]\ntasks: [vt]\npreset: defensivekv\n"
    cells = SweepConfig.from_yaml(file(text)).cells()
    assert [cell.name for cell in cells] == ["full", "snapkv(window=32)+defensivekv", "keydiff+kvpress"]
    with pytest.raises(ValueError, match="presets protect no tokens: leave out sinks, recent, or the preset"):
        SweepConfig.from_yaml(file(text + "sinks: 4\nrecent: 32\n")).cells()


def test_brackets_give_a_policy_its_protected_tokens(file):
    text = "policies: [full, 'knorm[4,32]', 'knorm[0,0]@64', 'snapkv[4,8,10%,50%]:layer']\n"
    text += "budgets: [0.5]\ntasks: [vt]\n"
    cells = SweepConfig.from_yaml(file(text)).cells()
    assert [cell.name for cell in cells] == ["full", "knorm[4,32]", "knorm[0,0]@64", "snapkv[4,8,10%,50%]"]
    base = cells[1].plan(EvictionPlan(get_policy("full"), Budget(1.0), "head"), 5)
    assert (base.protection, base.protected(0, 300, 200)) == (Protection(4, 32), (4, 32))
    assert cells[3].protection == Protection(4, 8, 0.1, 0.5) and cells[1].label == "Knorm [4,32]"
    with pytest.raises(ValueError, match="policies with brackets have protected tokens: leave out sinks"):
        SweepConfig.from_yaml(file(text + "sinks: 4\n")).cells()
    with pytest.raises(ValueError, match=r"presets protect no tokens: leave out \[4,32\], or \+kvpress"):
        SweepConfig.from_yaml(file(text + "preset: kvpress\n")).cells()
    with pytest.raises(ValueError, match=r"'knorm\[4\]': brackets hold sinks, recent tokens and perhaps shares"):
        SweepConfig.from_yaml(file(text.replace("[4,32]", "[4]"))).cells()


def test_scopes_are_taken_with_policies_that_name_none(file):
    config = SweepConfig.from_yaml(file("policies: [full, 'snapkv:head', knorm@64]\nbudgets: [0.5]\ntasks: [vt]\n"
                                        "scopes: [layer, global]\n"))  # fmt: skip
    assert [cell.key for cell in config.cells()] == [
        ("full", "none", 1.0), ("snapkv", "head", 0.5), ("knorm@64", "layer", 0.5), ("knorm@64", "global", 0.5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL + "lenghts: [5]\nfoo: 1\n",
         r"sweep.yaml: got unknown fields foo, lenghts \(meant is perhaps lengths\); accepted: policies, .*output"),
        ("policies: [full]\ntasks: [vt]\n", "lacks budgets; accepted fields: policies"),
        ("- 1\n", "got a list as the document; accepted: a mapping of policies"),
        ("a: [\n", r"sweep.yaml is not YAML: while parsing"),
        ("a: !!python/object/apply:os.system [ls]\n", "is not YAML: could not determine a constructor"),
        (SMALL.replace("[vt]", "vt"), "got 'vt' as tasks; accepted: a list of 1 or more items, each text"),
        (SMALL.replace("[vt]", "[]"), "got a list of 0 as tasks; accepted: a list of 1 or more items"),
        (SMALL.replace("[vt]", "[vt, vt]"), "got 'vt' twice in tasks"),
        (SMALL.replace("0.5", "5e-2"), r"got '5e-2' as budgets\[0\]; accepted: a number .*after a dot, as in 2.0e-4"),
        (SMALL.replace("0.5", "true"), r"got True as budgets\[0\]; accepted: a number"),
        (SMALL + "cases: 0\n", "got 0 as cases; accepted: a whole number of 1 or more"),
        (SMALL + "cases: 2.5\n", "got 2.5 as cases; accepted: a whole number of 1 or more"),
        (SMALL + "cases: null\n", "got nothing as cases; accepted: a whole number of 1 or more"),
        (SMALL + "together: 0\n", "got 0 as together; accepted: a whole number of 1 or more"),
        (SMALL + "lengths: [0]\n", r"got 0 as lengths\[0\]; accepted: a whole number of 1 or more"),
        (SMALL + "question: maybe\n", "got 'maybe' as question; accepted: agnostic, aware, both"),
        (SMALL + "dtype: int8\n", "got 'int8' as dtype; accepted: auto, float32"),
        (SMALL + "data: []\n", r"got \(\) as data; accepted: demo, a file, a folder, or several of these"),
        (SMALL + "data: 5\n", "got 5 as data; accepted: text or a list"),
        (SMALL + "model: 7\n", "got 7 as model; accepted: text"),
        (SMALL + "gates: [a]\n", "got a list as gates; accepted: text or nothing"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_say(text, message, file):
    with pytest.raises(ValueError, match=message):
        SweepConfig.from_yaml(file(text))


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no sweep at .*absent.yaml'; examples/sweep_smollm2.yaml is one"):
        SweepConfig.from_yaml(tmp_path / "absent.yaml")


def test_policies_and_budgets_are_refused_by_name(file):
    with pytest.raises(ValueError, match="unknown policy 'snapkw'; known: "):
        SweepConfig.from_yaml(file(SMALL.replace("knorm", "snapkw"))).cells()
    with pytest.raises(ValueError, match=r"budget 1.5 is out of range"):
        SweepConfig.from_yaml(file(SMALL.replace("0.5", "1.5"))).cells()


LATER = {"cake", "gate_score", "rkv"}  # policies that came after the table was measured


def test_the_table_has_every_policy_that_ranks_the_demo_model():
    config = SweepConfig.from_yaml(EXAMPLES / "sweep_smollm2.yaml")
    assert {policy.partition("(")[0] for policy in config.policies} >= set(policy_names()) - LATER
    assert set(config.budgets) == {0.5, 0.2, 0.1, 0.05} and set(config.lengths) == {1024, 4096}
    assert len(config.tasks) >= 8 and set(config.tasks) <= set(TASKS)
    assert config.cases >= 25 and config.question == "agnostic" and config.model == "demo"


def test_the_other_example_can_be_read():
    config = SweepConfig.from_yaml(EXAMPLES / "sweep_gemma3.yaml")
    assert set(config.tasks) <= set(TASKS)
    assert not any("log_beta" in cell.policy.needs for cell in config.cells()), "there are no gates for this model"


@pytest.mark.parametrize("name", ["unseen", "protection", "baselines", "papers", "defensive"])
def test_further_examples_can_be_read(name):
    config = SweepConfig.from_yaml(EXAMPLES / f"sweep_{name}.yaml")
    assert set(config.tasks) <= set(TASKS) and config.cells()[0].name == "full"
    assert config.output == f"runs/sweep_{name}", "as its comments say"
