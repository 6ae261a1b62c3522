"""What a command line of lm-eval asks for, as far as it is checked before a model is loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Asked:
    """What a command line asks lm-eval for, as far as it is checked here.

    Attributes:
        model: the model type, or None.
        model_args, metadata: parsed as lm-eval parses them.
        tasks: names and files.
        include_path: the user's own folder of tasks, or None.
        device: of the flag, or None.
    """

    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    device: str | None = None


def peek(arguments: Sequence[str]) -> Asked:
    """Reads the flags that matter here; a file of `--config` gives what the flags leave out.

    Raises:
        ValueError: the file is absent or no mapping in YAML, or what should be `a=1,b=2` or JSON is neither.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-C")
    parser.add_argument("--model", "-M")
    parser.add_argument("--include_path")
    parser.add_argument("--device")
    for name, short in (("--model_args", "-a"), ("--tasks", "-t"), ("--metadata", None)):
        parser.add_argument(*([name, short] if short else [name]), nargs="+", action="extend", default=[])
    flags, _ = parser.parse_known_args(list(arguments))
    stored = _stored(Path(flags.config)) if flags.config else {}
    tasks = flags.tasks or stored.get("tasks") or []
    tasks = [tasks] if isinstance(tasks, str) else tasks
    return Asked(
        flags.model or stored.get("model"),
        _pairs("model_args", flags.model_args) or _pairs("model_args", stored.get("model_args") or {}),
        _pairs("metadata", flags.metadata) or _pairs("metadata", stored.get("metadata") or {}),
        [name for part in tasks for name in str(part).split(",") if name],
        flags.include_path or stored.get("include_path"),
        flags.device or stored.get("device"),
    )


def _stored(path: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no file at --config {str(path)!r}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds {type(document).__name__}; a mapping of lm-eval's arguments is accepted")
    return document


def _pairs(flag: str, given: Any) -> dict[str, Any]:
    """lm-eval's `a=1,b=2` words, or JSON, as a dictionary."""
    from lm_eval.utils import simple_parse_args_string

    if isinstance(given, dict):
        return dict(given)
    words = [given] if isinstance(given, str) else list(given)
    text = " ".join(words).strip()
    try:
        if text.startswith("{"):
            return json.loads(text)
        return simple_parse_args_string(",".join(word.strip(",") for word in words)) if text else {}
    except ValueError:
        raise ValueError(f"--{flag} is {text!r}; a=1,b=2 or a mapping in JSON is accepted") from None
