"""The command line of `tenure eval`: lm-eval's own with the model type `tenure` and the generated tasks, checked first.

`peek` reads the flags that matter, `check` refuses in one sentence what cannot be evaluated, before a model is loaded,
and `run` hands the command line to lm-eval.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenure.checked import read
from tenure.documents import load_yaml, parse_json, plain_line, shown

from .boundary import FAMILIES, KNOWN
from .generated_tasks import PREFIX, GeneratedCases, check_kinds, kinds_of, task_files
from .registration import MODEL_TYPE, register, tasks_folder
from .turn_tasks import TURNS, conversations

if TYPE_CHECKING:
    from .options import Options

SUBCOMMANDS = ("ls", "validate")


def run(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Runs lm-eval's own command line with these arguments.

    `--model tenure` and the folder of the generated tasks are added unless the arguments name others; the path of
    `--use_cache` gets a digest of the settings, so that each has answers of its own.

    Returns:
        For each model of this type: its options, and the measurements of its caches.

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
            digest = check(asked)
            command = [
                f"{word}-{digest}" if flag in CACHE_FLAGS else word
                for flag, word in zip(["", *command], command, strict=False)
            ]
    before = sys.argv
    sys.argv = ["lm-eval", *command]
    try:
        if any(flag in command for flag in ("-h", "--help")):
            cli_evaluate()  # ends the process
        from .model import created_models  # needs torch

        with created_models() as models:
            cli_evaluate()
            return [model.measured for model in models]
    finally:
        sys.argv = before


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


@dataclass
class Asked:
    """The part of an lm-eval command line that is checked here.

    Attributes:
        model: the model type, or None.
        model_args, metadata: parsed as lm-eval parses them.
        tasks: names and files.
        include_path: the user's own folder of tasks, or None.
        device: of the flag, or None.
        batch_size, max_batch_size: as given, or None.
    """

    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    device: str | None = None
    batch_size: str | int | None = None
    max_batch_size: str | int | None = None


def peek(arguments: Sequence[str]) -> Asked:
    """Reads the flags that matter here; a file of `--config` supplies those that are left out.

    Raises:
        ValueError: the file is absent or no mapping in YAML, or what should be `a=1,b=2` or JSON is neither.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-C")
    parser.add_argument("--model", "-M")
    parser.add_argument("--include_path")
    parser.add_argument("--device")
    parser.add_argument("--batch_size", "-b")
    parser.add_argument("--max_batch_size")
    for name, short in (("--model_args", "-a"), ("--tasks", "-t"), ("--metadata", None)):
        parser.add_argument(*([name, short] if short else [name]), nargs="+", action="extend", default=[])
    flags, _ = parser.parse_known_args(list(arguments))
    stored = _stored(Path(flags.config)) if flags.config else StoredArguments()
    tasks = flags.tasks or stored.tasks or []
    tasks = [tasks] if isinstance(tasks, str) else tasks
    return Asked(
        flags.model or stored.model,
        _pairs("model_args", flags.model_args) or _pairs("model_args", stored.model_args or {}),
        _pairs("metadata", flags.metadata) or _pairs("metadata", stored.metadata or {}),
        [name for part in tasks for name in part.split(",") if name],
        flags.include_path or stored.include_path,
        flags.device or stored.device,
        flags.batch_size or stored.batch_size,
        flags.max_batch_size or stored.max_batch_size,
    )


@dataclass(frozen=True)
class StoredArguments:
    """The arguments of a file at `--config` that are checked here; `Asked` describes them."""

    model: str | None = None
    model_args: dict[str, Any] | str | None = None
    metadata: dict[str, Any] | str | None = None
    tasks: tuple[str, ...] | str | None = None
    include_path: str | None = None
    device: str | None = None
    batch_size: str | int | None = None
    max_batch_size: str | int | None = None


def _stored(path: Path) -> StoredArguments:
    try:
        return read(StoredArguments, load_yaml(path, extra="eval"), str(path), unknown=set())
    except FileNotFoundError:
        raise ValueError(f"no file at --config {str(path)!r}") from None


def _pairs(flag: str, given: Any) -> dict[str, Any]:
    """lm-eval's `a=1,b=2` words, or JSON, as a dictionary."""
    from lm_eval.utils import simple_parse_args_string

    if isinstance(given, dict):
        return dict(given)
    words = [given] if isinstance(given, str) else list(given)
    text = " ".join(words).strip()
    try:
        if text.startswith("{"):
            return parse_json(text, f"--{flag}")
        return simple_parse_args_string(",".join(word.strip(",") for word in words)) if text else {}
    except ValueError:
        raise ValueError(f"got {plain_line(text)!r} as --{flag}; accepted: a=1,b=2 or a mapping in JSON") from None


CACHE_FLAGS = ("--use_cache", "-c")
FLAGS = ("device", "batch_size", "max_batch_size")  # lm-eval gives them to the model itself
RULER_LENGTHS = "max_seq_lengths"  # in lm-eval's own ruler: tokens of whole prompts


def check(asked: Asked) -> str:
    """Refuses, before the model is loaded, what cannot be evaluated.

    Returns:
        A digest of the settings that change answers.
    Raises:
        ValueError: wrong options; gates or a model that do not fit; a device that is not there; an unknown generated
            task, or one whose cases cannot be made; contexts beyond the model's positions; a task without a rule for
            where its question begins, with `question=agnostic`.
    """
    from ..runner import find_device
    from .model import answer_settings, settings_digest
    from .options import Options, check_config, find_config, load_gates

    options, others = Options.split(asked.model_args)
    for name in FLAGS:
        if name in others:
            raise ValueError(f"{name} is a flag of its own: give --{name} {others[name]} and not in --model_args")
    if asked.device is not None:
        find_device(asked.device)
    for flag, form in (("batch_size", r"auto(:[1-9]\d{0,8})?|[1-9]\d{0,8}"), ("max_batch_size", r"[1-9]\d{0,8}")):
        given = getattr(asked, flag)
        if given is not None and not re.fullmatch(form, str(given)):
            accepted = "a number from 1 on" + (", auto or auto:N" if flag == "batch_size" else "")
            raise ValueError(f"--{flag} is {shown(given)}; accepted: {accepted}")
    name = others.get("pretrained")
    if name is None:
        raise ValueError("no model: add pretrained=NAME to --model_args")
    gates = load_gates(options)
    _, config = find_config(str(name), others)
    check_config(options, gates, config, others)
    check_generated(asked, config)
    if options.question == "agnostic" and options.evicts and not options.question_pattern:
        unsure = [task for task in asked.tasks if options.question_field or not says_where(task)]
        check_fields(options, _loaded(asked, unsure))
    return settings_digest(answer_settings(str(name), options, others, gates))


def check_generated(asked: Asked, config: Any, question_tokens: int = 256) -> None:
    """Refuses generated tasks that cannot be made or do not fit the model.

    Args:
        config: the model's configuration.
        question_tokens: room for a question, the chat template and the answer after a generated context.

    Raises:
        ValueError: naming what does not fit.
    """
    longest = asked.model_args.get("max_length")
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    limit = min((one for one in (longest, positions) if one is not None), default=None)
    room = f"max_length={limit}" if limit == longest else f"the model's {limit} positions"
    wanted = asked.metadata.get(RULER_LENGTHS) or []
    wanted = [one for one in (wanted if isinstance(wanted, list) else [wanted]) if isinstance(one, int)]
    if limit is not None and wanted and max(wanted) > limit:
        raise ValueError(f"{RULER_LENGTHS} has {max(wanted)}; prompts of that many tokens exceed {room}")
    kinds = kinds_of(asked.tasks)
    if not kinds:
        return
    taken = [one.name for one in fields(GeneratedCases)]
    unknown = sorted(set(asked.metadata) - {*taken, "pretrained"})
    if unknown and all(task.startswith(PREFIX) for task in asked.tasks):
        raise ValueError(f"got {', '.join(unknown)} in --metadata; the generated tasks accept {', '.join(taken)}")
    given = asked.model_args | asked.metadata
    length = given.get("length", GeneratedCases.length)
    if limit is not None and limit <= question_tokens:
        raise ValueError(
            f"generated contexts and {question_tokens} for question and answer exceed {room}; accepted: a model with "
            f"more than {question_tokens} positions"
        )
    if isinstance(length, int) and limit is not None and length + question_tokens > limit:
        raise ValueError(
            f"contexts of {length} tokens and {question_tokens} for question and answer exceed {room}: give --metadata "
            f"length={limit - question_tokens} or less"
        )
    turns = [kind.removeprefix(TURNS) for kind in kinds if kind.startswith(TURNS)]
    for kind in turns:
        conversations(kind, **given | {"cases": 1})
    if len(turns) < len(kinds):
        check_kinds([kind for kind in kinds if not kind.startswith(TURNS)], **given)


def check_fields(options: Options, tasks: dict[str, Any]) -> None:
    """Raises ValueError for a task whose documents lack the field that begins their questions."""
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
    """Whether there is a known rule for a task's or group's questions, so that its data need not be loaded."""
    return task.startswith(PREFIX) or task in FAMILIES or any(fnmatch(task, name) for name, _, _ in KNOWN)


def _loaded(asked: Asked, tasks: Sequence[str]) -> dict[str, Any]:
    """These of the tasks by name, as lm-eval will load them; its own are indexed only if one is among them."""
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
