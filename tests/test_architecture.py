"""docs/architecture.md names files, functions and methods that exist, and every module once."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("retention", "training", "eviction", "serving", "eval", "scripts")
NOT_LISTED = ("scripts/bench/", "scripts/soak/")  # in the checkout only; the page describes them in a sentence


def references(text: str) -> list[tuple[str, str]]:
    """Every `file.py:name` or `file.py:Class.method` of a page."""
    return re.findall(r"`([\w/]+\.py):([\w.]+)`", text)


def defined_names(source: str) -> set[str]:
    """Functions and classes of a module, and methods as `Class.method`."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{one.name}"
                for one in node.body
                if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return names


def missing(text: str, root: Path = ROOT) -> list[str]:
    """The references of a page that do not exist."""
    absent = []
    for file, name in references(text):
        path = root / file
        if not path.is_file():
            absent.append(f"{file}:{name} (no such file)")
        elif name not in defined_names(path.read_text()):
            absent.append(f"{file}:{name} (no such name)")
    return list(dict.fromkeys(absent))


def listed_modules(text: str) -> list[str]:
    """The modules in the page's list, each with a description on its line."""
    return re.findall(r"^\* `([\w/]+\.py)`: \S", text[text.index("\n## Modules") :], re.MULTILINE)


def modules_of_the_packages() -> set[str]:
    """All modules but the packages' own `__init__` files."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    names = {path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py"}
    return {name for name in names if not name.startswith(NOT_LISTED)}


def test_all_names_of_the_page_exist() -> None:
    text = PAGE.read_text()
    assert len(references(text)) > 50
    absent = missing(text)
    assert not absent, "docs/architecture.md names what does not exist:\n" + "\n".join(absent)


def test_the_page_lists_every_module_once() -> None:
    listed = listed_modules(PAGE.read_text())
    there = modules_of_the_packages()
    report = [f"not listed: {name}" for name in sorted(there - set(listed))]
    report += [f"listed, but no such module: {name}" for name in sorted(set(listed) - there)]
    report += [f"listed twice: {name}" for name in sorted(set(listed)) if listed.count(name) > 1]
    assert not report, "docs/architecture.md:\n" + "\n".join(report)


def test_every_question_of_a_newcomer_is_answered_by_one_or_two_names() -> None:
    text = PAGE.read_text()
    section = text[text.index("## Questions of a newcomer") : text.index("\n## Modules")]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10 and all(1 <= len(references(row)) <= 2 for row in rows)


def test_the_lives_have_eight_steps_that_name_files() -> None:
    text = PAGE.read_text()
    for life in ("a prompt", "a training batch", "an agent's call"):
        section = text[text.index(f"## The life of {life}") :].split("\n## ")[0]
        steps = re.split(r"^\d\. ", section, flags=re.MULTILINE)[1:]
        assert len(steps) == 8 and all(re.search(r"`[\w/]+\.py", step) or "steps 2 to 7" in step for step in steps)


def test_the_reader_finds_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("class A:\n    def m(self): ...\n\ndef f(): ...\n")
    assert missing("`a.py:A` `a.py:A.m` `a.py:f`", tmp_path) == []
    assert missing("`a.py:A.n` `b.py:f` `a.py:m`", tmp_path) == [
        "a.py:A.n (no such name)",
        "b.py:f (no such file)",
        "a.py:m (no such name)",
    ]
