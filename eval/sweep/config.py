"""What a sweep compares and on which cases, as its YAML file says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..cells import Cell, parse_cells

QUESTIONS = {"agnostic": (False,), "aware": (True,), "both": (False, True)}
DTYPES = ("auto", "float32", "bfloat16", "float16")
_NOT_SETTINGS = ("output", "threads", "together")  # where and how fast, not what


@dataclass(frozen=True)
class SweepConfig:
    """A sweep: every policy at every budget, on `cases` cases of every task, length and seed.

    Attributes:
        policies: names as `parse_cells` takes them: "snapkv", "snapkv(window=16):layer", "retention@256".
        budgets: shares of the context that stay, or whole numbers: entries per head.
        tasks: of `templates.TASKS` or `tasks.kinds.KINDS`.
        scopes: a policy without a scope of its own is taken with each of these; none: with its default.
        question: "agnostic": compressed before the question; "aware": after it; "both".
        lengths: tokens of the contexts.
        seeds: each gives cases of its own.
        cases: cases of each task, length and seed.
        model, revision: Hub id, local folder, or "demo"; a Hub model's revision.
        gates: folder or Hub id; None for those shipped for the demo model.
        data: texts: "demo" (held-out essays), a file or a folder.
        dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
        sinks, recent: first and last tokens that always stay.
        together: cells that are asked in one batch, see `evaluate`.
        threads: CPU threads of a process; None shares the cores among the processes.
        output: folder of the results.

    Raises:
        ValueError: a value of another kind, out of range, or unknown.
    """

    policies: tuple[str, ...]
    budgets: tuple[float | int, ...]
    tasks: tuple[str, ...]
    scopes: tuple[str, ...] = ()
    question: str = "agnostic"
    lengths: tuple[int, ...] = (1024,)
    seeds: tuple[int, ...] = (0,)
    cases: int = 25
    model: str = "demo"
    revision: str | None = None
    gates: str | None = None
    data: str = "demo"
    dtype: str = "auto"
    sinks: int = 4
    recent: int = 32
    together: int = 8
    threads: int | None = None
    output: str = "runs/sweep"

    def __post_init__(self) -> None:
        for name, kind in (("policies", str), ("budgets", (int, float)), ("tasks", str), ("scopes", str),
                           ("lengths", int), ("seeds", int)):  # fmt: skip
            object.__setattr__(self, name, _several(name, getattr(self, name), kind))
        threads = {} if self.threads is None else {"threads": 1}
        for name, least in ({"cases": 1, "sinks": 0, "recent": 0, "together": 1} | threads).items():
            value = getattr(self, name)
            if not _is(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; a whole number of {least} or more is accepted")
        for name in ("model", "data", "output"):
            if not _is(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; text is accepted")
        for name in ("revision", "gates"):
            if getattr(self, name) is not None and not _is(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; text or nothing is accepted")
        for name, known in (("question", tuple(QUESTIONS)), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {', '.join(known)}")
        if min(self.lengths) < 1:
            raise ValueError(f"lengths is {list(self.lengths)}; numbers of tokens, 1 or more, are accepted")
        for name in ("policies", "budgets", "tasks", "lengths", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names something twice: {list(getattr(self, name))}")

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> SweepConfig:
        """Reads a YAML mapping of the attributes; `changes` replace what the file says.

        Raises:
            ImportError: PyYAML is missing.
            ValueError: the file is absent, is no mapping, has unknown keys (all are named) or lacks some, or a value is
                wrong.
        """
        try:
            import yaml
        except ImportError:
            raise ImportError("reading a sweep needs PyYAML: pip install 'tenure[eval]'") from None
        if not Path(path).is_file():
            raise ValueError(f"no sweep at {str(path)!r}; examples/sweep_smollm2.yaml is one")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds {type(values).__name__}; a mapping of a sweep's settings is accepted")
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(f"{path} has unknown keys {', '.join(unknown)}; accepted: {', '.join(known)}")
        values |= changes
        missing = [name for name in ("policies", "budgets", "tasks") if name not in values]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; accepted keys: {', '.join(known)}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def cells(self) -> list[Cell]:
        """Every way to compress, the full cache once.

        Raises:
            ValueError: an unknown policy or scope, or a budget out of range.
        """
        names = []
        for name in self.policies:
            policy, at, chunk = name.partition("@")
            own = ":" in policy or not self.scopes
            names += [name] if own else [f"{policy}:{scope}{at}{chunk}" for scope in self.scopes]
        return parse_cells(names, self.budgets, QUESTIONS[self.question])

    def settings(self) -> dict[str, Any]:
        """What decides the numbers, as plain values for JSON."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_SETTINGS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _several(name: str, value: Any, kind: Any) -> tuple[Any, ...]:
    what = {str: "names", int: "whole numbers"}.get(kind, "numbers")
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(_is(one, kind) for one in value):
        raise ValueError(f"{name} is {value!r}; a list of {what} is accepted")
    if not value and name != "scopes":
        raise ValueError(f"{name} is empty; a list of one or more {what} is accepted")
    return tuple(value)


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
