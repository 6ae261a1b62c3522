"""The generated tasks by their names in lm-eval."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from .registration import tasks_folder

PREFIX, AWARE = "tenure_", "_aware"


def task_files(name: str) -> list[str]:
    """The YAML files of a generated task, or of all tasks of a group.

    Raises:
        ValueError: there is no such task.
    """
    path = tasks_folder() / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(one for one in task_names() if not one.endswith(AWARE))
        raise ValueError(f"no task {name!r}; known, each also with {AWARE}: {known}")
    lines = path.read_text(encoding="utf-8").splitlines()
    members = [line[4:] for line in lines if line.startswith(f"  - {PREFIX}")]
    return [str(tasks_folder() / f"{member}.yaml") for member in members] or [str(path)]


def task_names() -> list[str]:
    """Names of the generated tasks and groups in lm-eval, sorted."""
    return sorted(path.stem for path in tasks_folder().glob(f"{PREFIX}*.yaml"))


def kinds_of(tasks: Iterable[str]) -> list[str]:
    """The kinds of documents behind these names of tasks, groups and patterns, each once; other names are left out.

    Raises:
        ValueError: there is no such generated task.
    """
    kinds = {}
    for name in tasks:
        if not name.startswith(PREFIX):
            continue
        matching = [known for known in task_names() if fnmatch(known, name)] if "*" in name else [name]
        for path in (path for one in matching for path in task_files(one)):
            kinds[Path(path).stem.removeprefix(PREFIX).removesuffix(AWARE)] = None
    return list(kinds)
