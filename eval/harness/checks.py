"""What `tenure eval` refuses in one sentence before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .asked import Asked
from .boundary import FAMILIES, KNOWN
from .generated import PREFIX, kinds_of
from .options import Options, check_config, find_config, load_gates
from .registration import tasks_folder

QUESTION_TOKENS = 256  # room for a question, the chat template and the answer beside a generated context
FLAGS = ("device", "batch_size", "max_batch_size")  # lm-eval gives them to the model itself
RULER_LENGTHS = "max_seq_lengths"  # in lm-eval's own ruler: tokens of whole prompts


def check(asked: Asked) -> None:
    """Refuses, before the model is loaded, what cannot be evaluated.

    Raises:
        ValueError: wrong options; gates or a model that do not fit; a device that is not there; an unknown generated
            task, or one whose cases cannot be made; contexts beyond the model's positions; a task that does not say
            where its question begins, with `question=agnostic`.
    """
    from ..devices import find_device

    options, others = Options.split(asked.model_args)
    for name in FLAGS:
        if name in others:
            raise ValueError(f"{name} is a flag of its own: give --{name} {others[name]} and not in --model_args")
    if asked.device is not None:
        find_device(asked.device)
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


def check_generated(asked: Asked, config: Any) -> None:
    """Raises ValueError if the generated tasks that are asked for cannot be made, or do not fit the model."""
    from .dataset import LENGTH, TAKEN, check_kinds

    longest = asked.model_args.get("max_length")
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    limit = min((one for one in (longest, positions) if one is not None), default=None)
    room = f"max_length={limit}" if limit == longest else f"the model's {limit} positions"
    wanted = asked.metadata.get(RULER_LENGTHS) or []
    wanted = [one for one in (wanted if isinstance(wanted, list) else [wanted]) if isinstance(one, int)]
    if limit is not None and wanted and max(wanted) > limit:
        raise ValueError(f"{RULER_LENGTHS} has {max(wanted)}; prompts of so many tokens exceed {room}")
    kinds = kinds_of(asked.tasks)
    if not kinds:
        return
    unknown = sorted(set(asked.metadata) - {*TAKEN, "pretrained"})
    if unknown and all(task.startswith(PREFIX) for task in asked.tasks):
        raise ValueError(f"--metadata has {', '.join(unknown)}; the generated tasks take {', '.join(TAKEN)}")
    given = asked.model_args | asked.metadata
    length = given.get("length", LENGTH)
    if isinstance(length, int) and limit is not None and length + QUESTION_TOKENS > limit:
        raise ValueError(
            f"contexts of {length} tokens and {QUESTION_TOKENS} for question and answer exceed {room}: give --metadata "
            f"length={max(1, limit - QUESTION_TOKENS)} or less"
        )
    check_kinds(kinds, **given)


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
