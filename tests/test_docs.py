"""The documents keep their word: code in them runs, command lines are accepted, links lead somewhere."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest
import torch
import tyro
from transformers import PreTrainedModel

from tenure.eval import Options
from tenure.eval.report import compare_runs, load_run, report_markdown
from tenure.eval.report.numbers import method_label
from tenure.eval.report.wording import run_line
from tenure.eval.sweep import SweepConfig
from tenure.eviction import Policy, evict
from tenure.retention.checkpoint import load_checkpoint
from tenure.scripts import cli, sweep

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS += sorted(ROOT.glob("examples/*/README.md"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    absent = [link for link in links if not link.startswith("http") and not (path.parent / link).exists()]
    assert not absent


def test_the_policy_of_the_documentation_runs(tiny_llama: PreTrainedModel, monkeypatch) -> None:
    """The snippet's `with evict(...)` stands for the reader's own code; the class above it is executed as printed."""
    text = (ROOT / "docs" / "eviction.md").read_text()
    block = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "(Policy)" in code)
    module = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)  # dataclasses look their module up
    exec(block[: block.index("with evict")], module.__dict__)  # our own documentation
    policy = module.ValueNorm
    assert isinstance(policy, type) and issubclass(policy, Policy)
    with evict(tiny_llama, policy(), budget=0.25, scope="layer", sinks=1, recent=2) as session, torch.no_grad():
        tiny_llama(torch.arange(3, 43)[None], use_cache=True)
        assert session.report().kept_share == pytest.approx(0.25)


def commands(path: Path) -> list[list[str]]:
    """The `tenure ...` command lines in a document's shell blocks, of a loop's variable its first value."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL):
        values = {name: words.split()[0] for name, words in re.findall(r"for (\w+) in (.*?);", block)}
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\$(\w+)", lambda match, values=values: values[match[1]], line), comments=True)
            if words[:1] == ["tenure"]:
                found.append(words[1:])
    return found


@pytest.mark.parametrize("name", [path.name for path in DOCUMENTS if commands(path)])
def test_command_lines_are_accepted(name: str, monkeypatch) -> None:
    """As far as they can be without their models: flags, options, tasks of our own, and files of the repository."""
    from tenure.eval.harness.command import peek
    from tenure.eval.harness.generated_tasks import kinds_of

    monkeypatch.chdir(ROOT)
    (path,) = [path for path in DOCUMENTS if path.name == name and commands(path)]
    for words in commands(path):
        command = cli.find_command(words, cli.COMMANDS)
        assert command is not None, words
        rest = words[len(command.split()) :]
        if command != "eval":
            config = tyro.cli(import_module(f"tenure.scripts.{cli.COMMANDS[command].module}").Config, args=rest)
            assert not isinstance(config, sweep.Config) or SweepConfig.from_yaml(config.config).cells()
            continue
        hf = pytest.importorskip("lm_eval.models.huggingface").HFLM
        asked = peek(rest)
        _, others = Options.split(asked.model_args)
        assert others.keys() <= inspect.signature(hf.__init__).parameters.keys(), "what is not ours is of lm-eval's hf"
        assert asked.tasks and len(kinds_of(asked.tasks)) == (13 if "tenure_ruler" in asked.tasks else 0)


def test_the_documentation_of_evaluation_has_commands_of_every_kind() -> None:
    found = commands(ROOT / "docs" / "evaluation.md")
    assert {words[0] for words in found} == {"eval", "fidelity", "sweep", "report"} and len(found) >= 12


def test_the_table_is_what_its_records_give_with_the_shipped_gates() -> None:
    run = load_run(ROOT / "docs" / "records" / "sweep_smollm2")
    document, _ = load_checkpoint(ROOT / run.settings["gates"]["folder"])
    assert run.settings["gates"]["sha256"] == document["weights_sha256"] and not run.failures
    made = set(report_markdown([run], []).splitlines())
    rows = [line for line in (ROOT / "docs" / "table.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 90 and not [row for row in rows if row not in made]


def test_beside_kvpress_is_what_the_records_of_both_give() -> None:
    """No accuracy differs beyond chance, and the document's pairs of accuracies are those of the records."""
    records = ROOT / "docs" / "records"
    ours, theirs = load_run(records / "sweep_kvpress"), load_run(records / "kvpress")
    differences = compare_runs(ours, theirs)
    assert len(differences) == 19 and not any(one.significant for one in differences)
    assert "transformers 5.2.0, kvpress 0.5.5" in run_line(theirs), "the versions of the Python that answered"
    text = (ROOT / "docs" / "evaluation.md").read_text()
    lines = text[text.index("## Beside kvpress") : text.index("## With a GPU")].splitlines()
    rows = {cells[1]: cells for line in lines if len(cells := [each.strip() for each in line.split("|")]) == 7}
    for one in differences:
        shown = rows[method_label(one.method)][2 if one.budget in (0.5, 1.0) else 4]
        assert shown == f"{one.before:.2f}, {one.after:.2f}"
