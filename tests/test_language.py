"""Documents and docstrings are in natural technical English, without the phrases below."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "examples")
# Packages whose docstrings are checked; add those that have been rewritten.
PACKAGES: tuple[str, ...] = ("retention", "training", "eviction", "serving", "eval", "scripts", "tenure")

QUESTION = re.compile(r"(what|which|who|whose|whom)\b(?!.*\?$)", re.IGNORECASE)  # a real question may stand
PHRASES = {
    r"\bgoes\b|\bmay go\b": "say `is evicted`, `is freed`, or what happens",
    r"\b(come|comes|coming|brought|bring|brings|bringing) up\b": "say `is loaded`",
    r"\btold\b(?! apart)": "say `stated`, `reported`, `notified`",
    r"\bof today\b": "say `this version`",
    r"\bin the mean\b": "say `on average`",
    r"\|\s*beside\s*\|": "a column is `compared with`, not `beside`",
    r"\banswers for\b": "say `controls`, `is responsible for`",
    r"\b(is|are) no more\b": "say `no longer`, `no further`",
    r"\bno matter of\b": "say `independent of`",
    r"\bfor a \w+ to win\b": "say `all policies are equal`",
    r"\bcame instead\b|\bcome instead\b": "say `replaced`",
    r"\bcannot be had\b": "say `is impossible`",
    r"\bcome to rest\b": "say where the bytes are",
    r"\bforetold\b|\bforetells?\b": "say `predicted`",
    r"\bnobody writes any more\b": "say `read-only`",
    r"\bas many as may be\b": "say `the limit`",
    r"\bis out at a time\b": "say `in flight`",
    r"\bstands? in the results\b": "say `is stored`",
    r"\bthe less, the more\b": "say how they are blended",
    r"\b(aimed at|the aims? w)": "say `target`",
    r"\bdoomed\b": "say `pending outcome`",
    r"\blooked at\b(?! \d)": "say `inspected`",  # the cells of examples/random_agents.yaml are named `looked at N`
}


def files(root: str, suffixes: tuple[str, ...]) -> list[Path]:
    path = ROOT / root
    found = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return [one for one in found if one.suffix in suffixes]


PAGES = [path for root in DOCUMENTS for path in files(root, (".md", ".yaml", ".ipynb"))]
MODULES = [path for root in PACKAGES for path in files(root, (".py",))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """Markdown without code blocks, except their comments, and without `code`."""

    def comments(match: re.Match[str]) -> str:
        return "\n".join(re.findall(r"#.*$", match[0], re.MULTILINE))

    text = re.sub(r"^(`{3,})[^\n]*\n.*?^\1\s*$", comments, text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`", "", text)


def bad_phrases(text: str) -> list[str]:
    """Findings of `PHRASES` in running text, also across line ends."""
    flat = re.sub(r"\s+", " ", text)
    return [
        f"…{flat[max(0, match.start() - 40) : match.end() + 20]}…: {advice}"
        for pattern, advice in PHRASES.items()
        for match in re.finditer(pattern, flat, re.IGNORECASE)
    ]


def headings(text: str) -> list[str]:
    return re.findall(r"^#{1,6} +(.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Name and docstring of a module and of its classes and functions."""
    tree = ast.parse(path.read_text())
    for node in [tree, *ast.walk(tree)]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "module"), text


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_documents(path: Path) -> None:
    text = path.read_text()
    relative = [heading for heading in headings(text) if path.suffix == ".md" and QUESTION.match(heading)]
    found = bad_phrases(without_code(text) if path.suffix == ".md" else text)
    assert not relative and not found, "\n".join([*(f"heading: {one}" for one in relative), *found])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings(path: Path) -> None:
    found = []
    for name, text in docstrings(path):
        named = name == "module" or name[:1].isupper()
        if named and QUESTION.match(text.splitlines()[0]):
            found.append(f"{name}: begins with a relative clause: {text.splitlines()[0]}")
        found += [f"{name}: {one}" for one in bad_phrases(without_code(text))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    ["the oldest goes first", "told in one sentence", "| a | beside |", "three\nin the mean", "is no\nmore"],
)
def test_the_patterns_are_found(text: str) -> None:
    assert bad_phrases(text)


def test_headings_that_are_relative_clauses_are_found() -> None:
    found = headings("# What a hint can\n## Where is it?\n## Which is best?")
    assert [one for one in found if QUESTION.match(one)] == ["What a hint can"]
