"""lm-eval's command line with the model type `tenure` and the generated tasks, checked before a model is loaded."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .boundary import FAMILIES, KNOWN
from .options import Options, check_config, find_config, load_gates
from .registration import MODEL_TYPE, register, tasks_folder

SUBCOMMANDS = ("ls", "validate")
PREFIX, AWARE = "tenure_", "_aware"
QUESTION_TOKENS = 256  # room for a question, the chat template and the answer beside a generated context


@dataclass
class Asked:
    """What a command line asks lm-eval for, as far as it is checked here.

    Attributes:
        model: the model type, or None.
        model_args, metadata: parsed as lm-eval parses them.
        tasks: names and files.
        include_path: the user's own folder of tasks, or None.
    """

    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None


def run(arguments: Sequence[str]) -> None:
    """Runs lm-eval's own command line with these arguments.

    `--model tenure` and the folder of the generated tasks are added where the arguments do not say otherwise.

    Raises:
        ValueError: what `check` refuses.
        ImportError: lm-eval is not installed.
        SystemExit: lm-eval ended itself, as it does after `--help`.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError(f"`tenure eval` needs lm-eval: pip install 'tenure[eval]' ({error})") from error
    register()
    given = list(arguments)
    if any(flag in given for flag in ("-h", "--help")) or not given:
        command = given or ["--help"]
    elif given[0] in SUBCOMMANDS:
        command = given + ([] if peek(given).include_path else ["--include_path", str(tasks_folder())])
    else:
        asked = peek(given)
        command = complete(given, asked)
        if asked.model in (None, MODEL_TYPE):
            check(asked)
    before = sys.argv
    sys.argv = ["lm-eval", *command]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def peek(arguments: Sequence[str]) -> Asked:
    """Reads the flags that matter here; a file of `--config` gives what the flags leave out."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-C")
    parser.add_argument("--model", "-M")
    parser.add_argument("--include_path")
    for name, short in (("--model_args", "-a"), ("--tasks", "-t"), ("--metadata", None)):
        parser.add_argument(*([name, short] if short else [name]), nargs="+", action="extend", default=[])
    flags, _ = parser.parse_known_args(list(arguments))
    stored: dict[str, Any] = {}
    if flags.config:
        import yaml

        stored = yaml.safe_load(Path(flags.config).read_text(encoding="utf-8")) or {}
    tasks = flags.tasks or stored.get("tasks") or []
    tasks = [tasks] if isinstance(tasks, str) else tasks
    return Asked(
        flags.model or stored.get("model"),
        _pairs(flags.model_args) or _pairs(stored.get("model_args") or {}),
        _pairs(flags.metadata) or _pairs(stored.get("metadata") or {}),
        [name for part in tasks for name in str(part).split(",") if name],
        flags.include_path or stored.get("include_path"),
    )


def complete(arguments: Sequence[str], asked: Asked) -> list[str]:
    """The command line with `--model tenure` unless there is a model, and with a way to the generated tasks.

    lm-eval takes one `--include_path`: where the user has one, generated tasks are named by their files instead.
    """
    completed = list(arguments)
    if asked.model is None:
        completed += ["--model", MODEL_TYPE]
        asked.model = MODEL_TYPE
    if asked.include_path is None:
        return [*completed, "--include_path", str(tasks_folder())]
    files = {name: task_files(name) for name in asked.tasks if name.startswith(PREFIX)}
    return [
        ",".join(path for part in word.split(",") for path in files.get(part, [part]))
        if any(part in files for part in word.split(","))
        else word
        for word in completed
    ]


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


def check(asked: Asked) -> None:
    """Refuses, before the model is loaded, what cannot be evaluated.

    Raises:
        ValueError: wrong options; gates or a model that do not fit; generated contexts beyond the model's positions; an
            unknown generated task; a task that does not say where its question begins, with `question=agnostic`.
    """
    options, others = Options.split(asked.model_args)
    name = others.get("pretrained")
    if name is None:
        raise ValueError("no model: add pretrained=NAME to --model_args")
    gates = load_gates(options)
    _, config = find_config(str(name), others)
    check_config(options, gates, config, others)
    generated = [task for task in asked.tasks if task.startswith(PREFIX)]
    for task in generated:
        if "*" not in task:
            task_files(task)
    if generated:
        check_length(asked.model_args | asked.metadata, config)
    if options.question == "agnostic" and options.evicts and not options.question_pattern:
        unsure = [task for task in asked.tasks if options.question_field or not says_where(task)]
        check_fields(options, _loaded(asked, unsure))


def check_length(metadata: dict[str, Any], config: Any) -> None:
    """Raises ValueError if generated contexts do not fit the model."""
    from .dataset import LENGTH

    length = metadata.get("length", LENGTH)
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(length, int) and positions is not None and length + QUESTION_TOKENS > positions:
        raise ValueError(
            f"contexts of {length} tokens and {QUESTION_TOKENS} for question and answer exceed the model's {positions} "
            f"positions: give --metadata length={positions - QUESTION_TOKENS} or less"
        )


def check_fields(options: Options, tasks: dict[str, Any]) -> None:
    """Raises ValueError for a task whose documents do not say where their questions begin."""
    for name, task in tasks.items():
        document = next(iter(task.eval_docs), None)
        if document is None:
            continue
        kind, rule = options.boundaries.rule(name, document)
        if kind == "field" and rule not in document:
            raise ValueError(
                f"task {name!r} has no field {rule!r} to find the question by; its fields are "
                f"{', '.join(sorted(document))}"
            )


def says_where(task: str) -> bool:
    """Whether a task or group is known to say where its questions begin, so that its data need not be loaded."""
    return task.startswith(PREFIX) or task in FAMILIES or any(fnmatch(task, name) for name, _, _ in KNOWN)


def _loaded(asked: Asked, tasks: Sequence[str]) -> dict[str, Any]:
    """These of the tasks by name, as lm-eval is going to load them; its own are indexed only if one is among them."""
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [tasks_folder(), *([asked.include_path] if asked.include_path else [])]
    names = [task for task in tasks if not task.endswith(".yaml")]
    if not names:
        return {}
    metadata = asked.model_args | asked.metadata
    manager = TaskManager(include_path=folders, metadata=metadata, include_defaults=False)
    if any(not manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=folders, metadata=metadata)
    found = manager.match_tasks(names)
    if hasattr(manager, "load"):
        return dict(manager.load(found)["tasks"])
    loading: Any = manager.load_task_or_group
    return dict(_leaves(loading(found)))  # before lm-eval 0.4.12


def _leaves(tasks: dict[Any, Any]) -> Iterable[tuple[str, Any]]:
    for name, task in tasks.items():
        if isinstance(task, dict):
            yield from _leaves(task)
        elif task is not None:
            yield str(name), task


def _pairs(given: Any) -> dict[str, Any]:
    """lm-eval's `a=1,b=2` words, or JSON, as a dictionary."""
    from lm_eval.utils import simple_parse_args_string

    if isinstance(given, dict):
        return dict(given)
    if isinstance(given, str):
        given = [given]
    text = " ".join(given).strip()
    if text.startswith("{"):
        return json.loads(text)
    return simple_parse_args_string(",".join(word.strip(",") for word in given)) if text else {}
