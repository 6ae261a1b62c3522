"""The documents are correct: code in them runs, command lines are accepted, links and anchors exist."""

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
from tenure.retention import RetentionGates
from tenure.retention.checkpoint import load_checkpoint
from tenure.scripts import cli
from tenure.scripts.sweep import SweepCommand

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
DOCUMENTS += sorted(ROOT.glob("examples/*/README.md"))
# Folders whose files may name pages; add the packages whose docstrings name the present ones.
NAMING_PAGES = ("examples", "tests", "retention", "training", "eviction", "serving", "eval", "scripts")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose_of(path: Path) -> str:
    """The text without its code blocks."""
    return re.sub(r"^(`{3,})[^`\n]*\n.*?^\1$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors_of(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.*)$", prose_of(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        slug = "".join(one for one in text.replace(" ", "-") if one.isalnum() or one in "-_")
        same = sum(re.sub(r"-\d+$", "", other) == slug for other in found)
        found.append(f"{slug}-{same}" if same else slug)
    return set(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_relative_links_and_their_anchors_exist(path: Path) -> None:
    absent = []
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose_of(path)):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            absent.append(link)
    assert not absent


@pytest.mark.parametrize("root", NAMING_PAGES)
def test_pages_named_in_files_exist(root: str) -> None:
    absent = []
    for path in sorted(one for one in (ROOT / root).rglob("*") if one.suffix in (".py", ".yaml", ".json", ".cfg")):
        names = re.findall(r"\bdocs/[\w/-]+\.(?:md|png|svg)\b", path.read_text())
        absent += [f"{name_of(path)}: {name}" for name in names if not (ROOT / name).is_file()]
    assert not absent, "\n".join(absent)


def test_every_page_is_in_the_navigation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    navigation = import_module("site_extension")
    listed = {"index", *(page for pages in navigation.NAVIGATION.values() for page in pages)}
    listed |= {f"reference/{page}" for page in navigation.API_PAGES}
    assert listed == {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")}
    linked = re.findall(r"\]\(([^)#\s]+)\.md", (DOCS / "index.md").read_text())
    assert set(linked) == {page for page in listed if not page.startswith("reference/api/")} - {"index"}


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if "```python" in path.read_text()], ids=name_of)
def test_snippets_are_python(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        compile(block, str(path), "exec")


@pytest.mark.parametrize(
    ("page", "fragment"),
    [("getting-started.md", "context.fork()"), ("guides/compress.md", 'small.compress("snapkv"')],
)
def test_the_snippets_on_shared_contexts_run(page: str, fragment: str, tiny_llama: PreTrainedModel) -> None:
    torch.manual_seed(1)
    gates = RetentionGates.for_model(tiny_llama, gate_width=8, init_std=0.5, initial_bias=2.0)
    context_ids, question_ids = torch.arange(3, 103)[None], torch.arange(5, 12)[None]
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    (block,) = [one for one in blocks if fragment in one]
    scope = {"model": tiny_llama, "gates": gates, "context_ids": context_ids, "question_ids": question_ids}
    with torch.no_grad():
        exec(block, scope | {"torch": torch, "evict": evict})  # our own documentation


def test_the_policy_of_the_documentation_runs(tiny_llama: PreTrainedModel, monkeypatch) -> None:
    """The snippet's `with evict(...)` stands for the reader's own code; the class above it is executed as printed."""
    text = (DOCS / "guides" / "write-a-policy.md").read_text()
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


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if commands(path)], ids=name_of)
def test_command_lines_are_accepted(path: Path, monkeypatch) -> None:
    """As far as they can be without their models: flags, options, tasks of our own, and files of the repository."""
    from tenure.eval.harness.command import peek
    from tenure.eval.harness.generated_tasks import kinds_of

    monkeypatch.chdir(ROOT)
    for words in commands(path):
        command = cli.find_command(words, cli.COMMANDS)
        assert command is not None, words
        rest = words[len(command.split()) :]
        if command != "eval":
            config = tyro.cli(cli.COMMANDS[command].config_class(), args=rest)
            assert not isinstance(config, SweepCommand) or SweepConfig.from_yaml(config.config).cells()
            continue
        hf = pytest.importorskip("lm_eval.models.huggingface").HFLM
        asked = peek(rest)
        _, others = Options.split(asked.model_args)
        assert others.keys() <= inspect.signature(hf.__init__).parameters.keys(), "what is not ours is of lm-eval's hf"
        assert asked.tasks and len(kinds_of(asked.tasks)) == (
            13 if "tenure_ruler" in asked.tasks else sum(task.startswith("tenure_turns_") for task in asked.tasks)
        )


def test_the_documentation_of_evaluation_has_commands_of_every_kind() -> None:
    found = commands(DOCS / "guides" / "evaluate.md")
    assert {words[0] for words in found} == {"eval", "fidelity", "sweep", "report", "turns"} and len(found) >= 12


def test_the_table_is_what_its_records_give_with_the_shipped_gates() -> None:
    run = load_run(ROOT / "docs" / "records" / "sweep_smollm2")
    document, _ = load_checkpoint(ROOT / run.settings["gates"]["folder"])
    assert run.settings["gates"]["sha256"] == document["weights_sha256"] and not run.failures
    made = set(report_markdown([run], []).splitlines())
    page = (DOCS / "results" / "table.md").read_text()
    rows = [line for line in page[page.index("\n## 1024 tokens") :].splitlines() if line.startswith("|")]
    assert len(rows) > 90 and not [row for row in rows if row not in made]


@pytest.mark.parametrize(("name", "heading"), [("sweep_unseen", "Kinds of text that the gates never saw")])
def test_right_answers_and_kl_are_those_of_the_records(name: str, heading: str) -> None:
    run = load_run(ROOT / "docs" / "records" / name)
    sums: dict[str, list[str]] = {}
    for cell in run.settings["cells"]:
        found = [one for one in run.records if [one.policy, one.scope, one.budget, one.aware] == cell]
        kl = sum(one.kl for one in found) / len(found)
        sums.setdefault(cell[0], []).append(f"{sum(one.score for one in found):g}, {kl:.3f}")
    page = (DOCS / "results" / "table.md").read_text()
    rows = page[page.index(f"## {heading}\n") :].split("\n## ")[0]
    for policy, cells in sums.items():
        if policy != "full":
            assert f"| {policy} | {' | '.join(cells)} |" in rows


def test_the_agreement_with_kvpress_is_what_the_records_of_both_give() -> None:
    """No accuracy differs beyond chance, and the document's pairs of accuracies are those of the records."""
    records = ROOT / "docs" / "records"
    ours, theirs = load_run(records / "sweep_kvpress"), load_run(records / "kvpress")
    differences = compare_runs(ours, theirs)
    assert len(differences) == 19 and not any(one.significant for one in differences)
    assert "transformers 5.2.0, kvpress 0.5.5" in run_line(theirs), "the versions of the Python that answered"
    text = (DOCS / "results" / "studies.md").read_text()
    lines = text[text.index("### The same answers") :].splitlines()
    rows = {cells[1]: cells for line in lines if len(cells := [each.strip() for each in line.split("|")]) == 7}
    for one in differences:
        shown = rows[method_label(one.method)][2 if one.budget in (0.5, 1.0) else 4]
        assert shown == f"{one.before:.2f}, {one.after:.2f}"
