"""Adds to the built site: navigation, and references that are generated from the code.

* The navigation is added to the index here, so that the page on GitHub shows links and no directives.
* `reference/cli` gets the help text of every command, `reference/config` the fields of the configuration dataclasses.
* Docstrings are Markdown-flavoured English; reStructuredText would take `*args` or `name_` for markup.
* The card of the shipped gates, outside docs/, is a page too. Links to other files there are downloads, links to
  folders become plain text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GATES = "examples/smollm2-135m-gates/README.md"  # shown as the page results/gates
NAVIGATION = {
    "Start": ["getting-started", "architecture"],
    "Guides": [f"guides/{name}" for name in (
        "compress", "images", "train", "evaluate", "serve-agents", "serve-http", "write-a-policy", "add-a-model")],
    "Concepts": [f"concepts/{name}" for name in ("budgets", "ragged-cache", "tiers", "step-graph", "simulator")],
    "Reference": [f"reference/{name}" for name in ("api", "cli", "config", "presets", "models", "hints", "checkpoint")],
    "Results": ["reproduce", *(f"results/{name}" for name in (
        "demo", "table", "gates", "images", "studies", "benchmarks", "training-memory", "engine", "serving",
        "simulator", "kernels"))],
}  # fmt: skip
API_PAGES = [f"api/{name}" for name in ("retention", "training", "eviction", "policies", "serving", "eval")]
# The dataclasses on the reference page of configuration.
CONFIGURATIONS = (
    ("tenure.training", "TrainConfig"),
    ("tenure.retention", "RetentionConfig"),
    ("tenure.eval.sweep", "SweepConfig"),
    ("tenure.serving", "SchedulerConfig"),
    ("tenure.serving", "SamplingParams"),
    ("tenure.serving", "PrefetchConfig"),
    ("tenure.serving", "GraphConfig"),
    ("tenure.serving.server", "ServerConfig"),
    ("tenure.serving.server", "GrammarConfig"),
    ("tenure.serving", "SuffixReuseConfig"),
    ("tenure.serving", "EagerWriteBackConfig"),
    ("tenure.serving", "EvictionHistoryConfig"),
)


def toctree(pages: list[str], caption: str = "") -> str:
    """A hidden table of contents in MyST's syntax."""
    lines = ["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *pages, "```"]
    return "\n".join(lines)


def command_help(name: str, command: Any) -> str:
    """The help of one command as it is printed for a terminal of 100 columns."""
    import tyro

    module = importlib.import_module(f"tenure.scripts.{command.module}")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        if hasattr(module, "parse"):
            module.parse(["--help"], f"tenure {name}")
        else:
            tyro.cli(command.config_class(), prog=f"tenure {name}", args=["--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).rstrip()


def commands_page() -> str:
    """A section for each command of the `tenure` command line."""
    from tenure.scripts import cli

    os.environ["COLUMNS"] = "100"
    os.environ["NO_COLOR"] = "1"
    os.environ["TERM"] = "dumb"
    parts = []
    for name, command in cli.COMMANDS.items():
        try:
            text = command_help(name, command)
        except ImportError as error:  # bench and soak stay in the checkout
            text = f"(not available here: {error})"
        parts.append(f"\n## tenure {name}\n\n{command.summary}.\n\n````text\n{text}\n````\n")
    return "".join(parts)


def configurations_page() -> str:
    """Every documented configuration dataclass, its fields with their defaults."""
    parts = []
    for package, name in CONFIGURATIONS:
        cls = getattr(importlib.import_module(package), name)
        assert dataclasses.is_dataclass(cls)
        rows = [
            f"| `{field.name}` | {_code(field.type)} | {_code(_default(field))} |" for field in dataclasses.fields(cls)
        ]
        table = "\n".join(["| field | type | default |", "|---|---|---|", *rows])
        parts.append(
            f"\n### {name}\n\n`{package}.{name}`\n\n{table}\n\n"
            f"```{{eval-rst}}\n.. autoclass:: {package}.{name}\n   :no-index:\n   :exclude-members: __init__\n```\n"
        )
    return "".join(parts)


def _code(text: Any) -> str:
    shown = str(text).replace("|", "\\|")
    return f"`{shown}`" if shown else ""


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return f"{getattr(field.default_factory, '__name__', '')}()"
    return ""


def add_generated_parts(app: Any, page: str, source: list[str]) -> None:
    if page == "index":
        source[0] += "\n\n" + "\n\n".join(toctree(pages, caption) for caption, pages in NAVIGATION.items()) + "\n"
    elif page == "reference/api":
        source[0] += "\n\n" + toctree(API_PAGES) + "\n"
    elif page == "reference/cli":
        source[0] += commands_page()
    elif page == "reference/config":
        source[0] = source[0].replace("<!-- dataclasses -->", configurations_page())
    elif page == "reference/api/eviction":  # the policies are on a page of their own
        policies = importlib.import_module("tenure.eviction.policies").__all__
        directive = ".. automodule:: tenure.eviction\n"
        source[0] = source[0].replace(directive, f"{directive}   :exclude-members: {', '.join(policies)}\n")
    elif page == "results/gates":
        source[0] = re.sub(r"\]\(\.\./\.\./docs/", "](/", (ROOT / GATES).read_text())
    source[0] = re.sub(rf"\]\((?:\.\./)+{re.escape(GATES)}", "](/results/gates.md", source[0])
    source[0] = _without_folder_links(Path(app.srcdir) / page, source[0])


def _without_folder_links(page: Path, text: str) -> str:
    """Links to folders, which a site without their listing cannot show, as plain text."""

    def plain(match: re.Match[str]) -> str:
        target = match[2].split("#")[0]
        is_folder = target and "://" not in target and (page.parent / target).is_dir()
        return match[1] if is_folder else match[0]

    return re.sub(r"\[([^\]\n]+)\]\(([^)\s]+)\)", plain, text)


def plain_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turns `code` into literals and escapes what reStructuredText would take for markup; literal blocks stay."""
    literal: int | None = None
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        if literal is not None:
            continue
        lines[number] = _escaped(line)
        if line.rstrip().endswith("::"):
            literal = indent


def _escaped(line: str) -> str:
    parts = re.split(r"(`+[^`]+`+)", line)
    for index, part in enumerate(parts):
        if part.startswith("`"):
            parts[index] = f"``{part.strip('`')}``"
            if index + 1 < len(parts) and re.match(r"\w", parts[index + 1]):
                parts[index] += "\\ "
            if index and re.search(r"[\w(=−-]$", parts[index - 1]) and re.search(r"\w$", parts[index - 1]):
                parts[index] = "\\ " + parts[index]
            continue
        head = re.match(r"\s*(?:[*-] )?", part) if index == 0 else None
        start = head.end() if head else 0
        rest = re.sub(r"([*|])", r"\\\1", part[start:])
        parts[index] = part[:start] + re.sub(r"(\w)_(?=\W|$)", r"\1\\_", rest)
    return "".join(parts)


def skip_inherited(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out what torch, transformers and enum classes document themselves."""
    module = getattr(inspect.unwrap(obj), "__module__", None) if callable(obj) else None
    return True if isinstance(module, str) and not module.startswith("tenure") else None


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", add_generated_parts)
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)  # before napoleon
    app.connect("autodoc-skip-member", skip_inherited)
    return {"version": "1", "parallel_read_safe": True}
