"""lm-eval's command line with the model type `tenure` and the generated tasks, checked before a model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .asked import Asked, peek
from .checks import check
from .generated import PREFIX, task_files
from .registration import MODEL_TYPE, register, tasks_folder

SUBCOMMANDS = ("ls", "validate")


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
