"""The policies and cases that a sweep compares, as its YAML file lists them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tenure.checked import Distinct, Range, Size, read, verify
from tenure.documents import load_yaml

from ..cells import Cell, parse_cells

QUESTIONS = {"agnostic": (False,), "aware": (True,), "both": (False, True)}
_NOT_SETTINGS = ("output", "threads", "together")  # they decide where and how fast, not the numbers


@dataclass(frozen=True)
class SweepConfig:
    """A sweep: every policy at every budget, on `cases` cases of every task, length and seed.

    Attributes:
        policies: names as `parse_cells` takes them: "snapkv", "snapkv(window=16):layer", "retention@256".
        budgets: shares of the context that stay, or whole numbers: entries per head.
        tasks: names of `tasks.builder.TASKS`.
        scopes: a policy without a scope of its own is taken with each of these; none: with its default.
        question: "agnostic": compressed before the question; "aware": after it; "both".
        lengths: tokens of the contexts.
        seeds: each gives cases of its own.
        cases: cases of each task, length and seed.
        model, revision: Hub id, local folder, or "demo"; a Hub model's revision.
        gates: folder, demo or hub:OWNER/NAME; None for those shipped for the demo model.
        data: texts: "demo" (held-out essays), "demo:train" (the other essays), a file or a folder; several are taken in
            turn, case number i over number i mod n.
        dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
        sinks, recent: first and last tokens that always stay; None for each policy's own.
        preset: the released code whose rules all policies follow, see docs/reference/presets.md; a policy with a
            +PRESET of its own follows that.
        together: cells that are asked in one batch, see `evaluate`.
        threads: CPU threads of a process; None shares the cores among the processes.
        output: folder of the results.

    Raises:
        ValueError: a value of another kind, out of range, or unknown.
    """

    policies: Annotated[tuple[str, ...], Size(1), Distinct()]
    budgets: Annotated[tuple[float | int, ...], Size(1), Distinct()]
    tasks: Annotated[tuple[str, ...], Size(1), Distinct()]
    scopes: tuple[str, ...] = ()
    question: Literal["agnostic", "aware", "both"] = "agnostic"
    lengths: Annotated[tuple[Annotated[int, Range(1)], ...], Size(1), Distinct()] = (1024,)
    seeds: Annotated[tuple[int, ...], Size(1), Distinct()] = (0,)
    cases: Annotated[int, Range(1)] = 25
    model: str = "demo"
    revision: str | None = None
    gates: str | None = None
    data: str | tuple[str, ...] = "demo"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    sinks: Annotated[int, Range(0)] | None = None
    recent: Annotated[int, Range(0)] | None = None
    preset: str | None = None
    together: Annotated[int, Range(1)] = 8
    threads: Annotated[int, Range(1)] | None = None
    output: str = "runs/sweep"

    def __post_init__(self) -> None:
        verify(self)
        if not self.data:
            raise ValueError(f"got {self.data!r} as data; accepted: demo, a file, a folder, or several of these")

    @property
    def data_sources(self) -> tuple[str, ...]:
        """The texts that cases are made of in turn."""
        return (self.data,) if isinstance(self.data, str) else self.data

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> SweepConfig:
        """Reads a YAML mapping of the attributes; `changes` replace values of the file.

        Raises:
            ImportError: PyYAML is missing.
            ValueError: the file is absent or no mapping, has unknown fields or lacks some (all are named), or a value
                is of another type or out of its range.
        """
        try:
            document = load_yaml(path, extra="eval")
        except FileNotFoundError:
            raise ValueError(f"no sweep at {str(path)!r}; examples/sweep_smollm2.yaml is one") from None
        return read(cls, document | changes if isinstance(document, dict) else document, str(path))

    def cells(self) -> list[Cell]:
        """Every way to compress, the full cache once.

        Raises:
            ValueError: an unknown policy, scope or preset, a budget out of range, or a value that a preset fixes.
        """
        names = []
        for name in self.policies:
            policy, at, chunk = name.partition("@")
            if self.preset is not None and "+" not in policy:
                kind, colon, scope = policy.partition(":")
                policy = f"{kind}+{self.preset}{colon}{scope}"
                name = f"{policy}{at}{chunk}"
            own = ":" in policy or not self.scopes
            names += [name] if own else [f"{policy}:{scope}{at}{chunk}" for scope in self.scopes]
        cells = parse_cells(names, self.budgets, QUESTIONS[self.question])
        tokens = [name for name in ("sinks", "recent") if getattr(self, name)]
        if tokens and any(cell.preset for cell in cells):
            raise ValueError(f"presets protect no tokens: leave out {', '.join(tokens)}, or the preset")
        if tokens and any(cell.protection for cell in cells):
            raise ValueError(f"policies with brackets have protected tokens: leave out {', '.join(tokens)}")
        return cells

    def settings(self) -> dict[str, Any]:
        """The settings that the numbers depend on, as plain values for JSON."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_SETTINGS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
